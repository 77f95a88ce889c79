"""The data card: what a dataset looks like in some forty figures, from the tables that ingest publishes.

Knows neither files nor datasets. Nothing in it names a user, and of the items only reasons of rejects may.
"""

from __future__ import annotations

from datetime import UTC, datetime

import dataframely as dy
import numpy as np
import polars as pl

LENGTHS = (0, 10, 25, 50, 75, 90, 99, 100)  # per cent of the users with a history this short or shorter
TOPS = (1, 5, 10, 20, 50)  # per cent of the items, the most popular
MOST_REASONS, MOST_WORDS = 20, 12  # of rejects: text from the files may stand in a reason
PARTICULAR = r"`[^`]*`|\d+"  # what differs between two rejects of one kind

Rows = list[tuple[str, str, float | None]]


class DataCard(dy.Schema):
    metric = dy.String(primary_key=True)
    detail = dy.String(primary_key=True)  # which of several: a quantile, a share of the items, a reason; else empty
    value = dy.Float64(nullable=True)


def card(items: pl.DataFrame, interactions: pl.DataFrame, waiting: pl.DataFrame, rejects: pl.DataFrame) -> pl.DataFrame:
    """The rows of `DataCard`, of tables as ingest publishes them.

    users, items, interactions   counts; items `in all` and `with interactions`, interactions `in all`, `liked`, `rated`
    sparsity                     share of the pairs of these users and items that never met
    repeated_pairs               interactions with an item the user had met before
    history_length               interactions per user: mean and quantiles (the smallest that is not below the share)
    popularity_share             share of the interactions that the most popular items have; popularity_gini: 0 where all
                                 items with interactions have equally many, towards 1 where one has all
    missing                      items without a title, a picture, a description
    time                         first and last, in seconds since 1970, the date as detail; interactions without a time
    waiting                      users of whom all interactions, and interactions that, a rule of ingest holds back
    rejects                      rows that cannot be used, by the first words of the reason
    """
    users = interactions["user_id"].value_counts(sort=True)["count"].to_numpy()
    popular = interactions["item_id"].value_counts(sort=True)["count"].to_numpy()
    user, item = (pl.col(name).cast(pl.Categorical).to_physical().cast(pl.UInt64) for name in ("user_id", "item_id"))
    pairs = interactions.select((user * 2**32 + item).n_unique()).item()  # six times as fast as of two columns
    cells = len(users) * len(popular)
    rows: Rows = [
        ("users", "", len(users)),
        ("items", "in all", items.height),
        ("items", "with interactions", len(popular)),
        ("interactions", "in all", interactions.height),
        ("interactions", "liked", int(interactions["liked"].sum())),
        ("interactions", "rated", interactions["rating"].count()),
        ("sparsity", "", 1 - pairs / cells if cells else None),
        ("repeated_pairs", "", interactions.height - pairs),
        *lengths(users),
        *popularity(popular),
        *(("missing", name, items[column].null_count()) for name, column in MISSING),
        *times(interactions["at"]),
        ("waiting", "users", waiting.join(interactions, on="user_id", how="anti")["user_id"].n_unique()),
        ("waiting", "interactions", waiting.height),
        *reasons(rejects["reason"]),
    ]
    schema = {name: column.dtype for name, column in DataCard.columns().items()}
    told = [(metric, detail, None if value is None else float(value)) for metric, detail, value in rows]
    return pl.DataFrame(told, schema=schema, orient="row")


MISSING = (("title", "title"), ("picture", "image_uri"), ("description", "description"))


def lengths(users: np.ndarray) -> Rows:
    """Mean and quantiles of the interactions per user; none without users."""
    if not len(users):
        return []
    quantiles = np.percentile(users, LENGTHS, method="inverted_cdf")
    rows: Rows = [("history_length", f"{share} %", value) for share, value in zip(LENGTHS, quantiles, strict=True)]
    return [("history_length", "mean", round(users.mean(), 6)), *rows]


def popularity(counts: np.ndarray) -> Rows:
    """Shares of the top items and the Gini coefficient, of the interactions of each item, the most popular first."""
    n, total = len(counts), counts.sum()
    if not n:
        return []
    shares: Rows = [
        ("popularity_share", f"top {top} %", round(counts[: -(-n * top // 100)].sum() / total, 6)) for top in TOPS
    ]
    ascending = counts[::-1] * np.arange(1, n + 1)
    gini = 2 * ascending.sum() / (n * total) - (n + 1) / n
    return [*shares, ("popularity_gini", "", round(gini, 6))]


def times(at: pl.Series) -> Rows:
    """First and last time, and the number of rows without one."""
    rows: Rows = [("time", "interactions without", at.null_count())]
    known = at.drop_nulls().dt.epoch("s")
    for name, second in (("first", known.min()), ("last", known.max())):
        if isinstance(second, int):
            said = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%d %H:%M")
            rows.append(("time", f"{name}: {said} UTC", second))
    return rows


def reasons(rejects: pl.Series) -> Rows:
    """Rejects by reason, the commonest first, with what differs between two of one kind as dots."""
    kind = rejects.str.replace_all(PARTICULAR, "…").str.split(" ").list.head(MOST_WORDS).list.join(" ")
    counted = kind.value_counts(name="n").sort("n", "reason", descending=[True, False])
    rows: Rows = [("rejects", reason, n) for reason, n in counted.head(MOST_REASONS).iter_rows()]
    rest = int(counted["n"].slice(MOST_REASONS).sum())
    other: Rows = [("rejects", "other reasons", rest)] if rest else []
    return [*rows, *other]
