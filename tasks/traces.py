"""All that a store holds about one user: rows, questions, and the items that are known through this user alone.

`find` looks through every write of every table, the index of subjects and the text of every question; `Traces` then says
row by row what is about the user. Changes nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import polars as pl

from mllmsrec_core.text import clean
from storage.store import Store
from tasks.carry import KEY

NEEDLE = 6  # characters from which a text is looked for inside others: shorter ones stand in words by chance
LONGEST = 200  # characters of a title that are looked for: prompts cut long texts
WORDS = {  # texts about one item: what stands in those of others as well is no trace of the one that goes
    "items": ("title", "description", "category", "attributes"),
    "item_summaries": ("text_summary", "caption", "summary"),
    "captions": ("caption",),
}

TOLD_BY = ("user_id", "item_id", "sha256", "uri", "subject", "subject_id", "reason")  # what `Traces.rows` looks at

Write = tuple[str, str]  # a table's name and the id of one write of it


@dataclass(frozen=True)
class Traces:
    """The user, and the items, titles, pictures (sha256), URIs, question keys (hex) and adapters that belong to them.

    `titles` are those that are told apart from the words of the items that stay.
    """

    user: str
    items: frozenset[str] = frozenset()
    titles: frozenset[str] = frozenset()
    pictures: frozenset[str] = frozenset()
    uris: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    adapters: frozenset[str] = frozenset()

    def __or__(self, other: Traces) -> Traces:
        """All that either knows."""
        names = [field.name for field in fields(self) if field.name != "user"]
        both: dict[str, frozenset[str]] = {name: getattr(self, name) | getattr(other, name) for name in names}
        return replace(self, **both)  # type: ignore[arg-type]

    def to_json(self) -> bytes:
        return json.dumps({n: v if n == "user" else sorted(v) for n, v in asdict(self).items()}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Traces:
        values = json.loads(text)
        return cls(values.pop("user"), **{name: frozenset(value) for name, value in values.items()})

    def binary_keys(self) -> pl.Series:
        return pl.Series("key", sorted(bytes.fromhex(name) for name in self.keys), dtype=pl.Binary)

    def rows(self, table: str, columns: Collection[str]) -> pl.Expr:
        """Whether a row of the table is about the user, or about an item or picture that goes with the user."""
        tests = [pl.lit(False)]
        if "user_id" in columns:
            tests.append(pl.col("user_id") == self.user)
        if "item_id" in columns:
            tests.append(_among("item_id", self.items))
        if "sha256" in columns and table != "adapters":
            tests.append(_among("sha256", self.pictures))
        if "uri" in columns:
            tests.append(_among("uri", self.uris))
        if "subject_id" in columns:
            summary = pl.col("subject").cast(pl.String) == "summary"
            tests += [summary & _among("subject_id", self.items), ~summary & _among("subject_id", self.pictures)]
        if table == "rejects" and self.items:
            tests.append(pl.col("reason").str.contains_any([f"`{item}`" for item in sorted(self.items)]))
        return pl.any_horizontal(test.fill_null(False) for test in tests)


def _among(column: str, names: Iterable[str]) -> pl.Expr:
    return pl.col(column).is_in(pl.Series(sorted(names), dtype=pl.String).implode())


def find(store: Store, user: str, known: Traces | None = None) -> Traces:
    """What the store holds of `user` now, and what was `known` before some of it went."""
    look = Look(store)
    traces = (known or Traces(user)) | Traces(user, items=look.items_of(user))
    traces |= look.of_items(traces)
    return traces | look.keys_of(traces) | look.adapters_of(traces)


class Look:
    """One look through all that is published."""

    def __init__(self, store: Store) -> None:
        self.store = store
        manifests = {write: store.tables.manifest(*write) for write in store.tables.writes()}
        self.manifests = {write: manifest for write, manifest in manifests.items() if manifest}

    def frames(self, *tables: str, columns: Collection[str] = ()) -> Iterator[tuple[str, pl.DataFrame]]:
        """Every write of these tables (all where none is named) that has one of `columns`, with those it has."""
        for (table, write_id), manifest in self.manifests.items():
            there = [name for name in manifest["schema"] if not columns or name in columns]
            if there and (not tables or table in tables):
                yield table, self.store.tables.read(table, write_id, columns=there)

    def items_of(self, user: str) -> frozenset[str]:
        """The items that this user clicked in some table and nobody else in any."""
        mine: set[str] = set()
        for _, frame in self.frames("interactions", columns=("user_id", "item_id")):
            mine.update(frame.filter(pl.col("user_id") == user)["item_id"])
        for _, frame in self.frames("interactions", columns=("user_id", "item_id")) if mine else ():
            mine.difference_update(frame.filter(pl.col("user_id") != user, _among("item_id", mine))["item_id"])
        return frozenset(mine)

    def of_items(self, traces: Traces) -> Traces:
        """The URIs, pictures and titles that only the items that go have."""
        gone, uris, pictures = pl.DataFrame({"title": []}, schema={"title": pl.String}), Owned(), Owned()
        for table, frame in self.frames("items", columns=("item_id", "title", "image_uri")):
            about = traces.rows(table, frame.columns)
            gone = pl.concat([gone, frame.filter(about).select("title")])
            uris.add(frame, about, "image_uri")
        for table, frame in self.frames("images", columns=("item_id", "sha256")):
            pictures.add(frame, traces.rows(table, frame.columns), "sha256")
        traces |= Traces(traces.user, uris=uris.alone())
        for table, frame in self.frames("done.images", columns=("uri", "sha256")):
            pictures.add(frame, traces.rows(table, frame.columns), "sha256")
        traces |= Traces(traces.user, pictures=pictures.alone())
        return traces | Traces(traces.user, titles=self.own_words(traces, gone["title"].drop_nulls().unique()))

    def own_words(self, traces: Traces, titles: pl.Series) -> frozenset[str]:
        """Those of `titles` that stand in no text of an item or picture that stays."""
        left = {title: [text[:LONGEST] for text in {title, clean(title)} if text] for title in titles}
        for table, frame in self.frames(*WORDS) if left else ():
            texts = frame.filter(~traces.rows(table, frame.columns)).select(
                name for name in WORDS[table] if name in frame.columns
            )
            for column in texts.iter_columns():
                for title, forms in list(left.items()):
                    if column.str.contains_any(forms).any():
                        del left[title]
        return frozenset(text for forms in left.values() for text in forms)

    def keys_of(self, traces: Traces) -> Traces:
        """The questions of rows that go, unless one that stays asked them too; and all that show what goes."""
        index = Subjects(self.store, traces, self.known("user_id"), self.known("item_id"))
        gone = index.gone(self.asked(traces, stays=False)) - self.asked(traces, stays=True)
        return Traces(traces.user, keys=frozenset(key.hex() for key in gone | self.shown_in(traces)))

    def known(self, column: str) -> frozenset[str]:
        """Every user or item id in any table."""
        found: set[str] = set()
        for _, frame in self.frames(columns=(column,)):
            found.update(frame[column].drop_nulls().unique())
        return frozenset(found)

    def asked(self, traces: Traces, stays: bool, tables: Collection[str] = ()) -> set[bytes]:
        """The keys of the questions behind rows that stay, or behind those that go.

        A claim is a row of its own: one that goes is not kept by the unit of its picture.
        """
        found: set[bytes] = set()
        claims = self.asked(traces, False, ("audit", "done.audit")) if stays else set[bytes]()
        for table, frame in self.frames(*tables, columns=(*TOLD_BY, "ask", "asks")):
            column = "asks" if "asks" in frame.columns else "ask"
            if column in frame.columns:
                about = traces.rows(table, frame.columns)
                keys = split(frame.filter(~about if stays else about)[column])
                found |= keys - claims if table == "units.audit" else keys
        return found

    def shown_in(self, traces: Traces) -> set[bytes]:
        """The questions whose text holds a picture, URI or title that goes."""
        uris = [f'"uri":{json.dumps(uri, ensure_ascii=False)}' for uri in traces.uris]
        needles = [*traces.pictures, *uris, *(escaped(title) for title in traces.titles if findable(title))]
        found: set[bytes] = set()
        for piece in parts(self.store, "asks") if needles else ():
            found.update(piece.filter(pl.col("ask").str.contains_any(needles))["key"])
        return found

    def adapters_of(self, traces: Traces) -> Traces:
        """The adapters whose training examples held a row that goes, by name and sha256."""
        examples = {write_id: m["digest"] for (table, write_id), m in self.manifests.items() if table == "examples"}
        digests = {digest for write_id, digest in examples.items() if self.trained_on(traces, write_id)}
        made = [r for r in records(self.store) if r["parts"].get("inputs", {}).get("examples") in digests]
        found: set[str] = set()
        for pointer in (record["tables"]["adapters"] for record in made if "adapters" in record["tables"]):
            if self.store.tables.whole("adapters", pointer["write_id"]):
                rows = self.store.tables.read("adapters", pointer["write_id"]).drop_nulls("sha256")
                found.update(f"{row['name']} ({row['sha256']})" for row in rows.iter_rows(named=True))
        return Traces(traces.user, adapters=frozenset(found))

    def trained_on(self, traces: Traces, write_id: str) -> bool:
        examples = self.store.tables.read("examples", write_id, columns=("user_id", "item_id", "split"))
        train = examples.filter(pl.col("split").cast(pl.String) == "train")
        return bool(train.select(traces.rows("examples", train.columns).any()).item())


class Owned:
    """Values of rows that go, and of rows that stay."""

    def __init__(self) -> None:
        self.gone, self.kept = set[str](), set[str]()

    def add(self, frame: pl.DataFrame, about: pl.Expr, column: str) -> None:
        self.gone.update(frame.filter(about)[column].drop_nulls())
        self.kept.update(frame.filter(~about)[column].drop_nulls().unique())

    def alone(self) -> frozenset[str]:
        return frozenset(self.gone - self.kept)


class Subjects:
    """What the index says of keys: whom their questions were asked for."""

    def __init__(self, store: Store, traces: Traces, users: Iterable[str], items: Iterable[str]) -> None:
        self.store, subject = store, store.forgotten.subject
        self.user = subject("user", traces.user)
        self.others = {subject("user", name) for name in users if name != traces.user}
        self.stay = {subject("item", name) for name in items if name not in traces.items}
        self.go = {subject("item", name) for name in traces.items}

    def gone(self, asked: set[bytes]) -> set[bytes]:
        """Of the keys `asked` for rows that go, and of all the index has of the user and such items, those to remove."""
        ours = pl.Series([self.user, *self.go], dtype=pl.Binary)
        keys = asked.union(*(piece["key"] for piece in self.pieces("subject", ours)))
        used: dict[bytes, set[bytes]] = {key: set() for key in keys}
        for piece in self.pieces("key", pl.Series(list(keys), dtype=pl.Binary)):
            for key, name in piece.iter_rows():
                used[key].add(name)
        return {key for key, names in used.items() if self.goes(names)}

    def pieces(self, column: str, wanted: pl.Series) -> Iterator[pl.DataFrame]:
        """The index's rows (key, subject) whose `column` is among `wanted`."""
        for piece in parts(self.store, "subjects"):
            yield piece.select("key", "subject").filter(pl.col(column).is_in(wanted.implode()))

    def goes(self, names: set[bytes]) -> bool:
        """Whether nobody who stays used a key: another user, and where it is about an item that goes, another item too.

        That the user's question is about an item that stays keeps nothing.
        """
        another = not names.isdisjoint(self.others)
        if names.isdisjoint(self.go):
            return not another
        return names.isdisjoint(self.stay) or (self.user in names and not another)


def parts(store: Store, folder: str) -> Iterator[pl.DataFrame]:
    """The rows of every Parquet file below a folder of the store, as they lie there: repeated ones too."""
    for name in store.files.names(folder, ".parquet"):
        yield pl.read_parquet(io.BytesIO(store.files.read(name)))


def split(asks: pl.Series) -> set[bytes]:
    """The keys in a column of keys, or of several of them side by side."""
    joined = b"".join(asks.drop_nulls())
    return {joined[start : start + KEY] for start in range(0, len(joined), KEY)}


def findable(text: str) -> bool:
    """Whether a text found inside another one is likely no chance."""
    return len(text) >= NEEDLE and not text.isdecimal()


def escaped(text: str) -> str:
    """`text` as it stands inside JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def records(store: Store) -> Iterator[Mapping[str, Any]]:
    """Every stage record: those kept for reuse, and those of all states of all environments."""
    for name in store.files.names("stages", ".json"):
        yield json.loads(store.files.read(name))
    for name in store.files.names("envs", ".json"):
        yield from json.loads(store.files.read(name))["stages"].values()
