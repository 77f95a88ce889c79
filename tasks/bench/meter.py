"""What a piece of work costs: seconds, processor seconds and the peak of memory. Knows nothing of what is measured."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROUNDS = 2  # the best counts: others may use the machine
LOOK_S = 0.01  # between two looks at memory: a batch takes tens of ms
STATM = Path("/proc/self/statm")  # resident pages are its second number


@dataclass
class Cost:
    """Filled when the work is over. Megabytes are 10^6 bytes; `device_mb` is None without CUDA."""

    seconds: float = 0.0
    cpu: float = 0.0  # seconds of all threads
    memory_mb: float = 0.0
    device_mb: float | None = None


@contextmanager
def metered() -> Iterator[Cost]:
    """Measures what happens inside."""
    cost, over = Cost(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(cost, over), daemon=True)
    cuda = _cuda()
    if cuda:
        cuda.reset_peak_memory_stats()
    watcher.start()
    began, cpu = time.perf_counter(), time.process_time()
    try:
        yield cost
    finally:
        cost.seconds, cost.cpu = time.perf_counter() - began, time.process_time() - cpu
        over.set()
        watcher.join()
        cost.device_mb = cuda.max_memory_allocated() / 1e6 if cuda else None


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _watch(cost: Cost, over: threading.Event) -> None:
    while True:
        cost.memory_mb = max(cost.memory_mb, _resident_mb())
        if over.wait(LOOK_S):
            return


def _resident_mb() -> float:
    """Resident memory now; where the system does not say, the most there ever was."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * resource.getpagesize() / 1e6
    unit = 1 if sys.platform == "darwin" else 1e3  # bytes there, kB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _cuda() -> Any:
    """torch.cuda where torch is loaded and has a device: nothing is loaded to measure it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_available() else None


def in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, tuple[Cost, Any]]:
    """What each side costs at best, in time and in processor time, and what it returned; sides alternate."""
    best: dict[str, tuple[Cost, Any]] = {}
    for _ in range(rounds):
        for name, work in sides.items():
            with metered() as cost:
                made = work()
            if name in best:
                before = best[name][0]
                cost.seconds, cost.cpu = min(cost.seconds, before.seconds), min(cost.cpu, before.cpu)
            best[name] = cost, made
    return best
