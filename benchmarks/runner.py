"""The runner beside a bare loop over the same engine and prompts: time per Ask, and memory as rows grow in number.

Run: python -m benchmarks.runner [--rows 20000] [--slow 256] [--large 200000], of which 0 leaves one out. Sides run in one
process, in turn; the store of the first is in memory, of the others on the local disk.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl

from mllmsrec_core.ask import Ask, Decoding, Generate, Reply
from mllmsrec_core.stage import Inputs
from mllmsrec_core.stages import caption
from storage.store import Store
from tasks.engines.batching import Batcher
from tasks.engines.scripted import MODEL, ScriptedEngine
from tasks.run_stage import run_stage
from tasks.runner import Counts, How, run_rows

MORE_US, ASKS_S = 200, 5_000  # what we set out to reach: CPU of an Ask over the bare loop, Asks a second
ROUNDS = 3
ASK_SECONDS, BATCH = 0.02, 32
WINDOW = 256  # rows in flight, as by default
STEP = 20_000  # Asks between two lines of the memory curve
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


class Slow(ScriptedEngine):
    """Answers in batches of up to `size`, in a thread of its own as the transformers engine does."""

    def __init__(self, store: Store, size: int, seconds: Callable[[int], float]) -> None:
        super().__init__(store.blobs)
        self._batches: Batcher[Ask] = Batcher("slow", size, lambda _: 0, lambda _: 1, self._run)
        self._seconds = seconds  # of a batch of so many

    def _run(self, asks: list[Ask]) -> list[Reply]:
        time.sleep(self._seconds(len(asks)))
        return [Reply()] * len(asks)

    async def answer(self, ask: Ask) -> Reply:
        await self._batches.submit(ask)
        return await super().answer(ask)


def captions(n: int) -> tuple[Inputs, pl.DataFrame]:
    """The caption stage's inputs and rows for `n` pictures."""
    images = pl.DataFrame(
        {"item_id": [str(i) for i in range(n)], "sha256": [f"{i:064x}" for i in range(n)], "status": "ok"}
    )
    inputs = Inputs({"images": images}, {"caption": caption.STAGE.params()}, MODEL)
    return inputs, caption.STAGE.rows(inputs)


def bare(inputs: Inputs, rows: pl.DataFrame, _: Store, engine: ScriptedEngine, window: int = 1) -> None:
    """Ask every question, `window` at once, keeping nothing."""
    params: Any = inputs.params["caption"]
    left = iter(rows["sha256"])

    async def worker() -> None:
        for sha256 in left:
            await engine.answer(Generate(MODEL, caption.prompt(params, sha256), Decoding(params.max_tokens)))

    async def loop() -> None:
        await asyncio.gather(*(worker() for _ in range(window)))

    asyncio.run(loop())


def through_runner(inputs: Inputs, rows: pl.DataFrame, store: Store, engine: ScriptedEngine) -> None:
    run_rows(caption.STAGE, inputs, rows, store, lambda ask: engine, How(WINDOW))


def at_once(n: int) -> None:
    """An engine that takes no time: what is left is the runner's own CPU time."""
    inputs, rows = captions(n)
    sides: dict[str, list[float]] = {"bare loop": [], "runner, nothing known": [], "runner, all known": []}
    for _ in range(ROUNDS):
        store = Store(f"memory://{uuid.uuid4().hex}")
        engine = ScriptedEngine(store.blobs)
        runs = [
            (bare, store),
            (through_runner, store),
            (through_runner, Store(store.url)),
        ]
        for side, (way, place) in zip(sides.values(), runs, strict=True):
            started = time.process_time()
            way(inputs, rows, place, engine)
            side.append(time.process_time() - started)
    base = median(sides["bare loop"])
    for name, side in sides.items():
        cpu = median(side)
        more = (cpu - base) / n * 1e6
        said = f"   {more:6.1f} us more, bar {MORE_US}: {'met' if more <= MORE_US else 'missed'}" if more else ""
        print(f"{name:<24} {cpu / n * 1e6:8.1f} us of CPU per Ask   {cpu / base:6.2f} x the bare loop{said}")


def slow(n: int, folder: str) -> None:
    """Engines that take their time, behind the same window: how much longer the runner takes, its start included."""
    engines: dict[str, tuple[int, int, Callable[[int], float]]] = {
        "20 ms an Ask, one by one": (n, 1, lambda size: ASK_SECONDS * size),
        "20 ms an Ask, batches of 32": (n, BATCH, lambda size: ASK_SECONDS * size),
        "20 ms a batch of 32": (16 * n, BATCH, lambda size: ASK_SECONDS),
    }
    for name, (asks, size, takes) in engines.items():
        inputs, rows = captions(asks)
        ways = {
            "bare loop": partial(bare, inputs, rows, window=WINDOW),
            "runner": partial(through_runner, inputs, rows),
        }
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for way in ROUNDS * list(ways):
            store = Store(f"{folder}/{uuid.uuid4().hex}")
            wall, cpu = time.perf_counter(), time.process_time()
            ways[way](store, Slow(store, size, takes))
            taken[way].append((time.perf_counter() - wall, time.process_time() - cpu))
        (base, base_cpu), (ours, our_cpu) = ([median(side) for side in zip(*taken[way], strict=True)] for way in ways)
        print(
            f"{name:<28} bare loop {base:6.2f} s, runner {ours:6.2f} s for {asks} Asks: {100 * (ours / base - 1):+.1f} %"
            f"   {(our_cpu - base_cpu) / asks * 1e6:.0f} us of CPU per Ask more"
        )


def resident_mb() -> float:
    """What the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_MB


def large(n: int, folder: str) -> None:
    """A stage of `n` rows, published: Asks a second, and the process's memory on the way."""
    inputs, _ = captions(n)
    store = Store(f"{folder}/large")
    engine, start, due = ScriptedEngine(store.blobs), resident_mb(), STEP
    began, cpu = time.perf_counter(), time.process_time()

    def watch(_: str, counts: Counts) -> None:
        nonlocal due
        if counts.done >= due:
            spent = time.process_time() - cpu
            grown = (resident_mb() - start) * 1e6 / counts.done
            print(
                f"{counts.done:>9,} rows   {resident_mb():7.0f} MB   {grown:7.0f} bytes a row   "
                f"{counts.done / (time.perf_counter() - began):7.0f} Asks/s, {counts.done / spent:7.0f} a CPU second"
            )
            due = counts.done // STEP * STEP + STEP

    print(f"{0:>9,} rows   {start:7.0f} MB")
    record = run_stage(store, caption.STAGE, inputs, {"rows": n}, lambda ask: engine, How(WINDOW, progress=watch))
    wall, spent = time.perf_counter() - began, time.process_time() - cpu
    assert record["counts"]["asked"] == n
    print(
        f"published {n:,} rows in {wall:.1f} s: {n / wall:,.0f} Asks/s (bar {ASKS_S:,}), {spent / n * 1e6:.0f} us of CPU an Ask "
        f"({n / spent:,.0f} a CPU second), {resident_mb():.0f} MB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000, help="Asks of the engine that takes no time")
    parser.add_argument("--slow", type=int, default=256, help="Asks of the engine that takes 20 ms for each")
    parser.add_argument("--large", type=int, default=200_000, help="Asks of the large stage")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runner-") as place:
        if told.rows:
            at_once(told.rows)
        if told.slow:
            slow(told.slow, place)
        if told.large:
            large(told.large, place)
