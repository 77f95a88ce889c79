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
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import polars as pl

from mllmsrec_core.ask import Ask, Kind, Reply, kind, model_of, render
from mllmsrec_core.errors import StoreError
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
READS = 5  # a compaction may take parts away between listing and reading; it cannot do so for ever


def encode(question: Kind, value: Any) -> bytes | None:
    """A Reply's value as bytes: UTF-8 text, float32 vectors, JSON for the rest."""
    if value is None:
        return None
    if question == "generate":
        return value.encode(errors="replace")  # an endpoint's JSON may hold half a surrogate pair
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


@dataclass(frozen=True)
class Held:
    """An answer as it reads back from disk, with what decides whether it holds."""

    question: Kind
    generation: int
    reply: Reply

    def over(self, other: Held | None) -> bool:
        """Whether this answer, the later one, holds over `other`: `standing` for two rows."""
        if other is None or other.reply.passing:
            return True
        if self.reply.passing or self.generation < other.generation:
            return False
        return self.generation > other.generation or other.reply.error is not None


def _folder(question: str, model: str) -> str:
    return f"replies/{question}/{model}"


def standing(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per key: of the newest generation the earliest success, else the latest failure; passing ones left out."""
    failed = pl.col("error").is_not_null()
    at = pl.col("at").to_physical()
    order = (-pl.col("generation"), failed, pl.when(failed).then(-at).otherwise(at), "value", "error", "detail")
    return frame.filter(~pl.col("passing")).sort(order).unique("key", keep="first", maintain_order=True).sort("key")


class Replies:
    """Reads answers by key and appends new ones in buffered parts; `flush` makes everything added durable."""

    def __init__(self, files: Files, flush_rows: int = 500, flush_seconds: float = 5.0) -> None:
        self.files = files
        self.flush_rows, self.flush_seconds = flush_rows, flush_seconds
        self._known: dict[tuple[str, str], Known] = {}  # as of the first look at a folder
        self._fresh: dict[bytes, Held] = {}  # added here since
        self._waiting: list[tuple[str, str, dict[str, Any], str]] = []
        self._waits_since = 0.0  # when the oldest of those was added

    def get(self, ask: Ask, key: bytes, retry: frozenset[str] = frozenset()) -> Reply | None:
        """The answer that holds, or None when the question is open. Failures whose class is in `retry` count as open."""
        held = self._held(kind(ask), model_of(ask), key)
        if held is None or held.reply.passing:
            return None
        return None if held.reply.error is not None and {held.reply.error, "all"} & retry else held.reply

    def find(self, key: bytes) -> tuple[Kind, Reply] | None:
        """An answer by its key alone, wherever it lies (for `why` and `errors`)."""
        looked_at = list(self._known)
        held = self._fresh.get(key) or self._first(looked_at, key)
        if held is None:
            parts = (name.split("/") for name in self.files.names("replies", ".parquet"))
            folders = dict.fromkeys((question, model) for _, question, model, _ in parts)
            held = self._first([folder for folder in folders if folder not in looked_at], key)
        return held and (held.question, held.reply)

    def question(self, key: bytes) -> dict[str, Any] | None:
        """The rendered Ask behind a key."""
        for part in self._parts("asks", ASKS):
            hit = part.filter(pl.col("key") == key)
            if not hit.is_empty():
                return json.loads(hit["ask"][0])
        return None

    def add(self, ask: Ask, key: bytes, reply: Reply, generation: int = 0) -> Reply:
        """Buffer an answer; it is durable after the next flush, which happens by count, by time, or when asked.

        Returns the answer as it will be read back (vectors in float32), so that a run and its repetition see the same.
        """
        question = kind(ask)
        value = encode(question, reply.value)
        held = Held(question, generation, replace(reply, value=decode(question, value)))
        row = {
            "key": key,
            "value": value,
            **{name: getattr(reply, name) for name in ("error", "detail", "passing", "tokens_in", "tokens_out")},
            "seconds": reply.seconds,
            "engine": reply.engine,
            "generation": generation,
            "at": datetime.now(UTC),
        }
        if not self._waiting:
            self._waits_since = time.monotonic()
        self._waiting.append((question, model_of(ask), row, render(ask)))
        if held.over(self._held(question, model_of(ask), key)):
            self._fresh[key] = held
        if len(self._waiting) >= self.flush_rows:
            self.flush()
        return held.reply

    def flush_if_old(self) -> None:
        """Flush when the oldest buffered answer has waited `flush_seconds`."""
        if self._waiting and time.monotonic() - self._waits_since >= self.flush_seconds:
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

    def compact(self, most_parts: int = 8) -> int:
        """Merge folders of more than `most_parts` parts into one part each; returns how many parts went away.

        What was read so far is forgotten with it: the next question reads it again, and a long run stays small.
        """
        self.flush()
        self._known, self._fresh = {}, {}
        folders: dict[str, list[str]] = {}
        for name in self.files.names("replies", ".parquet") + self.files.names("asks", ".parquet"):
            folders.setdefault(name.rsplit("/", 1)[0], []).append(name)
        return sum(self._merge(folder, names) for folder, names in folders.items() if len(names) > most_parts)

    def _merge(self, folder: str, names: list[str]) -> int:
        """The merged part is whole before the first old one goes; a crash between leaves duplicates, which readers ignore."""
        schema = ASKS if folder.startswith("asks/") else SCHEMA
        try:
            frame = pl.concat([self._read(name, schema) for name in names]).unique(maintain_order=True).sort("key")
        except FileNotFoundError:  # another process is merging the same folder
            return 0
        self._write(f"{folder}/part-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}.parquet", frame)
        for name in names:
            self.files.remove(name)
        return len(names) - 1

    def _held(self, question: Kind, model: str, key: bytes) -> Held | None:
        return self._fresh.get(key) or self._stored(question, model, key)

    def _first(self, folders: list[tuple[str, str]], key: bytes) -> Held | None:
        found = (self._stored(question, model, key) for question, model in folders)  # type: ignore[arg-type]
        return next((held for held in found if held), None)

    def _stored(self, question: Kind, model: str, key: bytes) -> Held | None:
        known = self._known.get((question, model)) or self._load(question, model)
        position = known.index.get(key)
        if position is None:
            return None
        row = known.frame.row(position, named=True)
        fields = ("error", "detail", "passing", "tokens_in", "tokens_out", "seconds", "engine")
        reply = Reply(decode(question, row["value"]), **{name: row[name] for name in fields})
        return Held(question, row["generation"], reply)

    def _load(self, question: str, model: str) -> Known:
        frame = standing(pl.concat([pl.DataFrame(schema=SCHEMA), *self._parts(_folder(question, model), SCHEMA)]))
        known = Known(frame, {key: position for position, key in enumerate(frame["key"])})
        self._known[question, model] = known
        return known

    def _parts(self, folder: str, schema: dict[str, Any]) -> list[pl.DataFrame]:
        """Every part below `folder`. One that a compaction took away has its rows in another: then all are listed again."""
        for left in reversed(range(READS)):
            try:
                return [self._read(name, schema) for name in self.files.names(folder, ".parquet")]
            except FileNotFoundError:
                if not left:
                    raise
        return []

    def _read(self, name: str, schema: dict[str, Any]) -> pl.DataFrame:
        content = io.BytesIO(self.files.read(name))
        try:
            return pl.read_parquet(content).select(pl.col(column).cast(dtype) for column, dtype in schema.items())
        except pl.exceptions.PolarsError as error:
            raise StoreError(
                f"{self.files.path(name)} cannot be read ({error}); it was damaged or written by hand. Bring it back from "
                "a copy, or move it away: what only it held is then asked again."
            ) from error

    def _write(self, name: str, frame: pl.DataFrame) -> None:
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd")
        self.files.write(name, buffer.getvalue())
