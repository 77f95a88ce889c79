"""Every answer ever given, append-only, and the questions they answer.

Parts lie below `replies/<kind>/<model>/` and are never changed; of two answers to one key the earliest success of the
newest generation holds. A passing failure never counts as known, a lasting one counts until a retry asks again. The
rendered questions lie below `asks/`, so that `why` can show them. Knows nothing of stages.
"""

from __future__ import annotations

import io
import json
import struct
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl

from mllmsrec_core.ask import Ask, Kind, Reply, kind, model_of, render
from storage.files import Files

SCHEMA = {
    "key": pl.Binary,
    "value": pl.Binary,
    "error": pl.String,
    "detail": pl.String,
    "passing": pl.Boolean,
    "tokens_in": pl.Int64,
    "tokens_out": pl.Int64,
    "seconds": pl.Float64,
    "engine": pl.String,
    "generation": pl.Int32,
    "at": pl.Datetime("us", "UTC"),
}
ASKS = {"key": pl.Binary, "ask": pl.String}


def encode(question: Kind, value: Any) -> bytes | None:
    """A Reply's value as bytes: UTF-8 text, float32 vectors, JSON for the rest."""
    if value is None:
        return None
    if question == "generate":
        return value.encode()
    if question == "embed":
        return struct.pack(f"<{len(value)}f", *value)
    return json.dumps(value, sort_keys=True).encode()


def decode(question: Kind, value: bytes | None) -> Any:
    """The inverse of `encode`, up to float32 for vectors."""
    if value is None:
        return None
    if question == "generate":
        return value.decode()
    if question == "embed":
        return list(struct.unpack(f"<{len(value) // 4}f", value))
    return json.loads(value)


@dataclass(frozen=True)
class Known:
    """The answers that hold for one kind and model, and where each key stands in them."""

    frame: pl.DataFrame
    index: dict[bytes, int]


def _folder(question: str, model: str) -> str:
    return f"replies/{question}/{model}"


def standing(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per key: the newest generation, successes before failures, the earliest first; passing failures left out."""
    return (
        frame.filter(~pl.col("passing"))
        .sort(-pl.col("generation"), pl.col("error").is_not_null(), "at")
        .unique("key", keep="first", maintain_order=True)
        .sort("key")
    )


class Replies:
    """Reads answers by key and appends new ones in buffered parts; `flush` makes everything added durable."""

    def __init__(self, files: Files, flush_rows: int = 500, flush_seconds: float = 5.0) -> None:
        self.files = files
        self.flush_rows, self.flush_seconds = flush_rows, flush_seconds
        self._known: dict[tuple[str, str], Known] = {}
        self._fresh: dict[bytes, Reply] = {}
        self._waiting: list[tuple[str, str, dict[str, Any], str]] = []
        self._flushed = time.monotonic()

    def get(self, ask: Ask, key: bytes, retry: frozenset[str] = frozenset()) -> Reply | None:
        """The answer that holds, or None when the question is open. Failures whose class is in `retry` count as open."""
        reply = self._fresh.get(key) or self._stored(kind(ask), model_of(ask), key)
        if reply is not None and reply.error is not None and (reply.passing or {reply.error, "all"} & retry):
            return None
        return reply

    def find(self, key: bytes) -> tuple[Kind, Reply] | None:
        """An answer by its key alone, wherever it lies (for `why` and `errors`)."""
        for folder in {"/".join(name.split("/")[1:3]) for name in self.files.names("replies", ".parquet")}:
            question, model = folder.split("/")
            if reply := self._stored(question, model, key):  # type: ignore[arg-type]
                return question, reply  # type: ignore[return-value]
        return None

    def question(self, key: bytes) -> dict[str, Any] | None:
        """The rendered Ask behind a key."""
        for name in self.files.names("asks", ".parquet"):
            hit = self._read(name).filter(pl.col("key") == key)
            if not hit.is_empty():
                return json.loads(hit["ask"][0])
        return None

    def add(self, ask: Ask, key: bytes, reply: Reply, generation: int = 0) -> None:
        """Buffer an answer; it is durable after the next flush, which happens by count, by time, or when asked."""
        question = kind(ask)
        row = {
            "key": key,
            "value": encode(question, reply.value),
            **{name: getattr(reply, name) for name in ("error", "detail", "passing", "tokens_in", "tokens_out")},
            "seconds": reply.seconds,
            "engine": reply.engine,
            "generation": generation,
            "at": datetime.now(UTC),
        }
        self._waiting.append((question, model_of(ask), row, render(ask)))
        self._fresh[key] = reply
        if len(self._waiting) >= self.flush_rows:
            self.flush()

    def flush_if_old(self) -> None:
        """Flush when the oldest buffered answer has waited `flush_seconds`."""
        if self._waiting and time.monotonic() - self._flushed >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the buffered questions, then their answers. A failed write keeps the buffer."""
        waiting = self._waiting
        groups: dict[tuple[str, str], list[tuple[dict[str, Any], str]]] = {}
        for question, model, row, text in waiting:
            groups.setdefault((question, model), []).append((row, text))
        for (question, model), rows in groups.items():
            part = f"part-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}.parquet"
            asks = pl.DataFrame([{"key": row["key"], "ask": text} for row, text in rows], schema=ASKS)
            self._write(f"asks/{question}/{part}", asks)
            self._write(f"{_folder(question, model)}/{part}", pl.DataFrame([row for row, _ in rows], schema=SCHEMA))
        self._waiting = []
        self._flushed = time.monotonic()

    def compact(self, most_parts: int = 8) -> int:
        """Merge folders of more than `most_parts` parts into one part each; returns how many parts went away."""
        folders: dict[str, list[str]] = {}
        for name in self.files.names("replies", ".parquet") + self.files.names("asks", ".parquet"):
            folders.setdefault(name.rsplit("/", 1)[0], []).append(name)
        return sum(self._merge(folder, names) for folder, names in folders.items() if len(names) > most_parts)

    def _merge(self, folder: str, names: list[str]) -> int:
        """The merged part is whole before the first old one goes; a crash between leaves duplicates, which readers ignore."""
        frame = pl.concat([self._read(name) for name in names]).unique(maintain_order=True).sort("key")
        self._write(f"{folder}/part-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}.parquet", frame)
        for name in names:
            self.files.remove(name)
        return len(names) - 1

    def _stored(self, question: Kind, model: str, key: bytes) -> Reply | None:
        known = self._known.get((question, model)) or self._load(question, model)
        position = known.index.get(key)
        if position is None:
            return None
        row = known.frame.row(position, named=True)
        fields = ("error", "detail", "passing", "tokens_in", "tokens_out", "seconds", "engine")
        return Reply(decode(question, row["value"]), **{name: row[name] for name in fields})

    def _load(self, question: str, model: str) -> Known:
        frame = standing(self._concat(self.files.names(_folder(question, model), ".parquet")))
        known = Known(frame, {key: position for position, key in enumerate(frame["key"])})
        self._known[question, model] = known
        return known

    def _concat(self, names: Iterable[str]) -> pl.DataFrame:
        return pl.concat([pl.DataFrame(schema=SCHEMA), *(self._read(name) for name in names)])

    def _read(self, name: str) -> pl.DataFrame:
        return pl.read_parquet(io.BytesIO(self.files.read(name)))

    def _write(self, name: str, frame: pl.DataFrame) -> None:
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd")
        self.files.write(name, buffer.getvalue())
