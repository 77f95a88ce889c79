"""Kills the pipeline at random moments and resumes it: every table must come out as if nothing had happened.

Run: python benchmarks/kills.py [times] [seed] [engine]. Each time a new store, one process that runs all stages and dies
by SIGKILL, and a second one that goes on. Compared are the digests of every table (scripted), or the rows, texts and
numbers within 1e-3 (embedded: batching changes the last bits); counted are the Asks that were answered twice.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl

from mllmsrec_core.stages import STAGES

FLUSH_ROWS = 100
SECONDS_PER_ASK = 0.002  # so that all stages last about as long as their share of the questions
SHOP = {"scripted": (60, 24), "embedded": (120, 60)}  # items, users


def options(store: Path, engine: str, others: Mapping[str, Any]) -> list[str]:
    items, users = SHOP[engine]
    values: dict[str, Any] = {
        "settings.store": f'"{store}"',
        "settings.flush_rows": FLUSH_ROWS,
        "settings.window": 16,
        "ingest.demo.items": items,
        "ingest.demo.users": users,
        "sft.epochs": 1,
    }
    if engine == "scripted":
        values |= {"model": "scripted", "audit.model": "scripted", "settings.scripted_seconds": SECONDS_PER_ASK}
    return [f"{name}={value}" for name, value in {**values, **others}.items()]


def run(store: Path, log: Path, engine: str, others: Mapping[str, Any] = MappingProxyType({})) -> None:
    """All stages in this process; each answer's key is written to `log` just before the runner gets it."""
    from flows.settings import load
    from mllmsrec_core.ask import key
    from tasks.runner import How
    from tasks.stage_task import STAGE_BY_NAME, perform
    from tasks.work import Engines, open_work

    written = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    choose = Engines.__call__

    class Noted:
        def __init__(self, engine: Any) -> None:
            self.engine = engine

        async def answer(self, ask: Any) -> Any:
            reply = await self.engine.answer(ask)
            os.write(written, key(ask).hex().encode() + b"\n")
            return reply

    Engines.__call__ = lambda engines, ask: Noted(choose(engines, ask))  # type: ignore[method-assign]
    config = load(["demo"], options(store, engine, others), {})
    work = open_work(config.to_json())
    before = work.store.envs.current("dev")["stages"]
    stages: dict[str, Any] = {}
    for name in STAGE_BY_NAME:
        stages[name], _ = perform(work, name, stages, How(config.settings.window), before)
        os.write(written, f"{name}\n".encode())
    work.store.envs.move("dev", stages)


def tables(store: Path) -> dict[str, tuple[str, pl.DataFrame]]:
    """Table -> digest and rows, as the environment shows them."""
    from storage.store import Store
    from tasks.stage_task import table_records

    opened = Store(str(store))
    shown = table_records(opened.envs.current("dev")["stages"])
    return {t: (p["digest"], opened.tables.read(t, p["write_id"])) for t, p in shown.items()}


def same(one: dict, other: dict, exactly: bool) -> bool:
    if exactly:
        return {t: digest for t, (digest, _) in one.items()} == {t: digest for t, (digest, _) in other.items()}
    return one.keys() == other.keys() and all(close(one[t][1], other[t][1]) for t in one)


def close(one: pl.DataFrame, other: pl.DataFrame) -> bool:
    """Equal rows and texts, numbers within 1e-3; keys of Asks hold the adapter's digest and are left out."""
    if one.shape != other.shape or one.columns != other.columns:
        return False
    return all(
        ((one[c] - other[c]).abs().max() or 0) < 1e-3 if one[c].dtype.is_float() else one[c].equals(other[c])
        for c in one.columns
        if c not in ("ask", "curves", "sha256", "name")
    )


def started(context: Any, *arguments: Any) -> Any:
    process = context.Process(target=run, args=arguments)
    process.start()
    return process


def completed(context: Any, *arguments: Any) -> None:
    process = started(context, *arguments)
    process.join()
    if process.exitcode:
        sys.exit(f"a run nobody killed ended with exit code {process.exitcode}")


def asked(log: Path) -> tuple[Counter[str], int]:
    """How often each key was answered, and how many stages were done."""
    lines = log.read_text().split() if log.exists() else []
    return Counter(line for line in lines if len(line) == 64), sum(len(line) != 64 for line in lines)


def main(times: int, seed: int, engine: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flows.settings", "tasks.work", "tasks.stage_task"])
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    began = time.monotonic()
    completed(context, root / "reference", root / "reference.log", engine)
    lasts = time.monotonic() - began
    expected, once = tables(root / "reference"), asked(root / "reference.log")[0]
    moments, killed_in, repeated, wrong = random.Random(seed), Counter(), [], 0
    names = [*(stage.name for stage in STAGES), "after the last"]
    while len(repeated) < times:
        store, log = root / "store", root / "log"
        shutil.rmtree(store, ignore_errors=True)
        log.unlink(missing_ok=True)
        process = started(context, store, log, engine)
        time.sleep(moments.uniform(0, lasts))
        if not process.is_alive():
            continue  # it was faster than the reference: nothing was killed
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed_in[names[asked(log)[1]]] += 1
        completed(context, store, log, engine)
        wrong += not same(tables(store), expected, engine == "scripted")
        repeated.append(sum((asked(log)[0] - once).values()))
        print(f"\r{len(repeated)} of {times}: {wrong} wrong", end="", file=sys.stderr, flush=True)
    print(f"\nkilled {times} times ({engine}, seed {seed}; an uninterrupted run: {len(once)} Asks, {lasts:.1f} s)")
    print("killed in: " + ", ".join(f"{name} {killed_in[name]}" for name in names if killed_in[name]))
    print(f"tables that came out otherwise: {wrong} of {times}")
    print(f"Asks answered twice per kill: mean {sum(repeated) / times:.1f}, most {max(repeated)} (buffer {FLUSH_ROWS})")
    shutil.rmtree(root)
    sys.exit(bool(wrong) or max(repeated) > FLUSH_ROWS)


if __name__ == "__main__":
    times, seed, engine = (*sys.argv[1:], *("20", "0", "scripted")[len(sys.argv) - 1 :])
    main(int(times), int(seed), engine)
