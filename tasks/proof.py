"""The proof that somebody is forgotten: every value of the whole store, decoded and compared with what had to go.

Reads files as anybody with the store could: Parquet columns (bytes too, where they are UTF-8), JSON strings, and the plain
bytes of everything else. Knows nothing of how things were removed.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from storage.files import Files
from storage.forgotten import LOCK
from storage.store import Store
from tasks.carry import KEY
from tasks.traces import NEEDLE, Look, Traces, escaped, findable

OF_ITEMS = ("item_id", "subject_id")  # columns whose values are items' ids
SHOWN = 20  # findings written out


@dataclass(frozen=True)
class Found:
    """A removed value that is still there: what it is, in which file, in which column or part, how often."""

    what: str
    file: str
    where: str
    times: int


@dataclass(frozen=True)
class Proof:
    """What was removed, what was compared, and what was found all the same."""

    user: str
    removed: Mapping[str, int]
    items: int
    adapters: tuple[str, ...]
    files: int
    rows: int
    values: int
    found: tuple[Found, ...]
    notes: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.found

    def lines(self) -> list[str]:
        """The whole in words, for a person to keep."""
        went = ", ".join(f"{count:,} {kind}" for kind, count in self.removed.items() if count)
        lines = [
            f"user {self.user}: removed {went or 'nothing, for the store held nothing'}; {self.items} items that nobody "
            "else ever clicked went with them; the next ingest leaves both out",
            f"proof: {self.values:,} values in {self.rows:,} rows of {self.files:,} files decoded and compared: "
            + ("nothing found" if self.clean else f"found in {len(self.found)} places"),
        ]
        lines += [f"found: {hit.what} in {hit.file}, {hit.where}, {hit.times} times" for hit in self.found[:SHOWN]]
        lines += [f"and in {len(self.found) - SHOWN} more places"] if len(self.found) > SHOWN else []
        if self.found:
            lines.append("look at these files, then repeat the command: what it removes is removed again")
        if self.adapters:
            lines.append(
                f"trained on rows of theirs, and kept: adapter {', '.join(self.adapters)}; make one without them with: "
                "mllmsrec run --retrain"
            )
        return [*lines, *(f"note: {note}" for note in self.notes)]


@dataclass(frozen=True)
class Wanted:
    """What is looked for: `whole` as entire values, `inside` anywhere in a text, keys as bytes."""

    whole: Mapping[str, str]  # value -> what it is
    inside: Mapping[str, str]
    keys: pl.Series
    user: str
    spare: tuple[str, ...]  # columns in which the user's id is an item's

    def what(self, text: str) -> str | None:
        """What a text gives away; None where nothing."""
        if text in self.whole:
            return self.whole[text]
        return next((what for needle, what in self.inside.items() if needle in text), None)

    def hits(self, column: pl.Series) -> Counter[str]:
        """How often a column of text gives something away, by what it is."""
        spared = column.name in self.spare
        mask = column.is_in(pl.Series([v for v in self.whole if not (spared and v == self.user)]).implode())
        if self.inside:
            mask |= column.str.contains_any(list(self.inside))
        return Counter(self.what(text) or "" for text in column.filter(mask.fill_null(False)))


def prove(store: Store, traces: Traces, removed: Mapping[str, int], skip: str) -> Proof:
    """Scan the store for what `traces` names, leaving out the note `skip` that says what to look for."""
    look = Look(store)
    wanted, notes = wanted_of(traces, look.known("user_id"), look.known("item_id"))
    scan = Scan(store.files, wanted)
    for name in store.files.names(""):
        if name not in (skip, LOCK):
            scan.file(name)
    found = tuple(Found(what, file, where, n) for (what, file, where), n in sorted(scan.found.items()))
    return Proof(
        traces.user, removed, len(traces.items), tuple(sorted(traces.adapters)), scan.files, scan.rows, scan.values,
        found, tuple(notes),
    )  # fmt: skip


def wanted_of(traces: Traces, users: frozenset[str], items: frozenset[str]) -> tuple[Wanted, list[str]]:
    """What to look for and how, given the ids that stay; and what cannot be looked for inside texts, in words."""
    user, notes = traces.user, []
    whole, inside = {user: "the user's id"}, {}
    longer = any(user in other for other in (users | items) - {user})
    if longer or not findable(user):
        why = "other ids contain it" if longer else f"it is a number or shorter than {NEEDLE} characters"
        notes.append(f"the user's id was compared with whole values only, not looked for inside texts: {why}")
    else:
        inside[user] = "the user's id"
    spare = OF_ITEMS if user in items else ()
    if spare:
        notes.append(f"the user's id is an item's id too; as such it stays in the columns {', '.join(spare)}")
    for title in traces.titles:
        whole[title] = "the title of an item that went"
        if findable(title):
            inside |= dict.fromkeys({title, escaped(title)}, whole[title])
    whole |= dict.fromkeys(traces.keys, "the key of a question that went")
    return Wanted(whole, inside, traces.binary_keys(), user, spare), notes


class Scan:
    """Counts what was read, and what was found by (what, file, where)."""

    def __init__(self, files: Files, wanted: Wanted) -> None:
        self.store, self.wanted = files, wanted
        self.files = self.rows = self.values = 0
        self.found: Counter[tuple[str, str, str]] = Counter()

    def file(self, name: str) -> None:
        """Read one file by its ending; what is not what its ending says is read as plain bytes."""
        content = self.store.read(name)
        self.files += 1
        self.note(name, "its name", self.wanted.what(name))
        try:
            if name.endswith(".parquet"):
                return self.table(name, pl.read_parquet(io.BytesIO(content)))
            if name.endswith(".json"):
                return self.strings(name, json.loads(content))
        except (pl.exceptions.PolarsError, ValueError):
            pass
        self.plain(name, content)

    def table(self, name: str, frame: pl.DataFrame) -> None:
        self.rows += len(frame)
        for column in frame.iter_columns():
            for part in leaves(column):
                self.values += len(part) - part.null_count()
                if part.dtype == pl.String:
                    self.found.update({(what, name, part.name): n for what, n in self.wanted.hits(part).items()})
                elif part.dtype == pl.Binary:
                    if times := keys_in(part, self.wanted.keys):
                        self.found["the key of a question that went", name, part.name] += times

    def strings(self, name: str, value: Any) -> None:
        """Every string of a JSON value, names of fields included."""
        if isinstance(value, Mapping):
            for key, inner in value.items():
                self.strings(name, key)
                self.strings(name, inner)
        elif isinstance(value, list):
            for inner in value:
                self.strings(name, inner)
        else:
            self.values += 1
            self.note(name, "a value", self.wanted.what(value) if isinstance(value, str) else None)

    def plain(self, name: str, content: bytes) -> None:
        """The bytes as one value, in which texts are looked for."""
        self.values += 1
        needles = {
            **self.wanted.inside,
            **{key: self.wanted.whole[key] for key in self.wanted.whole if len(key) == 2 * KEY},
        }
        for needle, what in needles.items():
            if needle.encode() in content:
                self.note(name, "its bytes", what)

    def note(self, name: str, where: str, what: str | None) -> None:
        if what:
            self.found[what, name, where] += 1


def leaves(column: pl.Series) -> Iterator[pl.Series]:
    """A column without its nesting; text in categories as text, and bytes twice: as they are, and those that are UTF-8."""
    dtype = column.dtype
    if isinstance(dtype, pl.List | pl.Array):
        yield from leaves(column.explode())
    elif isinstance(dtype, pl.Struct):
        for field in dtype.fields:
            yield from leaves(column.struct.field(field.name))
    elif isinstance(dtype, pl.Categorical | pl.Enum):
        yield column.cast(pl.String)
    else:
        yield column
        if dtype == pl.Binary:
            yield pl.Series(column.name, [utf8(value) for value in column], dtype=pl.String).drop_nulls()


def utf8(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def keys_in(column: pl.Series, keys: pl.Series) -> int:
    """How many of the 32-byte pieces of a column's values are among `keys`."""
    sized = column.drop_nulls()
    size = sized.bin.size()
    times = int(sized.is_in(keys.implode()).sum())
    several = sized.filter((size > KEY) & (size % KEY == 0))
    if column.name != "asks" or several.is_empty():
        return times
    joined = b"".join(several)
    pieces = pl.Series([joined[start : start + KEY] for start in range(0, len(joined), KEY)], dtype=pl.Binary)
    return times + int(pieces.is_in(keys.implode()).sum())
