"""What somebody decided about an answer: replaced by other words, banned, or asked again.

Append-only parts below `corrections/`, read before the replies; the newest entry about a key holds. An entry also names
the stage whose question it is about, so that the stage becomes due. Knows nothing of what a question says.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Literal

import polars as pl

from mllmsrec_core.ask import canonical
from mllmsrec_core.errors import StoreError
from storage.files import Files

SCHEMA = {
    "key": pl.Binary,
    "stage": pl.String,
    "action": pl.String,
    "text": pl.String,
    "by": pl.String,
    "at": pl.Datetime("us", "UTC"),
    "reason": pl.String,
}

Action = Literal["replace", "ban", "reask"]


@dataclass(frozen=True)
class Correction:
    """One decision: `replace` gives the answer's new `text`, `ban` takes it away, `reask` opens its question again."""

    action: Action
    text: str | None
    by: str
    at: datetime
    reason: str


class Corrections:
    """Reads all parts at the first question about them; `refresh` makes the next question read them again."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._frame: pl.DataFrame | None = None
        self._rows: dict[bytes, list[int]] = {}  # of each key its rows in `_frame`, oldest first

    def write(self, entries: Iterable[tuple[bytes, str, Correction]]) -> int:
        """Keep (key, stage, correction) entries, all of them or none; returns how many."""
        frame = _frame({"key": key, "stage": stage, **asdict(made)} for key, stage, made in entries)
        if len(frame):
            self._write(frame)
            self.refresh()
        return len(frame)

    def all(self) -> pl.DataFrame:
        """Every entry with the columns of SCHEMA, oldest first."""
        if self._frame is None:
            parts = [self._read(name) for name in self._names()]
            frame = pl.concat([_frame(()), *parts]).unique().sort("at", "key", *list(SCHEMA)[1:])
            rows: dict[bytes, list[int]] = {}
            for number, key in enumerate(frame["key"]):
                rows.setdefault(key, []).append(number)
            self._frame, self._rows = frame, rows
        return self._frame

    def history(self, key: bytes) -> list[Correction]:
        """Every correction of a key, oldest first."""
        frame = self.all()
        return [_correction(frame.row(number, named=True)) for number in self._rows.get(key, ())]

    def of(self, key: bytes) -> Correction | None:
        """The correction of a key that holds, the newest."""
        frame = self.all()
        rows = self._rows.get(key)
        return _correction(frame.row(rows[-1], named=True)) if rows else None

    def generation(self, key: bytes) -> int:
        """How often the question was opened again: an answer counts when it was given for this generation."""
        frame = self.all()
        return sum(frame["action"][number] == "reask" for number in self._rows.get(key, ()))

    def keys(self, stage: str) -> set[bytes]:
        """The keys of the stage's corrected questions."""
        return set(self._of_stage(stage)["key"])

    def since(self, stage: str, at: datetime) -> set[bytes]:
        """The keys of the stage's questions that were corrected after `at`."""
        return set(self._of_stage(stage).filter(pl.col("at") > at)["key"])

    def digest(self, stage: str) -> str | None:
        """A sha256 over all that the stage's corrections change, whoever made them; None where there are none."""
        rows = self._of_stage(stage).select(pl.col("key").bin.encode("hex"), "action", "text", "at", "reason")
        if rows.is_empty():
            return None
        return sha256(canonical([[str(value) for value in row] for row in rows.iter_rows()]).encode()).hexdigest()

    def remove(self, keys: Iterable[bytes]) -> int:
        """Take every entry about these keys away; returns how many went. Nobody else may write meanwhile."""
        gone = pl.Series(list(keys), dtype=pl.Binary).implode()
        before = len(self.all())
        self.rewrite(lambda part: part.filter(~pl.col("key").is_in(gone)))
        return before - len(self.all())

    def rewrite(self, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
        """Replace every part that `change` makes another one; its new form is whole before it goes."""
        for name in self._names():
            part = self._read(name)
            new = change(part)
            if new.equals(part):
                continue
            if len(new):
                self._write(new)
            self.files.remove(name)
        self.refresh()

    def refresh(self) -> None:
        """Let the next question see what others have written since."""
        self._frame, self._rows = None, {}

    def _of_stage(self, stage: str) -> pl.DataFrame:
        return self.all().filter(pl.col("stage") == stage)

    def _names(self) -> list[str]:
        return self.files.names("corrections", ".parquet")

    def _write(self, frame: pl.DataFrame) -> None:
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd")
        name = f"part-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}.parquet"
        self.files.write(f"corrections/{name}", buffer.getvalue())

    def _read(self, name: str) -> pl.DataFrame:
        try:
            part = pl.read_parquet(io.BytesIO(self.files.read(name)))
            return part.select(pl.col(column).cast(dtype) for column, dtype in SCHEMA.items())
        except pl.exceptions.PolarsError as error:
            raise StoreError(
                f"{self.files.path(name)} cannot be read ({error}); it was damaged or written by hand. Bring it back from "
                "a copy, or move it away: the corrections it held are then as if they had not been made."
            ) from error


def _frame(rows: Iterable[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=SCHEMA, orient="row")


def _correction(row: dict[str, Any]) -> Correction:
    return Correction(row["action"], row["text"], row["by"], row["at"], row["reason"])
