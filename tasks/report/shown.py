"""What an environment shows, for whoever reads it: stage records, their tables, and small pictures.

A stage that has not run, or whose table is gone, is None here and a sentence in the report. Knows nothing of HTML.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import polars as pl

from mllmsrec_core.errors import ImageRefused, ImageUnreadable, StoreError, UsageError, nearest
from mllmsrec_core.protocol import by_hash
from storage.store import Store
from tasks.engines.pictures import decode

THUMBNAIL = 112  # pixels of the longer side: sharp at the 96 CSS pixels of the page, some 3 KB as JPEG
MAX_THUMBNAILS = 400  # with 3 to 6 KB each the page stays below 3 MB
DECODE_PIXELS = 250_000  # a thumbnail needs no more; large pictures are scaled down at once


class Shown:
    """One environment as it stands; every table is read at most once."""

    def __init__(self, store: Store, env: str) -> None:
        state = store.envs.current(env)
        if not state["stages"]:
            hint = nearest(env, store.envs.names()) if store.envs.names() else "nothing is published yet"
            raise UsageError(f"the store at {store.url} has no environment `{env}`; {hint} Make one with: mllmsrec run")
        self.store, self.env, self.seq, self.at = store, env, state["seq"], state["at"]
        self.stages: dict[str, dict[str, Any]] = state["stages"]
        self.pointers = {table: p for record in self.stages.values() for table, p in record["tables"].items()}
        self.lost: list[str] = []
        self._tables: dict[str, pl.DataFrame | None] = {}

    def table(self, name: str) -> pl.DataFrame | None:
        """The published table, or None where no stage made it or its files are gone."""
        if name not in self._tables:
            self._tables[name] = self._read(name) if name in self.pointers else None
        return self._tables[name]

    def tables(self, *names: str) -> list[pl.DataFrame] | None:
        """All of `names`, or None when one of them is not there."""
        found = [self.table(name) for name in names]
        return None if any(frame is None for frame in found) else [frame for frame in found if frame is not None]

    def params(self, stage: str) -> dict[str, Any]:
        """The parameters the stage ran with; empty when it has not run."""
        return self.stages[stage]["parts"]["params"][stage] if stage in self.stages else {}

    def stale(self) -> list[str]:
        """Stages whose tables were made of older versions of what stands upstream now."""
        return [
            name
            for name, record in self.stages.items()
            for table, digest in record["parts"].get("inputs", {}).items()
            if table in self.pointers and self.pointers[table]["digest"] != digest
        ]

    def _read(self, name: str) -> pl.DataFrame | None:
        try:
            return self.store.tables.read(name, self.pointers[name]["write_id"])
        except StoreError:
            self.lost.append(name)
            return None


class Thumbnails:
    """Small JPEGs as data URIs, each made once; None where the picture is not in the store or cannot be read."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._made: dict[str, str | None] = {}

    def __call__(self, sha256: str | None) -> str | None:
        if not sha256 or (sha256 not in self._made and len(self._made) >= MAX_THUMBNAILS):
            return None
        if sha256 not in self._made:
            self._made[sha256] = self._make(sha256)
        return self._made[sha256]

    def _make(self, sha256: str) -> str | None:
        try:
            picture = decode(self.store.blobs.get(sha256), DECODE_PIXELS)
        except (StoreError, ImageUnreadable, ImageRefused):
            return None
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=82, optimize=True)
        return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def few(frame: pl.DataFrame, key: str, n: int) -> pl.DataFrame:
    """`n` rows by a hash of `key`: the same ones at every run, chosen by nobody."""
    return by_hash(frame, (key,)).head(n)


def of(value: str, column: str, frame: pl.DataFrame) -> pl.DataFrame:
    """The rows whose `column` is `value`."""
    return frame.filter(pl.col(column) == value)


def first(frame: pl.DataFrame) -> dict[str, Any]:
    """The first row, or an empty one."""
    return frame.row(0, named=True) if len(frame) else {}


def lookup(frame: pl.DataFrame | None, key: str, wanted: Iterable[str], *columns: str) -> dict[str, dict[str, Any]]:
    """key -> row of `columns`, for the wanted keys that are there."""
    if frame is None:
        return {}
    found = frame.filter(pl.col(key).is_in(list(wanted))).select(key, *columns)
    return {row[key]: row for row in found.iter_rows(named=True)}


def read_by(step: dict[str, Any], liked: pl.DataFrame) -> pl.Series:
    """The items a preference step read, oldest first: the last `n_items` liked ones up to its `upto_seq`."""
    return liked.filter(pl.col("seq") <= step["upto_seq"]).sort("seq").tail(step["n_items"])["item_id"]
