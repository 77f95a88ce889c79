"""Published tables: Parquet parts, then a manifest, then whoever points at them.

A table is written once below `tables/<table>/<write-id>/` and never changed; readers open only the parts its manifest
lists, and a write without a manifest does not exist. The digest covers the logical values in key order, without
provenance columns, so that equal content has an equal digest however it was made.
"""

from __future__ import annotations

import io
import json
import uuid
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import polars as pl

from mllmsrec_core.errors import StoreError
from storage.files import Files

PROVENANCE = ("ask",)  # says where a row came from, not what it says
ROWS_PER_PART = 250_000  # about 30 MB of zstd for rows of one sentence
_REBUILD = "remove its folder, and `mllmsrec run` makes the table again from the replies, without a model."


@dataclass(frozen=True)
class Published:
    """A pointer to one write of one table."""

    table: str
    write_id: str
    digest: str
    rows: int


def content_digest(frame: pl.DataFrame) -> str:
    """A sha256 over column names and logical values, in the frame's row order; the width of a number is not a value."""
    frame = frame.drop(PROVENANCE, strict=False)
    logical = frame.select(_written(name, dtype) for name, dtype in frame.schema.items())
    total = sha256(json.dumps(logical.columns).encode())
    for piece in logical.iter_slices(100_000):
        buffer = io.BytesIO()
        piece.write_ndjson(buffer)
        total.update(buffer.getbuffer())
    return total.hexdigest()


def _written(name: str, dtype: pl.DataType) -> pl.Expr:
    """A column as JSON can hold it without loss: bytes as hex, floats as text (JSON knows neither NaN nor infinity)."""
    return pl.col(name).bin.encode("hex") if dtype == pl.Binary else pl.col(name).cast(_textual(dtype))


def _textual(dtype: Any) -> Any:
    if isinstance(dtype, pl.List | pl.Array):
        return pl.List(_textual(dtype.inner))
    if isinstance(dtype, pl.Struct):
        return pl.Struct({field.name: _textual(field.dtype) for field in dtype.fields})
    return pl.String if dtype.is_float() else dtype


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
            buffer = io.BytesIO()
            piece.write_parquet(buffer, compression="zstd")
            name = f"part-{number:05d}.parquet"
            self.files.write(f"{folder}/{name}", buffer.getvalue())
            parts.append({"name": name, "rows": len(piece), "bytes": len(buffer.getvalue())})
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

    def read(self, table: str, write_id: str) -> pl.DataFrame:
        """The whole table in key order. Raises StoreError when part of it is gone or cannot be read."""
        manifest = self.manifest(table, write_id)
        if manifest is None:
            raise StoreError(
                f"table {table} ({write_id}) is not in {self.files.url}; `mllmsrec run` makes it again from the replies."
            )
        return pl.concat([self._part(f"tables/{table}/{write_id}/{part['name']}") for part in manifest["parts"]])

    def _part(self, name: str) -> pl.DataFrame:
        try:
            return pl.read_parquet(io.BytesIO(self.files.read(name)))
        except FileNotFoundError as error:
            raise StoreError(f"{self.files.path(name)} is gone; {_REBUILD}") from error
        except pl.exceptions.PolarsError as error:
            raise StoreError(f"{self.files.path(name)} cannot be read ({error}); {_REBUILD}") from error
