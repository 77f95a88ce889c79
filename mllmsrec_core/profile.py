"""A user in words, counted rather than asked: favourite categories, rating habit, rhythm.

MLLM-SRec puts a user profile before its prompt but does not say what it holds; this one is ours. Deterministic, and
made only of interactions before the target, so it changes with the target and never knows it. User ids do not enter it.
"""

from __future__ import annotations

import polars as pl

from mllmsrec_core.text import clean

FAVOURITES = 3
CATEGORY_CHARS = 60  # a category is a name or a short path, not a title
HALF_STAR = 0.5  # the step of most rating scales: a habit is named from there on
HALF_DAY = 0.5  # below it "every day" would say too little
MIN_GAPS = 2  # two gaps, so three interactions, before a rhythm is named
PAIR = ("user_id", "target_seq")


def usual_rating(interactions: pl.DataFrame) -> float | None:
    """The mean rating to the nearest half star, so that a new one rarely changes a profile; None without any."""
    mean = interactions.select(pl.col("rating").mean())["rating"].item()
    return None if mean is None else round(mean / HALF_STAR) * HALF_STAR


def profile(
    pairs: pl.DataFrame, interactions: pl.DataFrame, items: pl.DataFrame, usual: float | None = None
) -> pl.DataFrame:
    """user_id, target_seq, profile for each distinct pair; null where nothing is known.

    Only interactions with seq < target_seq are read. `usual` is the rating others give (`usual_rating` of training
    interactions); without it no rating habit is named.
    """
    pairs = pairs.select(PAIR).unique()
    before = (
        interactions.select("user_id", "seq", "item_id", "at", "rating", "liked")
        .sort("user_id", "seq")
        .with_columns(gap=(pl.col("at") - pl.col("at").shift(1).over("user_id")).dt.total_seconds() / 86_400)
        .join(pairs, on="user_id")
        .filter(pl.col("seq") < pl.col("target_seq"))
    )
    parts = (favourites(before, items), habit(before, usual), rhythm(before))
    for part in parts:
        pairs = pairs.join(part, on=PAIR, how="left")
    text = pl.concat_str("likes", "habit", "rhythm", separator=" ", ignore_nulls=True)
    return pairs.select(*PAIR, profile=pl.when(text != "").then(text))


def favourites(before: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """`likes`: "Likes shoes (3 of 5), bags (2 of 5).": the top categories among liked items that have one."""
    known = items.select("item_id", "category").unique("item_id").drop_nulls()
    names = known.select(pl.col("category").unique())
    names = names.with_columns(name=pl.col("category").map_elements(_short, pl.String)).filter(pl.col("name") != "")
    return (
        before.filter("liked")
        .join(known.join(names, on="category"), on="item_id")
        .group_by(*PAIR, "name")
        .agg(count=pl.len())
        .with_columns(total=pl.col("count").sum().over(PAIR))
        .sort(*PAIR, "count", "name", descending=[False, False, True, False])
        .group_by(PAIR, maintain_order=True)
        .agg(pl.format("{} ({} of {})", "name", "count", "total").head(FAVOURITES).alias("likes"))
        .with_columns(likes=pl.format("Likes {}.", pl.col("likes").list.join(", ")))
    )


def habit(before: pl.DataFrame, usual: float | None) -> pl.DataFrame:
    """`habit`: the mean rating, and whether it is half a star above or below what is usual."""
    mean = before.group_by(PAIR).agg(mean=pl.col("rating").mean())
    apart = pl.col("mean") - (0.0 if usual is None else usual)
    words = (
        pl.when(apart >= HALF_STAR)
        .then(pl.lit("generously"))
        .when(apart <= -HALF_STAR)
        .then(pl.lit("strictly"))
        .otherwise(pl.lit("like most"))
    )
    text = pl.format("Rates {}, {} on average.", words, pl.col("mean").round(1))
    return mean.select(*PAIR, habit=pl.when(pl.col("mean").is_not_null() & pl.lit(usual is not None)).then(text))


def rhythm(before: pl.DataFrame) -> pl.DataFrame:
    """`rhythm`: the median time between interactions, in words."""
    gaps = pl.col("gap").drop_nulls()
    median = before.group_by(PAIR).agg(days=gaps.median(), n=gaps.len())
    text = pl.when(pl.col("days") < HALF_DAY).then(pl.lit("Chooses several in a day."))
    for size, unit, upto in ((1, "day", 14), (7, "week", 60), (30, "month", 720), (365, "year", float("inf"))):
        count = (pl.col("days") / size).round().cast(pl.Int64)
        words = pl.when(count == 1).then(pl.lit(unit)).otherwise(pl.format(f"{{}} {unit}s", count))
        text = text.when(pl.col("days") < upto).then(pl.format("Chooses something about every {}.", words))
    return median.select(*PAIR, rhythm=pl.when(pl.col("n") >= MIN_GAPS).then(text))


def _short(category: str) -> str:
    return clean(category, CATEGORY_CHARS)
