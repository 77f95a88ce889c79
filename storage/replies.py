"""Every answer ever given, append-only, the questions they answer, and whom those were about.

On shelves below `replies/<kind>/<model>/`, `asks/<kind>/` and `subjects/`; only `remove` takes rows away. Of two answers to
one key the earliest success of the newest generation holds. A passing failure never counts as known, a lasting one
counts until a retry asks again, and a correction is read before either. Knows nothing of stages.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol, get_args

import polars as pl

from mllmsrec_core.ask import Ask, Kind, Reply, kind, model_of, render
from storage.corrections import Correction
from storage.files import Files
from storage.shelf import Cache, Shelf

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
SUBJECTS = {"key": pl.Binary, "subject": pl.Binary}
DEPTH = {"replies": 3, "asks": 2, "subjects": 1}  # names in the path of a shelf
SUBJECT_ROWS = 20_000  # a part of 600 kB
PAIRS_REMEMBERED = 500_000  # some 100 MB; a pair met again after so many others is written twice, and merged away later
EPOCH, MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)


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


class Corrections(Protocol):
    """What overrules answers: the newest decision about a key, and how often its question was opened again."""

    def all(self) -> pl.DataFrame:
        """Every decision, with its `key`."""
        ...

    def of(self, key: bytes) -> Correction | None:
        """The newest decision about a key."""
        ...

    def generation(self, key: bytes) -> int:
        """How often the question was opened again; 0 for most."""
        ...


class Row(NamedTuple):
    """One answer as it lies on a shelf: the columns of SCHEMA."""

    key: bytes
    value: bytes | None
    error: str | None
    detail: str | None
    passing: bool
    tokens_in: int
    tokens_out: int
    seconds: float
    engine: str
    generation: int
    at: datetime

    def reply(self, question: Kind) -> Reply:
        """The answer as its asker reads it."""
        rest = (self.error, self.detail, self.tokens_in, self.tokens_out, self.seconds, self.engine, self.passing)
        return Reply(decode(question, self.value), *rest)  # type: ignore[arg-type]


def standing(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per key: of the newest generation the earliest success, else the latest failure; passing ones left out."""
    failed = pl.col("error").is_not_null()
    at = pl.col("at").to_physical()
    order = (-pl.col("generation"), failed, pl.when(failed).then(-at).otherwise(at), "value", "error", "detail")
    return frame.filter(~pl.col("passing")).sort(order).unique("key", keep="first", maintain_order=True).sort("key")


def holding(rows: list[Row]) -> Row | None:
    """`standing` for the rows of one key, in no order."""
    lasting = [row for row in rows if not row.passing]
    return lasting[0] if len(lasting) == 1 else min(lasting, key=_order, default=None)


def _order(row: Row) -> tuple[Any, ...]:
    at, failed = (row.at - EPOCH) // MICROSECOND, row.error is not None
    ties = ((text is not None, text or type(empty)()) for text, empty in zip(row[1:4], (b"", "", ""), strict=True))
    return -row.generation, failed, -at if failed else at, *ties


def _told(rows: list[Row]) -> Row | None:
    """What can be shown of a key: the answer that holds, else the latest failure that passes."""
    return holding(rows) or max(rows, key=lambda row: row.at, default=None)


def _folder(question: str, model: str) -> str:
    return f"replies/{question}/{model}"


def _root(folder: str) -> str:
    return folder.split("/", 1)[0]


def _kind(folder: str) -> Kind:
    return folder.split("/")[1]  # type: ignore[return-value]


class Replies:
    """Reads answers by key and appends new ones in buffered parts; `flush` makes everything added durable."""

    def __init__(
        self, files: Files, flush_rows: int = 2_000, flush_seconds: float = 5.0, corrections: Corrections | None = None
    ) -> None:
        self.files, self.corrections = files, corrections
        self.flush_rows, self.flush_seconds = flush_rows, flush_seconds
        self._cache = Cache()
        self._shelves: dict[str, Shelf] = {}  # by folder, those used so far
        self._waiting: list[tuple[str, str, Row, str]] = []
        self._fresh: dict[bytes, list[tuple[str, Row]]] = {}  # the same by key: folder and row
        self._pairs: list[bytes] = []  # of key and subject, waiting
        self._seen: set[bytes] = set()  # pairs this process has taken
        self._waits_since = 0.0  # when the oldest of what waits was added

    def get(self, ask: Ask, key: bytes, retry: frozenset[str] = frozenset()) -> Reply | None:
        """The answer that holds, or None when the question is open. Failures whose class is in `retry` count as open."""
        correction = self.corrections.of(key) if self.corrections else None
        if correction and (ruled := _ruled(correction)):
            return ruled
        question = kind(ask)
        row = holding(self._rows(_folder(question, model_of(ask)), key))
        if row is None or (correction and row.generation < self._generation(key)):
            return None
        return None if row.error is not None and {row.error, "all"} & retry else row.reply(question)

    def find(self, key: bytes) -> tuple[Kind, Reply] | None:
        """An answer by its key alone, wherever it lies (for `why` and `errors`); also one that is to be asked again."""
        found = self.given(key)
        return found and (found[0], self._overruled(key) or found[1])

    def given(self, key: bytes) -> tuple[Kind, Reply] | None:
        """`find` without corrections: what the model said."""
        opened = [folder for folder in self._shelves if folder.startswith("replies/")]
        return self._first(opened, key) or self._first((f for f in self._folders("replies") if f not in opened), key)

    def question(self, key: bytes) -> dict[str, Any] | None:
        """The rendered Ask behind a key."""
        return self.questions([key]).get(key)

    def questions(self, keys: Iterable[bytes]) -> dict[bytes, dict[str, Any]]:
        """The rendered Asks behind the keys, of those that are in the store; each part is read once."""
        left, found = set(keys), dict[bytes, dict[str, Any]]()
        for question in get_args(Kind):
            shelf = self._shelf(f"asks/{question}")
            shelf.look()
            for piece in shelf.lookups(_series(left)):
                found |= {key: json.loads(text) for key, text in piece.iter_rows()}
            left -= found.keys()
        return found

    def replies(self, keys: Iterable[bytes]) -> dict[bytes, tuple[Kind, Reply]]:
        """`find` for many keys, of those that were ever answered; each part is read once."""
        left, found = set(keys), dict[bytes, tuple[Kind, Reply]]()
        for folder in self._folders("replies"):
            rows: dict[bytes, list[Row]] = {}
            for piece in self._shelf(folder).lookups(_series(left)):
                for values in piece.iter_rows():
                    rows.setdefault(values[0], []).append(Row._make(values))
            for key in left & self._fresh.keys():
                rows.setdefault(key, []).extend(row for place, row in self._fresh[key] if place == folder)
            for key, some in rows.items():
                if row := _told(some):
                    found[key] = (_kind(folder), self._overruled(key) or row.reply(_kind(folder)))
            left -= found.keys()
        return found

    def known(self, question: Kind, model: str, keys: pl.Series) -> pl.Series:
        """For each key of a column whether its question is closed: by a success, a lasting failure or a correction.

        `model` is the name of `model_of`. In the order of `keys`; memory grows with their number, not with the store's.
        """
        folder = _folder(question, model)
        columns = ["key", "generation", "passing"]
        fresh = [row for rows in self._fresh.values() for place, row in rows if place == folder]
        waiting = pl.DataFrame(fresh, SCHEMA, orient="row").select(columns)
        ruled = self._corrected(keys)
        closed = []
        for piece in (waiting, *self._shelf(folder).lookups(keys, columns)):
            lasting = piece.filter(~pl.col("passing"))
            closed.append(lasting.select("key"))
            touched = lasting.filter(pl.col("key").is_in(_series(ruled).implode())) if ruled else lasting.clear()
            for key, generation, _ in touched.iter_rows():
                ruled[key] = ruled[key] or generation >= self._generation(key)
        held = pl.concat(closed).to_series().unique()
        if ruled:
            held = held.filter(~held.is_in(_series(ruled).implode()))
            held = pl.concat([held, _series(key for key, is_closed in ruled.items() if is_closed)])
        return keys.is_in(held.implode())

    def add(self, ask: Ask, key: bytes, reply: Reply) -> Reply:
        """Buffer an answer; it is durable after the next flush, which happens by count, by time, or when asked.

        Returns the answer as it will be read back (vectors in float32), so that a run and its repetition see the same.
        """
        question, model = kind(ask), model_of(ask)
        row = Row(
            key,
            encode(question, reply.value),
            *(reply.error, reply.detail, reply.passing, reply.tokens_in, reply.tokens_out, reply.seconds, reply.engine),
            self._generation(key),
            datetime.now(UTC),
        )
        self._starts_to_wait()
        self._waiting.append((question, model, row, render(ask)))
        self._fresh.setdefault(key, []).append((_folder(question, model), row))
        if len(self._waiting) >= self.flush_rows:
            self.flush()
        return row.reply(question)

    def used(self, key: bytes, subjects: Iterable[bytes]) -> None:
        """Note, for the next flush, whom (16 bytes each) a question is about; what was noted before costs nothing."""
        for subject in subjects:
            pair = key + subject
            if pair not in self._seen:
                self._starts_to_wait()
                self._seen.add(pair)
                self._pairs.append(pair)
        if len(self._pairs) >= SUBJECT_ROWS:
            self.flush()

    def flush_if_old(self) -> None:
        """Flush when the oldest of what is buffered has waited `flush_seconds`."""
        if (self._waiting or self._pairs) and time.monotonic() - self._waits_since >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered: whom the questions are about, the questions, their answers. A failed write keeps it."""
        self._flush_subjects()
        groups: dict[tuple[str, str], list[tuple[Row, str]]] = {}
        for question, model, row, text in self._waiting:
            groups.setdefault((question, model), []).append((row, text))
        for (question, model), rows in groups.items():
            asks = pl.DataFrame([(row.key, text) for row, text in rows], ASKS, orient="row")
            self._shelf(f"asks/{question}").append(asks)
            self._shelf(_folder(question, model)).append(pl.DataFrame([row for row, _ in rows], SCHEMA, orient="row"))
        self._waiting, self._fresh = [], {}
        for shelf in self._shelves.values():
            if shelf.due:
                shelf.compact()

    def refresh(self) -> None:
        """See what other processes have answered since; one listing per kind and model asked about so far."""
        for folder, shelf in self._shelves.items():
            if folder.startswith("replies/"):
                shelf.refresh()

    def compact(self, most_parts: int = 8) -> int:
        """Merge small parts wherever more than `most_parts` have gathered; returns how many parts were taken away."""
        self.flush()
        shelves = (self._shelves.get(folder) or self._new_shelf(folder) for folder in self._folders())
        return sum(shelf.compact(most_parts) for shelf in shelves)

    def remove(self, keys: Iterable[bytes]) -> dict[str, int]:
        """Take answers, questions and subjects of the keys away; rows gone from `replies`, `asks` and `subjects`.

        Nobody else may write meanwhile.
        """
        self.flush()
        keys, gone = list(keys), {root: 0 for root in DEPTH}
        for folder in self._folders():
            gone[_root(folder)] += self._shelf(folder).remove(keys)
        self._seen.clear()
        return gone

    def remove_subjects(self, subjects: Iterable[bytes]) -> int:
        """Take subjects out of `subjects/`, whatever they were noted for; returns how many rows went."""
        self.flush()
        self._seen.clear()
        return self._shelf("subjects").remove_where(pl.col("subject").is_in(list(subjects)))

    def keys_of(self, subject: bytes) -> list[bytes]:
        """Every question about a subject, sorted; reads all of `subjects/`."""
        self.flush()
        about = (piece.filter(pl.col("subject") == subject)["key"] for piece in self._shelf("subjects").pieces())
        return sorted({key for keys in about for key in keys})

    def shared(self, keys: Iterable[bytes], subject: bytes) -> set[bytes]:
        """Those of the keys that were used for another subject, too."""
        self.flush()
        shelf = self._shelf("subjects")
        shelf.look()
        others = (piece.filter(pl.col("subject") != subject)["key"] for piece in shelf.lookups(_series(keys)))
        return {key for keys in others for key in keys}

    def scan(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """Every durable row of answers, questions and subjects, in pieces with the folder each lies below."""
        for folder in self._folders():
            yield from ((folder, piece) for piece in self._shelf(folder).pieces())

    def _rows(self, folder: str, key: bytes) -> list[Row]:
        rows = [Row._make(values) for values in self._shelf(folder).rows(key)]
        return rows + [row for place, row in self._fresh[key] if place == folder] if key in self._fresh else rows

    def _first(self, folders: Iterable[str], key: bytes) -> tuple[Kind, Reply] | None:
        for folder in folders:
            if row := _told(self._rows(folder, key)):
                return _kind(folder), row.reply(_kind(folder))
        return None

    def _generation(self, key: bytes) -> int:
        return self.corrections.generation(key) if self.corrections else 0

    def _overruled(self, key: bytes) -> Reply | None:
        correction = self.corrections.of(key) if self.corrections else None
        return _ruled(correction) if correction else None

    def _corrected(self, keys: pl.Series) -> dict[bytes, bool]:
        """Those of the keys that were corrected, and whether the correction itself answers."""
        if not self.corrections:
            return {}
        corrected = self.corrections.all()["key"].unique()
        corrected = corrected.filter(corrected.is_in(keys.implode()))
        return {key: self._overruled(key) is not None for key in corrected}

    def _flush_subjects(self) -> None:
        if self._pairs:
            rows = [(pair[:32], pair[32:]) for pair in self._pairs]
            self._shelf("subjects").append(pl.DataFrame(rows, SUBJECTS, orient="row"))
            self._pairs = []
        if len(self._seen) > PAIRS_REMEMBERED:
            self._seen.clear()

    def _starts_to_wait(self) -> None:
        if not self._waiting and not self._pairs:
            self._waits_since = time.monotonic()

    def _shelf(self, folder: str) -> Shelf:
        if folder not in self._shelves:
            self._shelves[folder] = self._new_shelf(folder)
        return self._shelves[folder]

    def _new_shelf(self, folder: str) -> Shelf:
        schema = {"replies": SCHEMA, "asks": ASKS, "subjects": SUBJECTS}[_root(folder)]
        shelf = Shelf(self.files, folder, schema, self._cache)
        # Level 0 is merged in memory, and read in no order: rows that are long are spread earlier.
        if _root(folder) == "asks":
            shelf.spill_rows //= 4  # prompts are some times as long as answers
        elif folder.startswith("replies/embed/"):
            shelf.spill_rows //= 8  # some kB each
        return shelf

    def _folders(self, *roots: str) -> list[str]:
        """The folders of every shelf on disk, and of what was only added here; by default below all three roots."""
        folders = {folder for rows in self._fresh.values() for folder, _ in rows if "replies" in roots}
        for root in roots or DEPTH:
            folders |= {"/".join(name.split("/")[: DEPTH[root]]) for name in self.files.names(root, ".parquet")}
        return sorted(folders)


def _ruled(correction: Correction) -> Reply | None:
    """The answer a correction gives itself; None where it opens the question again."""
    if correction.action == "replace":
        return Reply(correction.text, engine="correction")
    return Reply(error="banned", detail=correction.reason) if correction.action == "ban" else None


def _series(keys: Iterable[bytes]) -> pl.Series:
    return pl.Series("key", list(keys), pl.Binary)
