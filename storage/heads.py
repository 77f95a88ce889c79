"""The first rows of every table below a dataset's root, for whoever has to guess what the files are.

Reads a bounded part of each file, whatever its size, with the parser that reads it whole later. A folder of Parquet parts
is one table. Knows nothing of what columns mean.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from lzma import LZMAError
from tempfile import TemporaryDirectory

import polars as pl
import pyarrow
import pyarrow.parquet

from mllmsrec_core.errors import SourceError, StoreError
from storage.formats import COMPRESSED, DELIMITERS, JSON_LINES
from storage.source import FsspecSource

PIECE = 1 << 20  # bytes of text, unpacked, read of each file: some thousand rows
ROWS = 5_000  # of each Parquet file
MOST_FILES = 100  # tables looked at
OURS = (SourceError, StoreError)


@dataclass(frozen=True, eq=False)
class Head:
    """The first rows of a table: `whole` where these are all, `trouble` where it could not be read."""

    name: str
    size: int  # bytes, packed as the file is
    frame: pl.DataFrame
    whole: bool = False
    trouble: str = ""

    @property
    def columns(self) -> list[str]:
        return [name for name in self.frame.columns if name != "line"]


def heads(source: FsspecSource, names: Iterable[str]) -> Iterator[Head]:
    """The head of every table among these files; other files are left out, and so is what is beyond `MOST_FILES`."""
    for name in tables_among(names)[:MOST_FILES]:
        try:
            yield _parquet(source, name) if parquet_in(name) else _text(source, name)
        except (OSError, EOFError, ValueError, zlib.error, LZMAError, pyarrow.ArrowException, *OURS) as error:
            yield Head(name, 0, pl.DataFrame(), trouble=str(error))


def tables_among(names: Iterable[str]) -> list[str]:
    """Names of tables; the parts of one folder of Parquet as the folder."""
    names = list(names)
    parts: dict[str, int] = {}
    for name in names:
        folder = name.rpartition("/")[0]
        parts[folder] = parts.get(folder, 0) + name.endswith(".parquet")
    found = {}
    for name in names:
        folder = name.rpartition("/")[0]
        if name.endswith(".parquet"):
            found[folder if folder and parts[folder] > 1 else name] = None
        elif os.path.splitext(unpacked(name))[1].lower() in (*DELIMITERS, *JSON_LINES):
            found[name] = None
    return list(found)


def parquet_in(name: str) -> bool:
    return name.endswith(".parquet") or not os.path.splitext(unpacked(name))[1]


def unpacked(name: str) -> str:
    return name.removesuffix(next((end for end in COMPRESSED if name.endswith(end)), ""))


def _text(source: FsspecSource, name: str) -> Head:
    """Whole lines of the first `PIECE` bytes, read as a file of their own."""

    def begin() -> bytes:
        with source.files.fs.open(source.files.path(name), "rb", compression="infer") as file:
            return file.read(PIECE + 1)

    size, content = source.files.size(name) or 0, source.files.steadily(name, begin)
    whole = len(content) <= PIECE
    content = content if whole else content[: content.rfind(b"\n", 0, PIECE) + 1]
    with TemporaryDirectory(prefix="mllmsrec-") as folder:
        plain = unpacked(name).rpartition("/")[2]
        with open(os.path.join(folder, plain), "wb") as file:
            file.write(content)
        frame, _ = FsspecSource(folder).table(plain)
    return Head(name, size, frame, whole)


def _parquet(source: FsspecSource, name: str) -> Head:
    """The first rows of a file, or of the first part of a folder."""
    parts = [name] if name.endswith(".parquet") else [n for n in source.names(name) if n.endswith(".parquet")]

    def begin() -> tuple[pyarrow.Table, int]:
        with source.files.fs.open(source.files.path(parts[0]), "rb") as file:
            opened = pyarrow.parquet.ParquetFile(file)
            batch = next(opened.iter_batches(ROWS), None)
            table = opened.schema_arrow.empty_table() if batch is None else pyarrow.Table.from_batches([batch])
            return table, opened.metadata.num_rows

    size = sum(source.files.size(part) or 0 for part in parts)
    table, n_rows = source.files.steadily(parts[0], begin)
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return Head(name, size, frame, n_rows <= ROWS and len(parts) == 1)
