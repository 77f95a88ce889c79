"""ingest beside a plain pandas script that does the same job on the same rows: seconds, CPU and peak memory of each.

Run: python benchmarks/ingest.py [interactions] [--alone]. Each side reads the same Parquet files, drops repeated rows,
sorts, numbers the histories and writes Parquet, in a process of its own; ours also judges every row, validates the
contract and digests the content. `--alone` leaves pandas out.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).parent.parent))

SIDES = ("ours", "pandas")


def make(folder: Path, n: int) -> None:
    """`n` clicks of n / 50 users on n / 100 items, a few heavy ones of each, in no order; one in a thousand comes twice."""
    random = np.random.default_rng(1)
    item = pl.format("B{}", pl.int_range(max(n // 100, 10), dtype=pl.Int32))
    items = pl.select(item_id=item).with_columns(title=pl.format("A plain product called {}", "item_id"))
    items.write_parquet(folder / "items.parquet")
    clicks = pl.DataFrame(
        {
            "user": (random.random(n) ** 1.5 * max(n // 50, 10)).astype(np.int32),
            "item": (random.random(n) ** 2 * items.height).astype(np.int32),
            "at": 1_600_000_000 + random.integers(0, 100_000_000, n),
            "rating": random.integers(1, 11, n) / 2,
        }
    ).with_columns(user_id=pl.format("user-{}", "user"), item_id=pl.format("B{}", "item"))
    clicks = clicks.select("user_id", "item_id", "at", "rating")
    pl.concat([clicks.head(n - n // 1000), clicks.head(n // 1000)]).write_parquet(folder / "clicks.parquet")


def ours(folder: Path) -> int:
    from mllmsrec_core.stage import Inputs, conform
    from mllmsrec_core.stages import ingest
    from storage.files import Files
    from storage.source import FsspecSource
    from storage.tables import Tables

    generic = {"items_file": "items.parquet", "interactions_file": "clicks.parquet", "liked_from": 4}
    generic["interaction_columns"] = {"rating": "rating"}
    params = ingest.Params.model_validate({"dataset": "generic", "path": str(folder), "generic": generic})
    inputs = Inputs({}, {"ingest": params}, source=FsspecSource(str(folder)))
    shaped = ingest.STAGE.tables(inputs, ingest.STAGE.rows(inputs))
    frames = {name: conform(frame, ingest.STAGE.writes[name]) for name, frame in shaped.items()}
    store = Tables(Files(str(folder / "store")))
    return {name: store.publish(name, frame, {}).rows for name, frame in frames.items()}["interactions"]


def pandas_side(folder: Path) -> int:
    import pandas as pd

    items = pd.read_parquet(folder / "items.parquet").drop_duplicates("item_id").sort_values("item_id")
    clicks = pd.read_parquet(folder / "clicks.parquet")
    clicks = pd.DataFrame(clicks[clicks["item_id"].isin(items["item_id"])])
    clicks["at"] = pd.to_datetime(clicks["at"], unit="s", utc=True)
    clicks["worst"] = -clicks["rating"]
    clicks = clicks.sort_values(["user_id", "at", "item_id", "worst"]).drop(columns="worst")
    clicks = clicks.drop_duplicates(["user_id", "item_id", "at"])
    clicks["liked"] = clicks["rating"] >= 4
    clicks["seq"] = clicks.groupby("user_id").cumcount()
    items.to_parquet(folder / "items.pandas.parquet", compression="zstd")
    clicks.to_parquet(folder / "clicks.pandas.parquet", compression="zstd")
    return len(clicks)


def one_side(name: str, folder: Path) -> None:
    """Runs in a process of its own; prints what it cost, imports left out."""
    if name == "pandas":
        import pandas  # noqa: F401
    else:
        import storage.tables  # noqa: F401
        from mllmsrec_core.stages import ingest  # noqa: F401
    wall, cpu = time.perf_counter(), time.process_time()
    rows = {"ours": ours, "pandas": pandas_side}[name](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB to GB
    print(json.dumps([rows, time.perf_counter() - wall, time.process_time() - cpu, peak]))


def main(n: int, alone: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), n)
        print(f"{n:,} interactions")
        cost: dict[str, list[float]] = {}
        for name in SIDES[:1] if alone else SIDES:
            command = [sys.executable, __file__, "--side", name, place]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            cost[name] = json.loads(said.splitlines()[-1])
            rows, wall, cpu, peak = cost[name]
            print(f"{name:<8}{rows:>12,.0f} rows{wall:>8.1f} s{cpu:>8.1f} s of CPU{peak:>7.2f} GB at most")
        if not alone:
            wall, cpu, peak = (cost["ours"][i] / cost["pandas"][i] for i in (1, 2, 3))
            print(f"ours / pandas: {wall:.2f} of the time, {cpu:.2f} of the CPU, {peak:.2f} of the memory")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--side"]:
        one_side(arguments[1], Path(arguments[2]))
    else:
        numbers = [int(word) for word in arguments if word.isdigit()]
        main(numbers[0] if numbers else 1_000_000, "--alone" in arguments)
