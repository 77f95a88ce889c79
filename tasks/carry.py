"""What needs no question: a row that is the very row published last time keeps what was published for it.

Beside its tables every asking stage publishes its units of work, each with a hash of all its generator reads and the
keys of its Asks, and the finished rows. The next run compares hashes as columns and runs the generators of the others
only. Trusted for the same parameters, model and code alone; never about a row that failed or that was overruled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from mllmsrec_core.stage import Stage
from storage.store import Store

# polars' hash of a row with two seeds: 128 bits, the same in every process of one polars version.
HASHES = {"hash_a": 1, "hash_b": 2}
KEY = 32  # bytes of an Ask's key
STALE = "stale_since"


@dataclass(frozen=True)
class Last:
    """Units and finished rows as last published; `same` where parameters, model and code have not changed since."""

    units: pl.DataFrame
    done: pl.DataFrame
    same: bool


@dataclass(frozen=True)
class Carried:
    """Units that keep what they have, their finished rows, and the rows whose generators have to run."""

    units: pl.DataFrame
    done: pl.DataFrame
    rest: pl.DataFrame


def names(stage: Stage) -> tuple[str, str]:
    """The tables behind a stage's own: its units and its finished rows."""
    return f"units.{stage.name}", f"done.{stage.name}"


def hashed(rows: pl.DataFrame, without: str) -> pl.DataFrame:
    """`rows` with a hash of everything in them but one column."""
    read = pl.struct(pl.exclude(without))
    return rows.with_columns(read.hash(seed).alias(name) for name, seed in HASHES.items())


def read_last(store: Store, stage: Stage, parts: Mapping[str, Any], record: Mapping[str, Any] | None) -> Last | None:
    """What the record left to carry over; None where there is nothing, or where part of it was collected."""
    pointers = (record or {}).get("carried") or {}
    if not record or not pointers:
        return None
    units, done = ((name, pointers[name.split(".")[0]]["write_id"]) for name in names(stage))
    if not (store.tables.whole(*units) and store.tables.whole(*done)):
        return None
    same = all(parts[name] == record["parts"].get(name) for name in ("params", "model", "code"))
    return Last(store.tables.read(*units), store.tables.read(*done), same)


def carry_over(stage: Stage, rows: pl.DataFrame, last: Last | None, overruled: Iterable[bytes] = ()) -> Carried:
    """Split hashed `rows` (with `__row`) into what is carried over and the rest; both in the order of `rows`."""
    if last is None or not last.same:
        return Carried(_none(rows, stage), pl.DataFrame(), rows)
    failed = last.done.filter(pl.col("error").is_not_null()).select(stage.unit).unique()
    sound = last.units.filter(~_asked(last.units["asks"], overruled), pl.col("hash_a").is_not_null())
    sound = sound.join(failed, on=stage.unit, how="anti", nulls_equal=True)
    on = (*stage.unit, *HASHES)
    units = _matched(rows.select("__row", *on), sound.select(*on, "asks"), on)
    rest = rows.join(units.select("__row"), on="__row", how="anti", maintain_order="left")
    return Carried(units, _done_of(units, last.done, stage), rest)


def left_standing(stage: Stage, rows: pl.DataFrame, last: Last | None, now: Any) -> Carried:
    """What was published of `rows` that a run did not reach: their finished rows, marked stale, and their units.

    The units have no hash, so that the next run finds them due; `rest` are the rows nothing was ever published of.
    """
    if last is None:
        return Carried(_none(rows, stage), pl.DataFrame(), rows)
    kept = last.units.select(*stage.unit, "asks")
    units = _matched(rows.select("__row", *stage.unit), kept, stage.unit)
    units = units.with_columns(pl.lit(None, pl.UInt64).alias(name) for name in HASHES)
    done = _done_of(units, last.done, stage)
    if not done.is_empty():
        done = done.with_columns(pl.col(STALE).fill_null(now))
    return Carried(units, done, rows.join(units.select("__row"), on="__row", how="anti", maintain_order="left"))


def joined(asks: list[bytes]) -> bytes:
    """The keys of a unit's Asks in one value, without repetition."""
    return b"".join(dict.fromkeys(asks))


def count_asks(units: pl.DataFrame) -> int:
    """How many Asks stand behind the units."""
    return int(units["asks"].bin.size().sum() or 0) // KEY


def _none(rows: pl.DataFrame, stage: Stage) -> pl.DataFrame:
    return rows.clear().select("__row", *stage.unit, *HASHES).with_columns(asks=pl.lit(None, pl.Binary))


def _done_of(units: pl.DataFrame, done: pl.DataFrame, stage: Stage) -> pl.DataFrame:
    return _matched(units.select("__row", *stage.unit), done, stage.unit)


def _matched(rows: pl.DataFrame, published: pl.DataFrame, on: Sequence[str]) -> pl.DataFrame:
    return rows.join(published, on=on, how="inner", nulls_equal=True, maintain_order="left_right")


def _asked(asks: pl.Series, overruled: Iterable[bytes]) -> pl.Series:
    """Whether a unit asked one of these keys; told by 8 bytes of it, so that one in 10^13 is run again for nothing."""
    prefixes = np.array([int.from_bytes(key[:8], "little") for key in overruled], np.uint64)
    if not len(prefixes):
        return pl.Series(np.zeros(len(asks), bool))
    counts = asks.bin.size().to_numpy() // KEY
    keys = np.frombuffer(b"".join(asks), "<u8")[:: KEY // 8]
    hit = np.isin(keys, prefixes)
    unit = np.repeat(np.arange(len(asks)), counts)
    return pl.Series(np.bincount(unit, weights=hit, minlength=len(asks)) > 0)
