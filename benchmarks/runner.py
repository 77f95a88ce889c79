"""The runner beside a bare loop over the same engine and prompts: CPU time per Ask, and the ratio.

Run: python benchmarks/runner.py [rows]. Both sides run in one process, in turn; the store is in memory.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from statistics import median

import polars as pl

from mllmsrec_core.ask import Decoding, Generate
from mllmsrec_core.stage import Inputs
from mllmsrec_core.stages import caption
from storage.store import Store
from tasks.engines.scripted import MODEL, ScriptedEngine
from tasks.runner import How, run_rows

ROUNDS = 3


def images(n: int) -> pl.DataFrame:
    return pl.DataFrame(
        {"item_id": [str(i) for i in range(n)], "sha256": [f"{i:064x}" for i in range(n)], "status": "ok"}
    )


def bare(inputs: Inputs, rows: pl.DataFrame, engine: ScriptedEngine) -> float:
    """CPU seconds of asking every question one after another, keeping nothing."""
    params = inputs.params["caption"]

    async def loop() -> None:
        for sha256 in rows["sha256"]:
            await engine.answer(Generate(MODEL, caption.prompt(params, sha256), Decoding(params.max_tokens)))

    started = time.process_time()
    asyncio.run(loop())
    return time.process_time() - started


def through_runner(inputs: Inputs, rows: pl.DataFrame, store: Store, engine: ScriptedEngine) -> float:
    started = time.process_time()
    run_rows(caption.STAGE, inputs, rows, store, lambda ask: engine, How())
    return time.process_time() - started


def main(n: int) -> None:
    inputs = Inputs({"images": images(n)}, {"caption": caption.Params()}, MODEL)
    rows = caption.STAGE.rows(inputs)
    sides: dict[str, list[float]] = {"bare loop": [], "runner, nothing known": [], "runner, all known": []}
    for _ in range(ROUNDS):
        store = Store(f"memory://{uuid.uuid4().hex}")
        engine = ScriptedEngine(store.blobs)
        sides["bare loop"].append(bare(inputs, rows, engine))
        sides["runner, nothing known"].append(through_runner(inputs, rows, store, engine))
        sides["runner, all known"].append(through_runner(inputs, rows, Store(store.url), engine))
    base = median(sides["bare loop"])
    for name, seconds in sides.items():
        cpu = median(seconds)
        print(f"{name:<24} {cpu / n * 1e6:8.1f} us of CPU per Ask   {cpu / base:6.2f} x the bare loop")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
