"""A night on a store of a million replies: a run with nothing new, and one where 1 % of the users clicked.

Run: python benchmarks/nightly.py [users] [folder]. A synthetic shop without pictures (generic Parquet files), the
scripted engine, and the stages without Prefect, each run in a process of its own. Prints seconds and peak memory of
each, beside the first run; the engine's own time is next to nothing. The folder is kept, so that a second call skips the
first run.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

CLICKS, ITEMS_PER_USER = 26, 5  # interactions of a user; a catalogue of so many items per user
CHANGED = 0.01
START, HOURS = np.datetime64("2025-01-01T00:00:00", "us"), 24 * 365


def write_shop(folder: Path, users: int, seed: int = 0) -> None:
    """items.parquet and clicks.parquet: every user clicks `CLICKS` items, popular ones more often."""
    rng = np.random.default_rng(seed)
    n_items = users * ITEMS_PER_USER
    names = [f"i{n}" for n in range(n_items)]
    words = np.array("amber blue calm dark early faint grey high iron jolly keen light".split())
    titles = [" ".join(words[rng.integers(0, len(words), 4)]) + f" {n}" for n in range(n_items)]
    pl.DataFrame({"item_id": names, "title": titles}).write_parquet(folder / "items.parquet")
    item = (n_items * rng.random((users, CLICKS)) ** 2).astype(int)
    at = START + np.sort(rng.integers(0, HOURS * 3600, (users, CLICKS)), axis=1).astype("timedelta64[s]")
    clicks(np.repeat(np.arange(users), CLICKS), item.ravel(), at.ravel()).write_parquet(folder / "clicks.parquet")


def clicks(user: Any, item: Any, at: Any) -> pl.DataFrame:
    frame = pl.DataFrame({"user": user, "item": item, "at": at})
    ids = (pl.format("u{}", "user").alias("user_id"), pl.format("i{}", "item").alias("item_id"))
    return frame.select(*ids, pl.col("at").cast(pl.Datetime("us", "UTC")))


def add_clicks(folder: Path, users: int) -> None:
    """One more click by the first 1 % of the users, a day after the last of all."""
    known, n = pl.read_parquet(folder / "clicks.parquet"), int(users * CHANGED)
    night = known.height - users * CLICKS  # another item each time
    at = np.full(n, np.datetime64(known["at"].max().replace(tzinfo=None) + timedelta(days=1), "us"))
    new = clicks(np.arange(n), (np.arange(n) * 3 + night) % (users * ITEMS_PER_USER), at)
    pl.concat([known, new]).write_parquet(folder / "clicks.parquet")


def run(folder: Path, results: Any) -> None:
    """Plan and all stages, in this process; puts seconds, peak memory in GB, Asks and seconds by stage."""
    from flows.settings import load
    from tasks.planning import make_plan
    from tasks.runner import How
    from tasks.stage_task import STAGE_BY_NAME, perform
    from tasks.work import open_work

    values = {
        "settings.store": f'"{folder / "store"}"',
        "model": "scripted",
        "audit.model": "scripted",
        "ingest.dataset": "generic",
        "ingest.path": f'"{folder}"',
        "ingest.generic.items_file": "items.parquet",
        "ingest.generic.interactions_file": "clicks.parquet",
    }
    began = time.monotonic()
    config = load((), [f"{name}={value}" for name, value in values.items()], {})
    work = open_work(config.to_json())
    make_plan(work, "dev")
    lasted = {"plan": time.monotonic() - began}
    before = work.store.envs.current("dev")["stages"]
    stages: dict[str, Any] = {}
    asked = 0
    for name in STAGE_BY_NAME:
        started = time.monotonic()
        stages[name], reused = perform(work, name, stages, How(), before)
        asked += 0 if reused else stages[name]["counts"]["asked"]
        lasted[name] = time.monotonic() - started
    work.store.envs.move("dev", stages)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    results.put((time.monotonic() - began, peak, asked, lasted))


def timed(name: str, folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=run, args=(folder, results))
    process.start()
    seconds, peak, asked, lasted = results.get()
    process.join()
    print(f"{name:<22} {seconds:8.1f} s {peak:6.2f} GB {asked:>10,} Asks   ", end="")
    print(", ".join(f"{stage} {spent:.1f}" for stage, spent in lasted.items() if spent > 0.05), flush=True)


def main(users: int, folder: Path) -> None:
    if not (folder / "clicks.parquet").exists():
        write_shop(folder, users)
        timed("first run", folder)
    timed("nothing new", folder)
    add_clicks(folder, users)
    timed(f"{CHANGED:.0%} of users changed", folder)


if __name__ == "__main__":
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp(prefix="nightly-"))
    where.mkdir(parents=True, exist_ok=True)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000, where)
