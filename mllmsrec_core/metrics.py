"""Ranking metrics under ties, AUC, and bootstrap intervals over users.

A list is one target's candidates: one positive and its negatives. Equal scores are ordered at random in expectation:
the positive's rank is uniform over the interval its ties span, and every metric is the mean over that interval. So a
constant scorer has AUC 0.5 and HR@K of exactly K / N, where sorting alone would give it 0 or 1, as the input happens to
lie. A missing answer (null or NaN) ranks last, tied with the other missing ones. With one positive per list HR@K equals
Recall@K and the ideal DCG is 1. Sampled candidate lists are comparable only within one candidate set (Krichene &
Rendle, 10.1145/3535335). Knows nothing of where scores come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]

KS = (1, 3, 5, 10)
RESAMPLES = 1000  # the usual number for 95 % percentile intervals
LEVEL = 0.95
LIST = ("user_id", "target_seq")


def strength(score: pl.Expr) -> pl.Expr:
    """The score to compare by: a missing one is below every other."""
    return score.cast(pl.Float64).fill_nan(None).fill_null(float("-inf"))


def expected_rank(score: pl.Expr) -> pl.Expr:
    """The mean rank (from 1, best first) over all orders of equal scores; for use with `.over(list)`."""
    return strength(score).rank("average", descending=True)


@dataclass(frozen=True)
class Lists:
    """One entry per list, in the order of (user_id, target_seq): the positive's place among its negatives."""

    greater: Floats  # negatives above the positive
    equal: Floats  # negatives tied with it
    negatives: Floats
    missing: Floats  # share of the list's candidates without a score


def lists(candidates: pl.DataFrame, scorer: str) -> Lists:
    """The rank intervals of `candidates` (user_id, target_seq, label, and scores in column `scorer`)."""
    score, positive = strength(pl.col(scorer)), strength(pl.col(scorer).filter("label").first())
    negative = ~pl.col("label")
    found = (
        candidates.group_by(LIST)
        .agg(
            greater=(negative & (score > positive)).sum(),
            equal=(negative & (score == positive)).sum(),
            negatives=negative.sum(),
            missing=score.is_infinite().mean(),
            positives=pl.col("label").sum(),
        )
        .sort(LIST)
    )
    assert (found["positives"] == 1).all(), "a list holds exactly one positive"
    return Lists(*(found[c].cast(pl.Float64).to_numpy() for c in ("greater", "equal", "negatives", "missing")))


def expected(place: Lists, gain: Floats, k: int) -> Floats:
    """Each list's mean of gain[rank - 1] (0 beyond `k`) over the ranks its tie interval spans."""
    total = np.concatenate([[0.0], np.cumsum(gain[:k])])
    low = np.minimum(place.greater, k).astype(int)
    high = np.minimum(place.greater + place.equal + 1, k).astype(int)
    return (total[high] - total[low]) / (place.equal + 1)


def list_metrics(place: Lists, ks: Sequence[int] = KS) -> dict[tuple[str, int], Floats]:
    """(metric, k) -> one value per list: HR, NDCG and MRR at each k; AUC under k = 0, NaN without negatives."""
    ranks = np.arange(1, max(ks) + 1)
    values: dict[tuple[str, int], Floats] = {}
    for k in ks:
        values["hr", k] = expected(place, np.ones(len(ranks)), k)
        values["ndcg", k] = expected(place, 1 / np.log2(1 + ranks), k)
        values["mrr", k] = expected(place, 1 / ranks, k)
    with np.errstate(invalid="ignore"):
        values["auc", 0] = 1 - (place.greater + place.equal / 2) / place.negatives
    return values


def pooled_auc(labels: NDArray[np.bool_], scores: Floats) -> float:
    """The chance that any positive scores above any negative, ties counted half; NaN if one is absent."""
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def resamples(n_users: int, n: int, seed: int) -> Iterator[Floats]:
    """`n` bootstrap draws of users, as how often each is drawn; in blocks of 50 rows, to bound memory."""
    random = np.random.default_rng(seed)
    for start in range(0, n, 50):
        rows = min(50, n - start)
        drawn = random.integers(0, n_users, (rows, n_users)) + n_users * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n_users).reshape(rows, n_users).astype(float)


def interval(draws: Floats) -> tuple[Floats, Floats]:
    """Percentile bounds of each column, blind to draws that held no list; NaN where none held any."""
    known = ~np.isnan(draws).all(axis=0)
    bounds = np.full((2, draws.shape[1]), np.nan)
    bounds[:, known] = np.nanquantile(draws[:, known], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return bounds[0], bounds[1]


def by_user(users: NDArray[np.int64], values: NDArray) -> Floats:
    """Sums of the rows of `values` (rows x columns) per user; `users` ascend from 0 without gaps."""
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    return np.add.reduceat(values.astype(np.float64), starts, axis=0)


def bootstrap(users: NDArray[np.int64], values: Floats, n: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Mean of each column over its non-NaN rows, with interval bounds from `n` resamples of whole users."""
    known = ~np.isnan(values)
    _, patterns, place = np.unique(np.packbits(known, axis=0), axis=1, return_index=True, return_inverse=True)
    sums, counts = by_user(users, np.where(known, values, 0.0)), by_user(users, known[:, patterns])
    place = place.ravel()  # many columns share their gaps, so their counts are resampled once
    with np.errstate(invalid="ignore"):
        mean = sums.sum(axis=0) / counts.sum(axis=0)[place]
        draws = [(weights @ sums) / (weights @ counts)[:, place] for weights in resamples(len(sums), n, seed)]
    return mean, *interval(np.concatenate(draws))


def pooled_terms(users: NDArray[np.int64], labels: NDArray[np.bool_], scores: Floats) -> Floats:
    """Per user: positives, negatives, wins of its positives over all negatives plus all positives' over its negatives.

    These are the terms of the pooled AUC that are linear in a user's weight (DeLong's components), so that a resample
    costs a product instead of a sort. The term quadratic in one user is of order 1 / n_users and left out.
    """
    ranks, wins = rankdata(scores), np.zeros(len(scores))
    wins[labels] = ranks[labels] - rankdata(scores[labels])  # negatives below, ties half
    wins[~labels] = labels.sum() - (ranks[~labels] - rankdata(scores[~labels]))
    return by_user(users, np.column_stack([labels, ~labels, wins]))


def pooled_intervals(terms: Sequence[Floats], n: int, seed: int) -> list[tuple[float, float]]:
    """For each scorer's `pooled_terms`, the interval of its pooled AUC from the same `n` resamples of users."""
    stacked, draws = np.hstack(terms), []
    wins = stacked[:, 2::3].sum(axis=0) / 2
    for weights in resamples(len(stacked), n, seed):
        totals = weights @ stacked
        with np.errstate(invalid="ignore"):
            draws.append((totals[:, 2::3] - wins) / (totals[:, 0::3] * totals[:, 1::3]))
    low, high = interval(np.concatenate(draws))
    return list(zip(low.clip(0, 1).tolist(), high.clip(0, 1).tolist(), strict=True))


def user_codes(keys: pl.Series) -> NDArray[np.int64]:
    """Each row's user as a number from 0, in the order of user_id."""
    return keys.rank("dense").cast(pl.Int64).to_numpy() - 1


def evaluate(
    candidates: pl.DataFrame,
    scorers: Sequence[str],
    slices: Mapping[str, NDArray[np.bool_]] | None = None,
    *,
    ks: Sequence[int] = KS,
    n: int = RESAMPLES,
    seed: int = 0,
) -> pl.DataFrame:
    """scorer, metric, k, slice, value, low, high, n_users, tie_rate, missing_rate for every scorer column and slice.

    `slices` are masks over lists in the order of (user_id, target_seq); an empty slice has no rows. All scorers meet
    the same resamples. `k` is 0 where a metric has no cut-off. `tie_rate` is the share of lists whose positive ties
    with a negative, `missing_rate` that of candidates without a score. Metric "auc" is the mean over lists,
    "auc_pooled" over all candidates together (slice "all" only).
    """
    if candidates.is_empty():
        return pl.DataFrame(schema=METRICS)
    candidates = candidates.sort(LIST)
    keys = candidates.select(LIST).unique(maintain_order=True)
    users = user_codes(keys["user_id"])
    masks = {"all": np.ones(len(keys), bool), **(slices or {})}
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    places = {scorer: lists(candidates, scorer) for scorer in scorers}
    columns = {
        (scorer, name, metric, k): np.where(mask, values, np.nan)
        for scorer, place in places.items()
        for (metric, k), values in list_metrics(place, ks).items()
        for name, mask in masks.items()
    }
    figures = zip(*bootstrap(users, np.column_stack(list(columns.values())), n, seed), strict=True)
    found = dict(zip(columns, figures, strict=True)) | {
        (scorer, "all", "auc_pooled", 0): figure for scorer, figure in _pooled(candidates, scorers, n, seed).items()
    }
    rows = [
        {"slice": name, **_row(scorer, metric, k, *figure), **_about(places[scorer], users, masks[name])}
        for (scorer, name, metric, k), figure in found.items()
    ]
    table = pl.DataFrame(rows, schema=METRICS)
    same = table.filter(pl.col("metric") == "hr").with_columns(metric=pl.lit("recall"))  # one positive per list
    return pl.concat([table, same])


METRICS = {
    "scorer": pl.String,
    "metric": pl.String,
    "k": pl.Int32,
    "slice": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "n_users": pl.Int64,
    "tie_rate": pl.Float64,
    "missing_rate": pl.Float64,
}


def _row(scorer: str, metric: str, k: int, *value_low_high: float) -> dict[str, object]:
    figures = dict(zip(("value", "low", "high"), value_low_high, strict=True))
    known = {name: None if np.isnan(figure) else float(figure) for name, figure in figures.items()}
    return {"scorer": scorer, "metric": metric, "k": k, **known}


def _about(place: Lists, users: NDArray[np.int64], mask: NDArray[np.bool_]) -> dict[str, object]:
    return {
        "n_users": len(np.unique(users[mask])),
        "tie_rate": float((place.equal[mask] > 0).mean()),
        "missing_rate": float(np.average(place.missing[mask], weights=place.negatives[mask] + 1)),
    }


def _pooled(candidates: pl.DataFrame, scorers: Sequence[str], n: int, seed: int) -> dict[str, tuple[float, ...]]:
    labels, users = candidates["label"].to_numpy(), user_codes(candidates["user_id"])
    scores = {name: candidates.select(strength(pl.col(name)))[name].to_numpy() for name in scorers}
    terms = [pooled_terms(users, labels, of) for of in scores.values()]
    bounds = pooled_intervals(terms, n, seed)
    return {name: (pooled_auc(labels, of), *bound) for (name, of), bound in zip(scores.items(), bounds, strict=True)}


def paired(
    candidates: pl.DataFrame, scorer: str, other: str, *, ks: Sequence[int] = KS, n: int = RESAMPLES, seed: int = 0
) -> pl.DataFrame:
    """How much better `scorer` is than `other` on the same lists: metric, k, difference, low, high, effect, n_users.

    `effect` is Cohen's d of the users' differences (mean / standard deviation), null where all are equal: with
    thousands of users nearly every difference is significant, so its size is what to read (Ihemelandu & Ekstrand,
    2305.02461).
    """
    keys = candidates.select(LIST).unique().sort(LIST)
    users = user_codes(keys["user_id"])
    ours, theirs = (list_metrics(lists(candidates, name), ks) for name in (scorer, other))
    difference = np.column_stack([ours[name] - theirs[name] for name in ours])
    mean, low, high = bootstrap(users, difference, n, seed)
    sums, counts = by_user(users, np.nan_to_num(difference)), by_user(users, ~np.isnan(difference))
    rows = []
    for column, (metric, k) in enumerate(ours):
        each = (sums[:, column] / np.maximum(counts[:, column], 1))[counts[:, column] > 0]
        spread = each.std(ddof=1) if len(each) > 1 else 0.0
        row = _row(scorer, metric, k, mean[column], low[column], high[column])
        row["difference"] = row.pop("value")
        rows.append(
            {**row, "other": other, "effect": each.mean() / spread if spread > 0 else None, "n_users": len(each)}
        )
    order = ["scorer", "other", "metric", "k", "difference", "low", "high", "effect", "n_users"]
    return pl.DataFrame(rows, infer_schema_length=None).select(order)


FEW = 5  # what a 5-core would have pruned: a user with fewer likes, an item with fewer likers, is cold


def slices(n_history: NDArray, likes: NDArray) -> dict[str, NDArray[np.bool_]]:
    """Masks over lists, by the liked history before the target and by the target item's likes in training."""
    return {
        "cold items": likes < FEW,
        "warm items": likes >= FEW,
        "cold users": n_history < FEW,
        "history 5-9": (n_history >= FEW) & (n_history < 10),
        "history 10-19": (n_history >= 10) & (n_history < 20),
        "history 20+": n_history >= 20,
    }


def calibrated(logits: pl.Series, valid_logits: pl.Series, valid_labels: pl.Series) -> pl.Series:
    """Platt scaling: the probability of a like at each logit, fitted on valid; all null where it cannot be fitted.

    It cannot without answers of both labels, or when all logits are equal. The probability is that of a candidate list
    drawn as valid's are, not a purchase rate: the number of negatives per positive is in it.
    """
    from sklearn.linear_model import LogisticRegression

    known = valid_logits.is_not_null() & valid_logits.is_finite()
    x, y = valid_logits.filter(known).to_numpy(), valid_labels.filter(known).to_numpy()
    if len(np.unique(y)) < 2 or len(np.unique(x)) < 2:
        return pl.Series("p_calibrated", [None] * len(logits), pl.Float64)
    scale = float(np.abs(x - x.mean()).max())  # the default ridge then keeps separable answers finite
    fitted = LogisticRegression().fit((x - x.mean())[:, None] / scale, y)
    given = (logits.fill_null(float("nan")).to_numpy() - x.mean()) / scale
    p = 1 / (1 + np.exp(-(fitted.intercept_[0] + fitted.coef_[0, 0] * given)))
    return pl.Series("p_calibrated", p).fill_nan(None)


def top(scored: pl.DataFrame, k: int) -> pl.DataFrame:
    """Each user's best `k` of (user_id, item_id, score): user_id, rank, item_id, score; ties by item_id, no missing."""
    return (
        scored.drop_nulls("score")
        .sort("user_id", "score", "item_id", descending=[False, True, False])
        .with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over("user_id"))
        .filter(pl.col("rank") <= k)
        .select("user_id", "rank", "item_id", "score")
    )
