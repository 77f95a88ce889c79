"""Histories: interactions in order with the `seq` each was given once; going on from published ones; and forgetting.

Ids are held as Enums (a number per row, in the order of their text) while rows are sorted and compared: ten million
rows then need a fraction of the time and memory of strings. Knows neither datasets nor files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from mllmsrec_core.datasets import REJECTS, Catalogue

PUBLISHED = ("user_id", "seq", "item_id", "at", "rating", "liked")
SAME = ("user_id", "item_id", "at", "occurrence")  # two rows that agree in these are one interaction
LAST = 2**63 - 1  # after every time in microseconds
Split = tuple[pl.DataFrame, pl.DataFrame]  # rows that stay, and rejects
Rule = Callable[[pl.DataFrame], Split]
"""Of whole histories, sorted by user and `seq`: the rows that stay, and those that are held back, with their `reason`."""


@dataclass(frozen=True)
class Histories:
    """`interactions`, and those that a rule holds back in `waiting`, both with `seq`; and the rejects."""

    interactions: pl.DataFrame
    waiting: pl.DataFrame
    rejects: pl.DataFrame


def split(frame: pl.DataFrame, bad: pl.Expr, reason: pl.Expr) -> Split:
    """Rows that are not `bad`, and the others as rejects with their reason."""
    marked = frame.with_columns(bad=bad.fill_null(False))
    if not marked["bad"].any():
        return frame, pl.DataFrame(schema=REJECTS)
    return marked.filter(~pl.col("bad")).drop("bad"), marked.filter("bad").with_columns(reason=reason).select(*REJECTS)


def filled(name: str) -> pl.Expr:
    """The column without white space around it; null where nothing is left."""
    stripped = pl.col(name).str.strip_chars()
    return pl.when(stripped != "").then(stripped).alias(name)


def judge(usable: pl.DataFrame, before: pl.DataFrame, rules: Sequence[Rule] = ()) -> Histories:
    """Every interaction, coded and in order, in its history; or a reject with the reason.

    `before` holds the histories published so far, whose rows keep their `seq`. A new row of an interaction that is known
    adds nothing; others come after the user's last `seq`, in order among themselves. Rules judge whole histories, old
    and new, one rule after the other: a row that one holds back waits, counts for no later rule, and comes in once the
    rules let it; what was read of such rows is rejected. Histories are sorted by user and `seq`, which then has gaps.
    """
    read, again = split(usable, repeated(), pl.lit("the same user, item and time once more"))
    whole = append(read, before)
    held, back = [whole.clear()], [again]
    kept = identified(whole) if rules and before.height else whole
    for rule in rules:
        kept, out = rule(kept)
        held.append(out.select(whole.columns))
        back.append(out.filter("new").select(*REJECTS))
        if before.height:  # rows of `read` that are known already
            known = out.filter(~pl.col("new")).select(*SAME, "reason")
            back.append(identified(read).join(known, on=SAME, how="inner", nulls_equal=True).select(*REJECTS))
    waiting = pl.concat(held).sort("user_id", "seq")
    return Histories(kept.select(PUBLISHED), waiting.select(PUBLISHED), pl.concat(back))


def parted(whole: pl.DataFrame, out: pl.Expr | pl.Series, reason: pl.Expr) -> Split:
    """Rows that are not `out`, and the others with their reason, which sees these alone."""
    marked = whole.with_columns(out=out)
    return marked.filter(~pl.col("out")).drop("out"), marked.filter("out").drop("out").with_columns(reason=reason)


def enough(least: int) -> Rule:
    """Holds back users with fewer interactions than `least`."""
    n = pl.len().over("user_id")
    reason = pl.concat_str(pl.lit("a history of "), n, pl.lit(f", shorter than min_history = {least}"))
    return lambda whole: parted(whole, n < least, reason)


def once(keep: str) -> Rule:
    """Of a user's interactions with one item holds back all but the `first` or the `last`, by `seq`."""
    seq, pair = pl.col("seq"), ("user_id", "item_id")
    stays = seq == (seq.min() if keep == "first" else seq.max()).over(pair)
    reason = pl.lit(f"the same user and item again; repeats = {keep} keeps one")
    return lambda whole: parted(whole, ~stays, reason)


def within_core(k_core: tuple[int, int]) -> Rule:
    """Holds back what lies outside the k-core of users and items with at least `k_core` interactions among themselves."""

    def rule(whole: pl.DataFrame) -> Split:
        user, item = (whole[name].to_physical().to_numpy() for name in ("user_id", "item_id"))
        users, items = core(user, item, k_core)
        few = pl.Series(~users[user])
        stay, out = parted(whole.with_columns(few=few), few | pl.Series(~items[item]), pl.lit(None, pl.String))
        core_of = f" interactions within k_core = ({k_core[0]}, {k_core[1]})"
        user_has = pl.lit(f"the user has fewer than {k_core[0]}{core_of}")
        item_has = pl.lit(f"` has fewer than {k_core[1]}{core_of}")
        thin = pl.concat_str(pl.lit("item `"), pl.col("item_id").cast(pl.String), item_has)
        return stay.drop("few"), out.with_columns(reason=pl.when("few").then(user_has).otherwise(thin)).drop("few")

    return rule


def core(user: NDArray, item: NDArray, k_core: tuple[int, int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """By code, which users and which items are in the k-core; of one interaction each `user` and `item` hold the codes.

    The core is the largest part of the interactions in which every user has at least `k_core[0]` of them and every item
    `k_core[1]`; it does not depend on the order in which the others are taken away.
    """
    sizes = [int(codes.max(initial=0)) + 1 for codes in (user, item)]
    while True:
        n_user, n_item = np.bincount(user, minlength=sizes[0]), np.bincount(item, minlength=sizes[1])
        stays = (n_user >= k_core[0])[user] & (n_item >= k_core[1])[item]
        if stays.all():
            return n_user > 0, n_item > 0
        user, item = user[stays], item[stays]


def coded(interactions: pl.DataFrame, items: pl.Series, users: pl.Series) -> Split:
    """Rows in order with ids as Enums, of `items` (sorted) and of all users with these; those without either are rejects."""
    frame = interactions.with_columns(filled("user_id"), filled("item_id"))
    frame, nameless = split(frame, pl.col("user_id").is_null(), pl.lit("user_id is empty"))
    frame, itemless = split(frame, pl.col("item_id").is_null(), pl.lit("item_id is empty"))
    missing = pl.concat_str(pl.lit("there is no item `"), "item_id", pl.lit("`"))
    frame = frame.with_columns(known=pl.col("item_id").cast(pl.Enum(items), strict=False))
    frame, unknown = split(frame, pl.col("known").is_null(), missing)
    everyone = pl.concat([frame["user_id"].unique(), users.cast(pl.String).unique()]).unique().sort()
    frame = frame.with_columns(pl.col("user_id").cast(pl.Enum(everyone)), item_id="known").drop("known")
    return in_order(frame), pl.concat([nameless, itemless, unknown])


def in_order(interactions: pl.DataFrame) -> pl.DataFrame:
    """By user and time, ties by item id; where the source has no times, in its own order."""
    at = pl.col("at").to_physical().fill_null(LAST)  # sorting with nulls_last takes six times as long
    place = [pl.when(pl.col("at").is_null()).then(pl.int_range(pl.len()))] if interactions["at"].has_nulls() else []
    best = (-pl.col("rating")).fill_null(math.inf), ~pl.col("liked")  # of two ratings at one time the higher stays
    return interactions.sort("user_id", at, *place, "item_id", *best, "source", "line")


def repeated() -> pl.Expr:
    """Whether an ordered row has the user, item and time of the row before."""
    return pl.all_horizontal(pl.col(name) == pl.col(name).shift() for name in ("user_id", "item_id", "at"))


def append(read: pl.DataFrame, before: pl.DataFrame) -> pl.DataFrame:
    """`before` and what `read` (coded and in order) adds to it, sorted by user and `seq`.

    The columns of PUBLISHED, `new` for what `read` adds, and the source and line of that.
    """
    where = ("source", "line")
    if before.is_empty():
        return read.with_columns(seq=place(), new=pl.lit(True)).select(*PUBLISHED, "new", *where)
    codes = [pl.col(name).cast(read.schema[name]) for name in ("user_id", "item_id")]
    before = before.select(PUBLISHED).with_columns(codes).sort("user_id", "seq")
    known = identified(before).select(SAME)
    fresh = identified(read).join(known, on=SAME, how="anti", nulls_equal=True, maintain_order="left")
    last = before.group_by("user_id").agg(last=pl.col("seq").max())
    fresh = fresh.join(last, on="user_id", how="left", maintain_order="left")
    fresh = fresh.with_columns(seq=place() + (pl.col("last") + 1).fill_null(0), new=pl.lit(True))
    before = before.with_columns(new=pl.lit(False))
    return pl.concat([before, fresh.select(*before.columns, *where)], how="diagonal").sort("user_id", "seq")


def place() -> pl.Expr:
    """0, 1, ... within each user, of rows sorted by user."""
    row = pl.int_range(pl.len(), dtype=pl.Int32)
    starts = pl.col("user_id").ne_missing(pl.col("user_id").shift())
    return row - pl.when(starts).then(row).forward_fill()


def identified(frame: pl.DataFrame) -> pl.DataFrame:
    """With `occurrence`: without a time, which one it is of this user and item, from 0; with a time always 0."""
    timed = pl.col("at").is_not_null()
    nth = pl.int_range(pl.len(), dtype=pl.Int32).over("user_id", "item_id", timed) if frame["at"].has_nulls() else 0
    return frame.with_columns(occurrence=pl.when(timed).then(pl.lit(0, pl.Int32)).otherwise(nth))


Tables = dict[str, pl.DataFrame]


def forget(raw: Catalogue, before: Tables, asked: Callable[[pl.Series], pl.Series]) -> tuple[Catalogue, Tables]:
    """Both without the users who asked to be forgotten, and without the items that only they touched.

    `before` holds items, interactions and waiting; `asked` says of user ids whether each of them asked.
    """
    clicks = [raw.interactions.select(filled("user_id"), filled("item_id")), before["interactions"], before["waiting"]]
    users = pl.concat([frame["user_id"].drop_nulls().unique() for frame in clicks]).unique()
    gone = users.filter(asked(users))
    if gone.is_empty():
        return raw, before
    theirs = pl.col("user_id").is_in(gone.implode()).fill_null(False)
    items = pl.concat([frame.filter(theirs)["item_id"].drop_nulls() for frame in clicks]).unique()
    shared = ~theirs & pl.col("item_id").is_in(items.implode())
    alone = items.filter(~items.is_in(pl.concat([frame.filter(shared)["item_id"] for frame in clicks]).implode()))

    def without(frame: pl.DataFrame, column: str, values: pl.Series) -> pl.DataFrame:
        return frame.filter(~filled(column).is_in(values.implode()).fill_null(False))

    left = {name: without(before[name], "user_id", gone) for name in ("interactions", "waiting")}
    left["items"] = without(before["items"], "item_id", alone)
    items_left, theirs_left = without(raw.items, "item_id", alone), without(raw.interactions, "user_id", gone)
    return replace(raw, items=items_left, interactions=theirs_left), left
