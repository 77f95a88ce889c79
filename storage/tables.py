"""Published tables: Parquet parts, then a manifest, then whoever points at them.

A table is written once below `tables/<table>/<write-id>/` and never changed; readers open only the parts its manifest
lists, and a write without a manifest does not exist. The digest covers the logical values in key order, without
provenance columns, so that equal content has an equal digest however it was made.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import polars as pl
import pyarrow

from mllmsrec_core.errors import StoreError
from storage.files import Files

PROVENANCE = ("ask", "stale_since")  # say where a row came from and how fresh it is, not what it says
ROWS_PER_PART = 250_000  # about 30 MB of zstd for rows of one sentence
ROWS_PER_BLOCK = 100_000  # of a digest: part of its definition, so a change of it makes every stage due once
HASHERS = 4  # threads of a digest: sha256 lets go of the interpreter
_REBUILD = "remove its folder, and `mllmsrec run` makes the table again from the replies, without a model."


@dataclass(frozen=True)
class Published:
    """A pointer to one write of one table."""

    table: str
    write_id: str
    digest: str
    rows: int


def content_digest(frame: pl.DataFrame) -> str:
    """A sha256 over column names and logical values, in the frame's row order; the width of a number is not a value.

    Each block of rows is hashed by itself, column after column, as little-endian bytes that could be read back; the
    digest is over names, kinds and the blocks' hashes. Raises TypeError for Python objects.
    """
    frame = frame.drop(PROVENANCE, strict=False)
    total = sha256(json.dumps([(name, _kind(dtype)) for name, dtype in frame.schema.items()]).encode())
    with ThreadPoolExecutor(HASHERS) as pool:
        for block in pool.map(_block_digest, frame.iter_slices(ROWS_PER_BLOCK)):
            total.update(block)
    return total.hexdigest()


def _block_digest(block: pl.DataFrame) -> bytes:
    total = sha256()
    for column in block.iter_columns():
        for chunk in _canonical(column):
            total.update(chunk)
    return total.digest()


def _kind(dtype: Any) -> Any:
    """What a column holds, without the width of its numbers, as JSON."""
    if dtype.is_integer():
        return "integer"
    if dtype.is_float():
        return "float"
    if isinstance(dtype, pl.Datetime | pl.Duration):
        return [type(dtype).__name__, dtype.time_unit, getattr(dtype, "time_zone", None)]
    if isinstance(dtype, pl.List | pl.Array):
        return ["List", _kind(dtype.inner)]
    if isinstance(dtype, pl.Struct):
        return ["Struct", [(field.name, _kind(field.dtype)) for field in dtype.fields]]
    return "String" if isinstance(dtype, pl.Enum | pl.Categorical) else type(dtype).__name__


def _canonical(column: pl.Series) -> Iterator[bytes | memoryview]:
    """Rows, nulls and where they are; then the values that are there."""
    dtype, nulls = column.dtype, column.null_count()
    yield np.array([len(column), nulls], "<u8").data
    if nulls:
        yield np.packbits(column.is_null().to_numpy()).data
        column = column.drop_nulls()
    if isinstance(dtype, pl.List | pl.Array):
        column = column.cast(pl.List(dtype.inner))
        lengths = column.list.len()
        yield lengths.to_numpy().astype("<u8").data
        yield from _canonical(column.filter(lengths > 0).explode())
    elif isinstance(dtype, pl.Struct):
        for field in dtype.fields:
            yield from _canonical(column.struct.field(field.name))
    elif dtype.is_integer():
        yield from _integers(column)
    elif dtype.is_float():
        values = column.cast(pl.Float64).to_numpy()
        yield np.where(np.isnan(values), np.nan, values).astype("<f8", copy=False).data
    elif dtype.is_temporal():
        yield column.to_physical().cast(pl.Int64).to_numpy().astype("<i8", copy=False).data
    elif dtype == pl.Boolean:
        yield np.packbits(column.to_numpy()).data
    elif dtype != pl.Null:
        yield from _texts(column if dtype == pl.Binary else column.cast(pl.String))


def _integers(column: pl.Series) -> Iterator[bytes | memoryview]:
    """Eight bytes each; where one needs more, the decimal text of all."""
    narrow = column.cast(pl.Int64, strict=False)
    if narrow.null_count():
        yield b"wide"
        yield from _texts(column.cast(pl.String))
    else:
        yield narrow.to_numpy().astype("<i8", copy=False).data


def _texts(column: pl.Series) -> Iterator[bytes | memoryview]:
    """The length in bytes of every value, then all of them in one."""
    kind = pyarrow.large_binary() if column.dtype == pl.Binary else pyarrow.large_string()
    flat: Any = pyarrow.concat_arrays(pyarrow.chunked_array([column.to_arrow()]).cast(kind).chunks)
    _, offsets, content = flat.buffers()
    bounds = np.frombuffer(offsets, np.int64)[flat.offset : flat.offset + len(flat) + 1]
    yield np.diff(bounds).astype("<u8").data
    if content is not None:
        yield memoryview(content)[int(bounds[0]) : int(bounds[-1])]


class Tables:
    """Writes and reads whole tables; knows their names and digests only."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def publish(self, table: str, frame: pl.DataFrame, about: dict[str, Any]) -> Published:
        """Write `frame` (already in key order) with a manifest that also holds `about`; returns where it stands."""
        digest = content_digest(frame)
        write_id = f"{digest[:12]}-{uuid.uuid4().hex[:8]}"
        folder = f"tables/{table}/{write_id}"
        parts = []
        for number, piece in enumerate(frame.iter_slices(ROWS_PER_PART) if len(frame) else [frame]):
            name, content = f"part-{number:05d}.parquet", _parquet(piece)
            self.files.write(f"{folder}/{name}", content)
            parts.append({"name": name, "rows": len(piece), "bytes": len(content)})
        published = Published(table, write_id, digest, len(frame))
        schema = {name: str(dtype) for name, dtype in frame.schema.items()}
        manifest = {**asdict(published), "schema": schema, "parts": parts, **about}
        self.files.write(f"{folder}/manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
        return published

    def manifest(self, table: str, write_id: str) -> dict[str, Any] | None:
        """The manifest of a write, or None when the write is not whole."""
        name = f"tables/{table}/{write_id}/manifest.json"
        try:
            return json.loads(self.files.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{self.files.path(name)} is not JSON; {_REBUILD}") from error

    def whole(self, table: str, write_id: str) -> bool:
        """Whether the manifest and every part it lists are there, each of the size that was written."""
        manifest = self.manifest(table, write_id)
        return manifest is not None and all(
            self.files.size(f"tables/{table}/{write_id}/{part['name']}") == part["bytes"] for part in manifest["parts"]
        )

    def read(self, table: str, write_id: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The table in key order, whole or only these columns. Raises StoreError when some of it is gone or unreadable."""
        manifest = self.manifest(table, write_id)
        if manifest is None:
            raise StoreError(
                f"table {table} ({write_id}) is not in {self.files.url}; `mllmsrec run` makes it again from the replies."
            )
        names = [f"tables/{table}/{write_id}/{part['name']}" for part in manifest["parts"]]
        return pl.concat([self._part(name, columns) for name in names])

    def _part(self, name: str, columns: Sequence[str] | None) -> pl.DataFrame:
        try:
            part = pl.read_parquet(io.BytesIO(self.files.read(name)), columns=None if columns is None else [*columns])
            return part if columns is None else part.select(columns)
        except FileNotFoundError as error:
            raise StoreError(f"{self.files.path(name)} is gone; {_REBUILD}") from error
        except pl.exceptions.PolarsError as error:
            raise StoreError(f"{self.files.path(name)} cannot be read ({error}); {_REBUILD}") from error

    def writes(self) -> list[tuple[str, str]]:
        """(table, write id) of every write that left a file, whole or not, in order of name."""
        places = (name.split("/") for name in self.files.names("tables"))
        return sorted({(place[1], place[2]) for place in places if len(place) > 3})

    def remove(self, table: str, write_id: str) -> None:
        """Remove one write; nothing happens where there is none. The manifest goes first: a killed removal leaves no table."""
        for name in ("manifest.json", ""):
            self.files.remove(f"tables/{table}/{write_id}/{name}".rstrip("/"))


def _parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd")
    return buffer.getvalue()
