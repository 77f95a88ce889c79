"""The reply store beside reading everything: CPU time and memory at a given number of replies, and their ratios.

Run: python benchmarks/store.py [replies] [folder]. The store is built in columns below the folder (a temporary one by
default), with texts of some 150 characters; each side then runs in a process of its own. The plain side holds every
reply in one frame, with a dict of keys where single keys are asked; beyond PLAIN_AT_MOST replies it is left out.
"""

from __future__ import annotations

import io
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from mllmsrec_core.ask import Decoding, Generate, Message, Model
from storage.files import Files
from storage.replies import SCHEMA, Replies
from storage.shelf import Shelf

MODEL = Model("synthetic", "0" * 40)
ASK = Generate(MODEL, (Message("user", ("any",)),), Decoding(99))
FOLDER = f"replies/generate/{MODEL.slug}"
CHUNK = 1_000_000  # replies made at once
LOOK_UPS = 20_000
NEW = 10_000
PLAIN_AT_MOST = 5_000_000  # 20 million in one frame and a dict need more than 16 GB
WORDS = np.array("red blue soft warm long short wool linen light dark shoe coat bag with and for a the of in".split())


def keys(rng: np.random.Generator, n: int) -> pl.Series:
    """`n` evenly spread keys."""
    offsets = pa.py_buffer(np.arange(0, 32 * n + 1, 32, dtype=np.int64))
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), n, [None, offsets, pa.py_buffer(rng.bytes(32 * n))])
    return pl.Series("key", pl.from_arrow(column))


def rows(rng: np.random.Generator, n: int) -> pl.DataFrame:
    """`n` new answers as the runner writes them."""
    words = pl.DataFrame({str(column): WORDS[rng.integers(0, len(WORDS), n)] for column in range(32)})
    constants = {"detail": "", "passing": False, "tokens_in": 400, "tokens_out": 40, "seconds": 0.5, "engine": "vllm"}
    frame = pl.DataFrame({"key": keys(rng, n)}).with_columns(
        words.select(pl.concat_str(pl.all(), separator=" ")).to_series().cast(pl.Binary).alias("value"),
        pl.lit(None, pl.String).alias("error"),
        *(pl.lit(value).alias(name) for name, value in constants.items()),
        pl.lit(0).alias("generation"),
        pl.lit(datetime.now(UTC)).alias("at"),
    )
    return frame.select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())


def build(folder: str, n: int) -> tuple[float, pl.Series]:
    """CPU seconds of writing `n` answers, and some of their keys."""
    shelf, rng, some, seconds = Shelf(Files(folder), FOLDER, SCHEMA), np.random.default_rng(0), [], 0.0
    for done in range(0, n, CHUNK):
        frame = rows(rng, min(CHUNK, n - done))
        some.append(frame["key"].sample(fraction=0.01, seed=done))
        seconds += timed(lambda frame=frame: (shelf.append(frame), shelf.compact()))
    return seconds, pl.concat(some)


class Plain:
    """Everything in one frame, as a script would."""

    def __init__(self, folder: str, columns: list[str] | None = None) -> None:
        paths = sorted(Path(folder, FOLDER).rglob("*.parquet"))
        self.frame = pl.concat([pl.read_parquet(path, columns=columns) for path in paths], rechunk=True)

    def index(self) -> None:
        self.at = {key: row for row, key in enumerate(self.frame["key"])}

    def get(self, key: bytes) -> Any:
        row = self.at.get(key)
        return None if row is None else self.frame.row(row)


def timed(work: Callable[[], Any], per: int = 1) -> float:
    """CPU seconds of this process: other work on the machine does not count."""
    started = time.process_time()
    work()
    return (time.process_time() - started) / per


def opened(folder: str) -> Callable[[bytes], Any]:
    """Look-ups in the store, after every bucket was touched."""
    replies = Replies(Files(folder))
    for byte in range(256):
        replies.get(ASK, bytes([byte]) * 32)
    return lambda key: replies.get(ASK, key)


def plain_opened(folder: str) -> Callable[[bytes], Any]:
    plain = Plain(folder)
    plain.index()
    return plain.get


def look_ups(folder: str, some: pl.Series, is_plain: bool) -> dict[str, float]:
    """Opening, then seconds of one look-up: misses, hits in random order, the same hits again, hits in key order."""
    get: Callable[[bytes], Any] = len
    figures = {}

    def start() -> None:
        nonlocal get
        get = (plain_opened if is_plain else opened)(folder)

    def all_of(asked: list[bytes], found: bool) -> None:
        assert all((get(key) is not None) == found for key in asked)

    figures["open, s"] = timed(start)
    figures["peak RSS then, GB"] = peak()
    hits = some.sample(min(LOOK_UPS, len(some)), shuffle=True, seed=1).to_list()
    misses = keys(np.random.default_rng(1), LOOK_UPS).to_list()
    for label, asked, found in (
        ("a miss, us", misses, False),
        ("a hit, us", hits, True),
        ("a hit again, us", hits, True),
        ("a hit in key order, us", sorted(hits), True),
    ):
        figures[label] = timed(lambda asked=asked, found=found: all_of(asked, found), len(asked)) * 1e6
    return figures


def closed(folder: str, some: pl.Series, is_plain: bool) -> dict[str, float]:
    """Which of 1 % of the keys, and as many others, are answered."""
    asked = pl.concat([some, keys(np.random.default_rng(2), len(some))])

    def store() -> pl.Series:
        return Replies(Files(folder)).known("generate", MODEL.slug, asked)

    def plain() -> pl.Series:
        frame = Plain(folder, ["key", "passing"]).frame.filter(~pl.col("passing"))
        return asked.to_frame("key").join(frame.with_columns(held=True), "key", "left")["held"].fill_null(False)

    answers = pl.Series()

    def work() -> None:
        nonlocal answers
        answers = (plain if is_plain else store)()

    seconds = timed(work)
    assert answers.sum() == len(some)
    return {"known of 1 %, s": seconds, "peak RSS then, GB": peak()}


def new_rows(folder: str, some: pl.Series, is_plain: bool) -> dict[str, float]:
    """Adding 10,000 answers in parts of 500, and compacting. The plain side writes everything again, elsewhere."""
    frame = rows(np.random.default_rng(3 + is_plain), NEW)

    def store() -> None:
        shelf = Shelf(Files(folder), FOLDER, SCHEMA)
        for part in frame.iter_slices(500):
            shelf.append(part)
        shelf.compact()

    def plain() -> None:
        buffer = io.BytesIO()
        pl.concat([Plain(folder).frame, frame]).unique(maintain_order=True).sort("key").write_parquet(buffer)
        with tempfile.TemporaryDirectory() as elsewhere:
            Files(elsewhere).write("part.parquet", buffer.getvalue())

    return {"add 10,000 and compact, s": timed(plain if is_plain else store), "peak RSS then, GB": peak()}


def peak() -> float:
    """Peak RSS in GB (Linux; `getrusage` would count the parent's from before the process began)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def alone(side: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """The figures of a side that ran in a process of its own, so that its memory is its own too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(side, *arguments).result()


def main(n: int, folder: str) -> None:
    seconds, some = build(folder, n)
    parts = list(Path(folder, FOLDER).rglob("*.parquet"))
    size = sum(part.stat().st_size for part in parts)
    print(
        f"{n:,} replies written and compacted in {seconds:.1f} s of CPU: {n / seconds:,.0f}/s, {size / n:.0f} bytes each,"
    )
    print(f"{len(parts)} parts; a process that does nothing has a peak RSS of {alone(idle)['peak']:.2f} GB")
    print(f"{'':<28}{'store':>12}{'all in one':>12}{'ratio':>8}")
    for side in (look_ups, closed, new_rows):
        ours = alone(side, folder, some, False)
        plain = alone(side, folder, some, True) if n <= PLAIN_AT_MOST else {}
        for name, figure in ours.items():
            beside = f"{plain[name]:12.2f}{figure / plain[name]:8.2f}" if plain else f"{'-':>12}{'-':>8}"
            print(f"{name:<28}{figure:12.2f}{beside}")


def idle() -> dict[str, float]:
    return {"peak": peak()}


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    if len(sys.argv) > 2:
        main(count, sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(count, temporary)
