"""An append-only set of keyed Parquet rows that stays cheap to add to and to look into at tens of millions of rows.

Below one folder lie two levels. New rows are parts of level 0, directly in the folder, keys in any order. What gathers
there is spread into 256 buckets, `<bb>/` by the first byte of the key in hex, whose parts are sorted by key; keys are
sha256s, so buckets are alike. A merged part is whole before the first old one goes: what a crash leaves behind, and what
two processes that compact at once write twice, are equal rows. In memory are where the rows of level 0 stand, eight bytes
of each key of the buckets touched so far, and the values of late hits. Knows nothing of what a row means, or which one
holds.
"""

from __future__ import annotations

import io
import re
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

import numpy as np
import polars as pl

from mllmsrec_core.errors import StoreError
from storage.files import Files
from storage.loose import Loose, equal

P = ParamSpec("P")
T = TypeVar("T")

LEVEL_0 = -1  # beside the buckets 0 to 255
BUCKET = "__bucket"  # a column that no schema has
READS = 5  # a compaction may take parts away between listing and reading; it cannot do so for ever
GROUP_ROWS = 8_192  # of one value read: 1 ms of a part of 80,000 rows, which takes 5 ms whole
LOOSE_PARTS = 256  # a writer compacts after so many of its own, as where parts are cut by time
LARGER = 4  # a part so many times larger than all smaller ones together is left alone by a merge
CACHE_BYTES = 400_000_000  # of decoded values: some 2 million replies of 150 characters

_PLACE = re.compile(
    r"(?:([0-9a-f]{2})/)?[^/]+"
)  # of a part below the folder; what lies elsewhere was put aside by hand
_ROWS = re.compile(r"\.(\d+)\.parquet$")


class Cache:
    """Pieces of parts by name and number, at most `most_bytes` of them; the one not used for longest goes first."""

    def __init__(self, most_bytes: int = CACHE_BYTES) -> None:
        self.most_bytes, self.held_bytes = most_bytes, 0
        self._pieces: OrderedDict[tuple[str, int], pl.DataFrame] = OrderedDict()

    def get(self, name: str, number: int) -> pl.DataFrame | None:
        """The piece, which is then the last to go; None when it is not held."""
        piece = self._pieces.get((name, number))
        if piece is not None:
            self._pieces.move_to_end((name, number))
        return piece

    def put(self, name: str, number: int, piece: pl.DataFrame) -> None:
        """Hold a piece that is not held yet."""
        self._pieces[name, number] = piece
        self.held_bytes += piece.estimated_size()
        while self.held_bytes > self.most_bytes and len(self._pieces) > 1:
            self.held_bytes -= self._pieces.popitem(last=False)[1].estimated_size()

    def drop(self, names: set[str]) -> None:
        """Let go of every piece of these parts."""
        for place in [place for place in self._pieces if place[0] in names]:
            self.held_bytes -= self._pieces.pop(place).estimated_size()


class Shelf:
    """Rows below `folder`, with the columns of `schema`: `key`, 32 evenly spread bytes, first. Equal rows count once.

    Several processes may append and compact at once, and each sees what others wrote after `refresh`.
    """

    spill_rows = 200_000  # level 0 goes into the buckets beyond: then some 780 rows for each, in parts of 50 kB

    def __init__(self, files: Files, folder: str, schema: dict[str, Any], cache: Cache | None = None) -> None:
        self.files, self.folder, self.schema = files, folder, schema
        self._cache = cache or Cache()
        self._names: set[str] | None = None  # as last listed; None before the first look
        self._by_bucket: dict[int, list[str]] = {}
        self._loose = Loose()  # where the rows of level 0 stand, of the parts whose keys were read
        self._loose_read = False  # whether those are all of level 0
        self._prefixes: dict[str, memoryview] = {}  # first 8 bytes of each key of a part, in the order of its rows
        self._indexed: dict[int, list[tuple[str, memoryview]]] = {}  # the same by bucket, where up to date
        self._own_parts = self._own_rows = 0  # written to level 0 by this process since it last compacted

    def rows(self, key: bytes) -> list[tuple[Any, ...]]:
        """Every row of one key, in the order of the schema. A miss reads nothing once the key's bucket is indexed."""
        return self._again(self._rows, key)

    def lookup(self, keys: pl.Series, columns: list[str] | None = None) -> pl.DataFrame:
        """Every row of these keys, in no order; reads only the buckets concerned, each part once."""
        return pl.concat([self._empty(columns), *self.lookups(keys, columns)])

    def lookups(self, keys: pl.Series, columns: list[str] | None = None) -> Iterator[pl.DataFrame]:
        """`lookup` in pieces: level 0, then one bucket after the other. A row may come twice while others compact."""
        wanted = pl.DataFrame({"key": keys}, schema={"key": pl.Binary}).unique()
        if wanted.is_empty():
            return
        yield self._again(self._semi_join, LEVEL_0, wanted["key"], columns)
        for bucket, some in _by_first_byte(wanted):
            if self._by_bucket.get(bucket):
                yield self._again(self._semi_join, bucket, some["key"], columns)

    def pieces(self) -> Iterator[pl.DataFrame]:
        """Every row: level 0, then one bucket after the other. A row may come twice while others compact."""
        self.look()
        for bucket in range(LEVEL_0, 256):
            if self._by_bucket.get(bucket):
                yield self._again(lambda bucket=bucket: self._gather(self._by_bucket.get(bucket, [])))

    def refresh(self) -> None:
        """Notice what others wrote or compacted since the last look: one listing when nothing changed.

        Rows are read when they are asked for. A shelf that was never looked at stays so.
        """
        if self._names is not None:
            self.look()

    def look(self) -> None:
        """List the parts, for the first time or again."""
        names = self._listed()
        gone, new = (self._names or set()) - names, names - (self._names or set())
        self._names = names
        if not gone and not new:
            return
        self._by_bucket = {}
        for name in sorted(names):
            self._by_bucket.setdefault(self._bucket(name), []).append(name)
        changed = {self._bucket(name) for name in gone | new}
        for bucket in changed:
            self._indexed.pop(bucket, None)
        for name in gone:
            self._prefixes.pop(name, None)
        if any(self._bucket(name) == LEVEL_0 for name in gone):
            self._loose = Loose()
        self._loose_read = self._loose_read and LEVEL_0 not in changed
        self._cache.drop(gone)

    def _listed(self) -> set[str]:
        """The parts there are. A listing is no snapshot: where one part vanished its rows may be in a part that was
        written behind the listing's back, so it is repeated until nothing vanishes."""
        before, names = self._names, self._list()
        for _ in range(READS):
            if before is not None and before <= names:
                break
            before, names = names, self._list()
        return names

    def _list(self) -> set[str]:
        found = self.files.names(self.folder, ".parquet")
        return {name for name in found if _PLACE.fullmatch(name, len(self.folder) + 1)}

    def _bucket(self, name: str) -> int:
        place = _PLACE.fullmatch(name, len(self.folder) + 1)
        return int(place[1], 16) if place and place[1] else LEVEL_0

    def _again(self, read: Callable[P, T], *what: P.args, **how: P.kwargs) -> T:
        """What `read` returns. A part that a compaction took away has its rows in another: then all are listed again."""
        if self._names is None:
            self.look()
        for _ in range(READS - 1):
            try:
                return read(*what, **how)
            except FileNotFoundError:
                self.look()
        return read(*what, **how)

    def _rows(self, key: bytes) -> list[tuple[Any, ...]]:
        prefix, found = int.from_bytes(key[:8], "big"), list[tuple[Any, ...]]()
        if not self._loose_read:
            self._read_loose()
        for name, at in self._loose.find(prefix):
            if (row := self._value(name, at))[0] == key:
                found.append(row)
        parts = self._indexed.get(key[0])
        for name, prefixes in parts if parts is not None else self._index(key[0]):
            for at in equal(prefixes, prefix):
                if (row := self._value(name, at))[0] == key:
                    found.append(row)
        return found

    def _read_loose(self) -> None:
        """Level 0 as it was listed last. What is read for the first time is kept whole, as much of it may be asked for."""
        for name in self._by_bucket.get(LEVEL_0, []):
            if name not in self._prefixes:
                part = self._read(name)
                self._prefixes[name] = _prefixes(part["key"])
                for number, piece in enumerate(part.iter_slices(GROUP_ROWS)):
                    self._cache.put(name, number, piece)
            self._loose.add(name, self._prefixes[name])
        self._loose_read = True

    def _index(self, bucket: int) -> list[tuple[str, memoryview]]:
        names = self._by_bucket.get(bucket, [])
        for name in names:
            if name not in self._prefixes:
                self._prefixes[name] = _prefixes(self._read(name, ["key"])["key"])
        self._indexed[bucket] = [(name, self._prefixes[name]) for name in names]
        return self._indexed[bucket]

    def _value(self, name: str, at: int) -> tuple[Any, ...]:
        number, row = divmod(at, GROUP_ROWS)
        piece = self._cache.get(name, number)
        if piece is None:
            piece = self._read(name, group=number)
            self._cache.put(name, number, piece)
        return piece.row(row)

    def _semi_join(self, bucket: int, keys: pl.Series, columns: list[str] | None) -> pl.DataFrame:
        found = [self._empty(columns)]
        for name in self._by_bucket.get(bucket, []):
            if bucket == LEVEL_0 or name not in self._prefixes or _touches(self._prefixes[name], keys):
                found.append(self._read(name, columns, keys))
        return pl.concat(found)

    def _gather(self, names: Iterable[str]) -> pl.DataFrame:
        """Every row of these parts, equal ones once, sorted by key."""
        return pl.concat([self._empty(), *(self._read(name) for name in names)]).unique(maintain_order=True).sort("key")

    def _empty(self, columns: list[str] | None = None) -> pl.DataFrame:
        return pl.DataFrame(schema={column: self.schema[column] for column in columns or self.schema})

    def _read(
        self, name: str, columns: list[str] | None = None, keys: pl.Series | None = None, group: int | None = None
    ) -> pl.DataFrame:
        """One part, or the rows of `keys`, or its `group` of GROUP_ROWS rows. Raises FileNotFoundError, StoreError."""
        content = io.BytesIO(self.files.read(name))
        try:
            part = pl.scan_parquet(content)
            if keys is not None:
                part = part.filter(_among(keys))
            if group is not None:
                part = part.slice(group * GROUP_ROWS, GROUP_ROWS)
            return part.select(pl.col(column).cast(self.schema[column]) for column in columns or self.schema).collect()
        except pl.exceptions.PolarsError as error:
            raise StoreError(
                f"{self.files.path(name)} cannot be read ({error}); it was damaged or written by hand. Bring it back from "
                "a copy, or move it away: what only it held is then asked again."
            ) from error

    def append(self, rows: pl.DataFrame) -> None:
        """Write the rows as one part of level 0; they are durable, and seen here, when this returns."""
        if rows.is_empty():
            return
        part = rows.select(pl.col(column).cast(dtype) for column, dtype in self.schema.items())
        name = self._write(LEVEL_0, part)
        self._own_parts += 1
        self._own_rows += len(part)
        if self._names is not None:
            self._names.add(name)
            self._by_bucket.setdefault(LEVEL_0, []).append(name)
            if self._loose_read:
                self._prefixes[name] = _prefixes(part["key"])
                self._loose.add(name, self._prefixes[name])

    @property
    def due(self) -> bool:
        """Whether this process alone has written enough for `compact` to be worth it in the middle of a run."""
        return self._own_parts >= LOOSE_PARTS or self._own_rows > self.spill_rows

    def compact(self, most_parts: int = 8) -> int:
        """Leave at most `most_parts` parts in level 0 and in each bucket; returns how many parts were taken away.

        Level 0 is spread into the buckets beyond `spill_rows` rows. Large parts are left alone while small ones can
        be merged: a row of 20 million that came 200,000 at a time is written some five times into its bucket.
        """
        self._own_parts = self._own_rows = 0
        self.look()
        taken = self._compact_loose(most_parts)
        if taken:
            self.look()
        merged = sum(
            self._merge(_smallest(self._counted(names), most_parts))
            for bucket, names in self._by_bucket.items()
            if bucket != LEVEL_0 and len(names) > most_parts
        )
        if merged:
            self.look()
        return taken + merged

    def remove(self, keys: Iterable[bytes]) -> int:
        """Take every row of these keys away; returns how many rows went. Nobody else may write meanwhile."""
        wanted = pl.DataFrame({"key": list(keys)}, schema={"key": pl.Binary}).unique()
        self.look()
        gone = self._without(self._by_bucket.get(LEVEL_0, []), _among(wanted["key"]))
        for bucket, some in _by_first_byte(wanted):
            gone += self._without(self._by_bucket.get(bucket, []), _among(some["key"]))
        self.look()
        return gone

    def remove_where(self, goes: pl.Expr) -> int:
        """Take every row for which `goes` holds away, as `remove` does; reads everything."""
        self.look()
        gone = sum(self._without(names, goes) for names in self._by_bucket.values())
        self.look()
        return gone

    def _compact_loose(self, most_parts: int) -> int:
        counted = self._counted(self._by_bucket.get(LEVEL_0, []))
        if sum(counted.values()) <= self.spill_rows:
            return self._merge(_smallest(counted, most_parts)) if len(counted) > most_parts else 0
        taken, some, rows = 0, list[str](), 0
        for number, (name, count) in enumerate(counted.items(), 1):
            some.append(name)
            rows += count
            if rows > self.spill_rows or number == len(counted):
                taken += self._merge(some, spread=True)
                some, rows = [], 0
        return taken

    def _counted(self, names: Iterable[str]) -> dict[str, int]:
        """Rows of each part: its name says so; a part of a store from before is read."""
        counted = {}
        for name in names:
            said = _ROWS.search(name)
            try:
                counted[name] = int(said[1]) if said else len(self._read(name, ["key"]))
            except FileNotFoundError:  # another process is merging the same parts
                continue
        return counted

    def _merge(self, names: list[str], spread: bool = False) -> int:
        """New parts are whole before the first old one goes; a crash between leaves equal rows, which readers ignore."""
        if len(names) < 2 and not spread:
            return 0
        try:
            rows = self._gather(names)
        except FileNotFoundError:  # another process is merging the same parts
            return 0
        for bucket, some in _by_first_byte(rows) if spread else ((self._bucket(names[0]), rows),):
            self._write(bucket, some)
        for name in names:
            self.files.remove(name)
        return len(names)

    def _without(self, names: Iterable[str], goes: pl.Expr) -> int:
        gone = 0
        for name in names:
            part = self._read(name)
            stays = part.filter(~goes)
            if len(stays) < len(part):
                if len(stays):
                    self._write(self._bucket(name), stays)
                self.files.remove(name)
                gone += len(part) - len(stays)
        return gone

    def _write(self, bucket: int, part: pl.DataFrame) -> str:
        folder = self.folder if bucket == LEVEL_0 else f"{self.folder}/{bucket:02x}"
        name = f"{folder}/part-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}.{len(part)}.parquet"
        buffer = io.BytesIO()
        part.write_parquet(buffer, compression="zstd", row_group_size=GROUP_ROWS)
        self.files.write(name, buffer.getvalue())
        return name


def _among(keys: pl.Series) -> pl.Expr:
    return pl.col("key").is_in(keys.implode())


def _prefixes(keys: pl.Series) -> memoryview:
    """The first 8 bytes of each key as a number: numbers are ordered as the keys are."""
    numbers = keys.bin.slice(0, 8).bin.reinterpret(dtype=pl.UInt64, endianness="big").to_numpy()
    return numbers.data


def _touches(prefixes: memoryview, keys: pl.Series) -> bool:
    """Whether any of the keys may be in a part with these prefixes."""
    held, wanted = np.asarray(prefixes), np.asarray(_prefixes(keys))
    return bool((held.searchsorted(wanted, "left") < held.searchsorted(wanted, "right")).any())


def _by_first_byte(rows: pl.DataFrame) -> Iterator[tuple[int, pl.DataFrame]]:
    """The rows of each bucket, in order of buckets, their order kept."""
    marked = rows.with_columns(pl.col("key").bin.slice(0, 1).alias(BUCKET)).sort("key", maintain_order=True)
    for some in marked.partition_by(BUCKET, maintain_order=True, include_key=False):
        yield some["key"][0][0], some


def _smallest(counted: dict[str, int], most_parts: int) -> list[str]:
    """The parts to merge so that at most `most_parts` stay, and none much larger than all smaller ones is touched."""
    taken, rows = list[str](), 0
    for name, count in sorted(counted.items(), key=lambda pair: pair[1]):
        few = len(counted) - len(taken) + 1 <= most_parts
        if few and len(taken) > 1 and count > LARGER * rows:
            break
        taken.append(name)
        rows += count
    return taken
