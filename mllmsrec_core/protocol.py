"""Who is asked about what: targets, candidates, training interactions and samples, all drawn by hash.

Nothing here depends on row order, on a library's hash or on a random stream, so one new click or item moves little:
items lie on a hash ring, every draw is a point on it, and the answer is the next item the user has not touched and that
is not drawn yet. Removing items nobody drew from the catalogue therefore changes no candidate. Knows nothing of models.

Targets are liked items new to the user: negatives are always new to the user, so a repeated item would be told apart by
that alone. Splits: leave-last-out (the papers' kind) and by user, both of which let a model train on other users' later
clicks (Ji et al., 2010.11060); global time and sliding windows, which do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

Split = Literal["leave-last", "global-time", "user", "sliding"]
Negatives = Literal["uniform", "popularity"]
Hashes = NDArray[np.uint64]

SPLITS = ("train", "valid", "test")
# Points per item on the ring: an item's share of the draws then varies by about 1 / sqrt(32) = 18 % around its due.
POINTS = 32
SHARES = (0.8, 0.1, 0.1)  # of the users in train, valid and test: 8:1:1, as MLLM-MSR divides them
_OF_SPLITS = 0x5EED  # keeps the split of the users apart from `sample`, which goes by the same hash of the user
_MASK = (1 << 64) - 1


def hash64(values: Iterable[str]) -> Hashes:
    """A 64-bit hash of each text, the same on every machine and with every library version."""
    return np.array([int.from_bytes(blake2b(v.encode(), digest_size=8).digest(), "little") for v in values], np.uint64)


def mix(*parts: int | NDArray) -> Hashes:
    """One well-spread 64-bit hash per row of the broadcast parts (splitmix64's finaliser, chained)."""
    mixed = np.zeros(1, np.uint64)
    for part in parts:
        value = np.uint64(part & _MASK) if isinstance(part, int) else part.astype(np.uint64)
        mixed = (mixed ^ value) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def hashes(values: pl.Series) -> Hashes:
    """`hash64` of every row, computed once for each distinct value."""
    known = values.unique().sort()
    return hash64(known)[codes(values, known)]


def codes(values: pl.Series, known: pl.Series) -> NDArray[np.int64]:
    """Each value's position in `known` (distinct values); -1 where it is not known."""
    index = pl.DataFrame({"value": known, "code": np.arange(len(known))})
    found = pl.DataFrame({"value": values}).join(index, on="value", how="left", maintain_order="left")
    return found["code"].fill_null(-1).to_numpy()


@dataclass(frozen=True)
class Cut:
    """How liked items are divided into train, valid and test; what a split does not read is left alone.

    leave-last   test is a user's last target, valid the one before, train what is earlier
    global-time  test is every target on or after `test_from`, valid from `valid_from` on, train what is earlier
    user         users fall to train, valid or test by hash, in these `shares`; the last target of a valid or test user
                 is held out, and the most recent ones of a train user train
    sliding      from `valid_from` on time is cut into `windows` windows of `window_days` days; a user's last target in
                 each is held out, in the first window as valid, in the others as test; train is what is earlier

    Days are UTC. By date, a target without a time is train.
    """

    split: Split = "leave-last"
    valid_from: date | None = None
    test_from: date | None = None
    shares: tuple[float, float, float] = SHARES
    windows: int = 4
    window_days: int = 30
    seed: int = 0


def targets(
    interactions: pl.DataFrame,
    items: pl.Series,
    cut: Cut = Cut(),
    *,
    train_per_user: int = 8,
    min_history: int = 3,
) -> pl.DataFrame:
    """The liked items to predict: user_id, split, target_seq, item_id, history_seq, n_history.

    Every target is new to the user, in the catalogue, has a liked item before it and is no earlier in time than anything
    before it: an event that came in late is history alone. A train target has `min_history` liked items before it, and a
    user at most `train_per_user`, the most recent. `history_seq` is the newest interaction before the target.
    """
    liked = pl.col("liked").cast(pl.Int32)
    newest = pl.col("at").cum_max().forward_fill().shift(1).over("user_id")
    eligible = (
        interactions.sort("user_id", "seq")
        .with_columns(
            history_seq=pl.col("seq").shift(1).over("user_id"),
            n_history=liked.cum_sum().over("user_id") - liked,
            new=pl.col("seq") == pl.col("seq").min().over("user_id", "item_id"),
            in_time=(pl.col("at") >= newest).fill_null(True),
        )
        .filter("liked", "new", "in_time", pl.col("n_history") > 0, pl.col("item_id").is_in(items.implode()))
    )
    divided = DIVIDE[cut.split](eligible, cut).with_columns(pl.col("split").cast(pl.Enum(SPLITS)))
    return (
        divided.with_columns(age=FROM_END.over("user_id", "split"))
        .filter(
            (pl.col("split") != "train") | ((pl.col("n_history") >= min_history) & (pl.col("age") < train_per_user))
        )
        .select("user_id", "split", pl.col("seq").alias("target_seq"), "item_id", "history_seq", "n_history")
    )


FROM_END = pl.int_range(pl.len(), dtype=pl.Int32).reverse()  # 0 is a user's newest, in frames sorted by seq


def leave_last(eligible: pl.DataFrame, cut: Cut) -> pl.DataFrame:
    place = FROM_END.over("user_id")
    test, valid = pl.when(place == 0).then(pl.lit("test")), pl.lit("valid")
    return eligible.with_columns(split=test.when(place == 1).then(valid).otherwise(pl.lit("train")))


def global_time(eligible: pl.DataFrame, cut: Cut) -> pl.DataFrame:
    day = pl.col("at").dt.date()
    test, valid = pl.when(day >= cut.test_from).then(pl.lit("test")), pl.lit("valid")
    return eligible.with_columns(split=test.when(day >= cut.valid_from).then(valid).otherwise(pl.lit("train")))


def by_user(eligible: pl.DataFrame, cut: Cut) -> pl.DataFrame:
    users = eligible["user_id"].unique().sort()
    drawn = mix(cut.seed, _OF_SPLITS, hash64(users.cast(pl.String))) / 2.0**64
    bounds = np.cumsum(cut.shares)[:2]
    named = pl.DataFrame({"user_id": users, "split": np.array(SPLITS)[np.searchsorted(bounds, drawn, side="right")]})
    joined = eligible.join(named, on="user_id", how="left", maintain_order="left")
    return joined.filter((pl.col("split") == "train") | (FROM_END.over("user_id") == 0))


def sliding(eligible: pl.DataFrame, cut: Cut) -> pl.DataFrame:
    days = (pl.col("at").dt.date() - cut.valid_from).dt.total_days()
    window = pl.when(days >= 0).then(days // cut.window_days).otherwise(-1)
    valid, test = pl.when(pl.col("window") == 0).then(pl.lit("valid")), pl.lit("test")
    return (
        eligible.with_columns(window=window)
        .filter(pl.col("window") < cut.windows, (pl.col("window") < 0) | (FROM_END.over("user_id", "window") == 0))
        .with_columns(split=valid.when(pl.col("window") > 0).then(test).otherwise(pl.lit("train")))
    )


DIVIDE: Mapping[Split, Callable[[pl.DataFrame, Cut], pl.DataFrame]] = {
    "leave-last": leave_last,
    "global-time": global_time,
    "user": by_user,
    "sliding": sliding,
}


def training(interactions: pl.DataFrame, held: pl.DataFrame, before: date | None = None) -> pl.DataFrame:
    """The interactions anything may be counted or fitted on: before the user's first valid or test target.

    `held` has user_id, split and target_seq of all targets. With a split by date `before` is its `valid_from`.
    """
    first = held.filter(pl.col("split") != "train").group_by("user_id").agg(first=pl.col("target_seq").min())
    kept = interactions.join(first, on="user_id", how="left", maintain_order="left").filter(
        pl.col("first").is_null() | (pl.col("seq") < pl.col("first"))
    )
    early = pl.lit(True) if before is None else (pl.col("at").dt.date() < before).fill_null(True)
    return kept.drop("first").filter(early)


def liked_counts(items: pl.Series, interactions: pl.DataFrame) -> NDArray[np.int64]:
    """How often each of `items` was liked."""
    found = codes(interactions.filter("liked")["item_id"], items)
    return np.bincount(found[found >= 0], minlength=len(items))


def ring(items: pl.Series, counts: NDArray[np.int64] | None = None) -> tuple[Hashes, NDArray[np.int64]]:
    """Sorted points of the hash ring and the item code each belongs to.

    Every item has `POINTS` points, or 1 + `counts` of them, so that a draw meets items in proportion to their count.
    """
    copies = np.full(len(items), POINTS) if counts is None else 1 + counts
    owner = np.repeat(np.arange(len(items)), copies)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(copies) - copies, copies)
    points = mix(hash64(items)[owner], number)
    order = np.argsort(points, kind="stable")
    return points[order], owner[order]


def draw(
    keys: Hashes,
    users: NDArray[np.int64],
    touched: NDArray[np.int64],
    n: int,
    *,
    n_items: int,
    on: tuple[Hashes, NDArray[np.int64]],
) -> NDArray[np.int64]:
    """`n` distinct item codes for each key, none touched by its user; -1 once a user's catalogue is used up.

    `touched` holds the sorted distinct codes user * n_items + item.
    """
    points, owner = on
    left = n_items - np.bincount(touched // n_items, minlength=users.max(initial=0) + 1)[users]
    drawn = np.full((len(keys), n), -1)
    for number in range(n):
        rows = np.flatnonzero(left > number)
        place = np.searchsorted(points, mix(keys[rows], number)) % len(points)
        while len(rows):
            item = owner[place]
            drawn[rows, number] = item
            pair = users[rows] * n_items + item
            at = np.minimum(np.searchsorted(touched, pair), len(touched) - 1)
            taken = (touched[at] == pair) | (drawn[rows, :number] == item[:, None]).any(axis=1)
            rows, place = rows[taken], (place[taken] + 1) % len(points)
    return drawn


def candidates(
    targets: pl.DataFrame,
    interactions: pl.DataFrame,
    items: pl.Series,
    n_negatives: int | Literal["all"],
    *,
    seed: int = 0,
    popular: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Each target's positive and negatives in hashed order: `targets`' rows with item_id, label, position, n_drawn.

    Negatives are items the user never interacted with, before or after; there are fewer than asked for where the
    catalogue holds no more, and `all` takes every one. The draw depends on the seed, the user and the target's seq, not
    on the split: a test target that a new click turns into a valid one keeps its candidates. With `popular` (training
    interactions) a negative is drawn in proportion to 1 + the number of times it is liked there, else uniformly.
    """
    items = items.unique().sort()
    users = interactions["user_id"].unique().sort()
    counts = None if popular is None else liked_counts(items, popular)
    pair = interactions.select("user_id", "item_id").unique()
    user, item = codes(pair["user_id"], users), codes(pair["item_id"], items)
    touched = np.sort((user * len(items) + item)[item >= 0])

    rows = codes(targets["user_id"], users)
    keys = mix(seed, hash64(users)[rows], targets["target_seq"].to_numpy())
    if n_negatives == "all":
        drawn = untouched(rows, touched, len(items))
    else:
        drawn = draw(keys, rows, touched, n_negatives, n_items=len(items), on=ring(items, counts))
    drawn = np.column_stack([codes(targets["item_id"], items), drawn])
    order = np.where(drawn < 0, np.uint64(_MASK), mix(keys[:, None], hash64(items)[drawn]))
    position = order.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")

    row, column = np.nonzero(drawn >= 0)
    return targets.drop("item_id")[row].with_columns(
        items[drawn[row, column]].alias("item_id"),
        pl.Series("label", column == 0),
        pl.Series("position", position[row, column], pl.Int32),
        pl.Series("n_drawn", (drawn >= 0).sum(axis=1)[row] - 1, pl.Int32),
    )


def untouched(users: NDArray[np.int64], touched: NDArray[np.int64], n_items: int) -> NDArray[np.int64]:
    """Every item code for each row's user, -1 where the user touched it. `touched` as in `draw`."""
    pairs = users[:, None] * n_items + np.arange(n_items)
    return np.where(np.isin(pairs, touched), -1, np.arange(n_items))


def by_hash(frame: pl.DataFrame, on: tuple[str, ...], seed: int = 0) -> pl.DataFrame:
    """`frame` sorted by a hash of its key columns `on` (text or whole numbers): a shuffle any row order repeats."""
    parts = [hashes(frame[c]) if frame[c].dtype == pl.String else frame[c].to_numpy() for c in on]
    return (
        frame.with_columns(pl.Series("_hash", mix(seed, *parts))).sort("_hash", *on, maintain_order=True).drop("_hash")
    )


def sample(users: Iterable[str], n: int, seed: int = 0) -> list[str]:
    """`n` distinct users by hash, sorted; a sample of n is a subset of every larger one with the same seed."""
    known = pl.DataFrame({"user_id": sorted(set(users))}, schema={"user_id": pl.String})
    return sorted(by_hash(known, ("user_id",), seed).head(n)["user_id"])


def reached(users: Iterable[str], interactions: pl.DataFrame, examples: pl.DataFrame) -> list[str]:
    """The items these users' histories and candidates touch, sorted: all a sample has to describe."""
    of = pl.col("user_id").is_in(list(users))
    parts = [interactions.filter(of).select("item_id"), examples.filter(of).select("item_id")]
    return pl.concat(parts)["item_id"].unique().sort().to_list()
