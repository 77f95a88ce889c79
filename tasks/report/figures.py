"""The report's figures: training curve, metrics beside chance and baselines, calibration, and the audit in numbers.

Every figure says how many users, lists or claims it rests on, and what chance would give. Knows nothing of HTML.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import polars as pl
from markupsafe import Markup

from tasks.report import charts
from tasks.report.shown import Shown

SCORERS = {"model": "model", "itemknn": "ItemKNN", "popularity": "popularity", "random": "random"}  # in this order
NAMES = {"hr": "HR", "ndcg": "NDCG", "mrr": "MRR", "auc": "AUC", "auc_pooled": "AUC, pooled", "recall": "Recall"}
# Recall equals HR with one positive in a list, and at 1 so do NDCG and MRR; the table `metrics` holds the rest.
SHOWN = (
    ("auc", 0), ("auc_pooled", 0), ("hr", 1), ("hr", 5), ("hr", 10), ("ndcg", 5), ("ndcg", 10), ("mrr", 10),
)  # fmt: skip
SLICES = ("all", "cold items", "warm items", "cold users", "history 5-9", "history 10-19", "history 20+")
FEW_USERS = 10  # a bootstrap over fewer users has an interval that says too little, down to none for one user
BINS = 10
HISTOGRAM_BINS = 24
MAX_NULL_BINS = 33  # with 16 null pictures a quantile has 17 places, and each gets a bin of its own


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; None where it cannot be had."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ScorerRow:
    scorer: str
    cells: tuple[Interval, ...]
    n_users: int
    tie_rate: float
    missing_rate: float


@dataclass(frozen=True)
class Slice:
    name: str
    n_users: int
    few: bool  # too few users for an interval
    cells: tuple[Interval, ...]  # one per scorer


@dataclass(frozen=True)
class Metrics:
    """The metrics table as the page shows it."""

    chart: Markup
    columns: tuple[str, ...]
    rows: tuple[ScorerRow, ...]
    slices: tuple[Slice, ...]
    slice_scorers: tuple[str, ...]
    n_users: int
    n_lists: int | None
    sizes: tuple[int, int] | None  # fewest and most candidates of a list
    candidate_set: str
    chance: tuple[tuple[str, float], ...]
    verdicts: tuple[str, ...]


def in_order(names: Sequence[str]) -> list[str]:
    """Scorers with the model first and chance last; ones this page does not know stand in between."""
    known = list(SCORERS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else 1, name))


def metrics(shown: Shown) -> Metrics | None:
    table = shown.table("metrics")
    if table is None or table.is_empty():
        return None
    whole = table.filter(pl.col("slice") == "all")
    scorers = in_order(whole["scorer"].unique().to_list())
    measured = set(whole.select("metric", "k").iter_rows())
    columns = [column for column in SHOWN if column in measured]
    sizes, n_lists = list_sizes(shown)
    rows = tuple(_scorer_row(whole.filter(pl.col("scorer") == name), name, columns) for name in scorers)
    return Metrics(
        _interval_chart(whole, scorers, sizes),
        tuple(label(*column) for column in columns),
        rows,
        tuple(_slices(table, scorers)),
        tuple(SCORERS.get(name, name) for name in scorers),
        rows[0].n_users,
        n_lists,
        sizes,
        str(whole["candidate_set"][0]),
        tuple((f"HR@{k}", value) for k, value in _chance(whole)),
        tuple(verdicts(whole, scorers)),
    )


def label(metric: str, k: int) -> str:
    return f"{NAMES.get(metric, metric)}@{k}" if k else NAMES.get(metric, metric)


def list_sizes(shown: Shown) -> tuple[tuple[int, int] | None, int | None]:
    """Fewest and most candidates of a test list, and the number of lists."""
    scores = shown.table("scores")
    if scores is None:
        return None, None
    sizes = scores.filter(pl.col("split") == "test").group_by("user_id", "target_seq").len()["len"]
    return ((int(sizes.min()), int(sizes.max())) if len(sizes) else None), len(sizes)  # type: ignore[arg-type]


def _cell(rows: pl.DataFrame, metric: str, k: int) -> Interval:
    found = rows.filter(pl.col("metric") == metric, pl.col("k") == k)
    return Interval(*found.select("value", "low", "high").row(0)) if len(found) else Interval(None, None, None)


def _scorer_row(rows: pl.DataFrame, scorer: str, columns: list[tuple[str, int]]) -> ScorerRow:
    one = rows.row(0, named=True)
    cells = tuple(_cell(rows, *column) for column in columns)
    if scorer == "random":  # known exactly: its interval has no width
        cells = tuple(Interval(cell.value, None, None) for cell in cells)
    return ScorerRow(SCORERS.get(scorer, scorer), cells, one["n_users"], one["tie_rate"], one["missing_rate"])


def _slices(table: pl.DataFrame, scorers: list[str]) -> list[Slice]:
    """AUC per slice: the metric that depends least on how many candidates there are."""
    auc = table.filter(pl.col("metric") == "auc")
    names = auc["slice"].unique().to_list()
    found = []
    for name in sorted(names, key=lambda name: (SLICES.index(name) if name in SLICES else len(SLICES), name)):
        rows = auc.filter(pl.col("slice") == name)
        n_users = rows["n_users"][0]
        cells = [_cell(rows.filter(pl.col("scorer") == scorer), "auc", 0) for scorer in scorers]
        narrow = [n_users < FEW_USERS or scorer == "random" for scorer in scorers]
        cells = [Interval(x.value, None, None) if bare else x for x, bare in zip(cells, narrow, strict=True)]
        found.append(Slice(name, n_users, n_users < FEW_USERS, tuple(cells)))
    return found


def _chance(whole: pl.DataFrame) -> list[tuple[int, float]]:
    """HR@K of a constant scorer: the mean of K / N over the lists."""
    rows = whole.filter(pl.col("scorer") == "random", pl.col("metric") == "hr").sort("k")
    return list(rows.select("k", "value").iter_rows())


def cut_off(ks: list[int], sizes: tuple[int, int] | None) -> int:
    """The largest K below a third of the list: where HR@K still tells scorers apart."""
    fitting = [k for k in ks if sizes is None or 3 * k <= sizes[1]]
    return max(fitting) if fitting else min(ks)


def _interval_chart(whole: pl.DataFrame, scorers: list[str], sizes: tuple[int, int] | None) -> Markup:
    ks = sorted(whole.filter(pl.col("metric") == "hr")["k"].unique().to_list())
    k = cut_off(ks, sizes) if ks else 0
    panels = []
    for metric, at in (("auc", 0), ("hr", k), ("ndcg", k)):
        rows = whole.filter(pl.col("metric") == metric, pl.col("k") == at).drop_nulls("value")
        if rows.is_empty():
            continue
        random = rows.filter(pl.col("scorer") == "random")["value"]
        chance = 0.5 if metric == "auc" else random[0] if len(random) else None
        rows = rows.select(pl.col("scorer").replace(SCORERS), "value", "low", "high")
        panels.append((label(metric, at), chance, rows.to_dicts()))
    return charts.intervals(panels, [SCORERS.get(name, name) for name in scorers]) if panels else Markup("")


def verdicts(whole: pl.DataFrame, scorers: list[str]) -> list[str]:
    """What the intervals allow to be said of the model, and no more."""
    auc = {
        row["scorer"]: row for row in whole.filter(pl.col("metric") == "auc").drop_nulls("value").iter_rows(named=True)
    }
    model = auc.get("model")
    if model is None or model["low"] is None:
        return ["The model has no AUC in this run: nothing can be said of it."]
    span = f"its AUC is {model['value']:.3f}, 95 % interval {model['low']:.3f} to {model['high']:.3f}"
    of_users = f"on {model['n_users']:,} user{'s' if model['n_users'] != 1 else ''}"
    if model["low"] > 0.5:
        said = [f"The model ranks better than chance: {span}, {of_users}."]
    elif model["high"] < 0.5:
        said = [f"The model ranks worse than chance: {span}, {of_users}."]
    else:
        said = [f"The model cannot be told from chance: {span}, {of_users}, and the interval holds 0.5."]
    for name in scorers:
        other = auc.get(name)
        if name not in ("model", "random") and other and other["low"] is not None:
            said.append(_against(model, SCORERS.get(name, name), other))
    return said


def _against(model: dict[str, Any], name: str, other: dict[str, Any]) -> str:
    figures = f"{other['value']:.3f} ({other['low']:.3f} to {other['high']:.3f})"
    if model["low"] > other["high"]:
        return f"It is above {name}, whose AUC is {figures}: the intervals do not overlap."
    if model["high"] < other["low"]:
        return f"It is below {name}, whose AUC is {figures}: the intervals do not overlap."
    return f"Its interval overlaps that of {name}, {figures}: this run does not settle which is better."


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """One adapter and how its training went."""

    name: str
    strategy: str
    base_model: str
    n_examples: int
    recipe: dict[str, Any]
    sha256: str | None
    error: str | None
    charts: tuple[Markup, ...]


def training(shown: Shown) -> list[Training] | None:
    table = shown.table("adapters")
    if table is None:
        return None
    return [
        Training(
            recipe=json.loads(row["recipe"]),
            charts=tuple(_curve_charts(json.loads(row["curves"] or "[]"))),
            **{name: row[name] for name in ("name", "strategy", "base_model", "n_examples", "sha256", "error")},
        )
        for row in table.iter_rows(named=True)
    ]


def _curve_charts(curve: list[dict[str, Any]]) -> list[Markup]:
    """Losses in one chart, shares (accuracy, AUC) in another; the learning rate in neither."""
    rows = [
        {"step": point.get("step", number), "value": float(value), "series": name.replace("_", " ")}
        for number, point in enumerate(curve, 1)
        for name, value in point.items()
        if isinstance(value, int | float) and name not in ("step", "epoch", "lr", "learning_rate", "grad_norm")
    ]
    losses = [row for row in rows if "loss" in row["series"]]
    others = [row for row in rows if "loss" not in row["series"]]
    titled = ((losses, "loss on the answer, nats per token"), (others, "share"))
    return [charts.lines(part, title) for part, title in titled if part]


# --- calibration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brier:
    series: str
    score: float


@dataclass(frozen=True)
class Calibration:
    chart: Markup
    n: int
    base_rate: float
    briers: tuple[Brier, ...]


def calibration(shown: Shown) -> Calibration | None:
    """Reliability of the test probabilities, raw and calibrated; None without answers."""
    scores = shown.table("scores")
    if scores is None:
        return None
    test = scores.filter(pl.col("split") == "test").drop_nulls("p_yes")
    if test.is_empty():
        return None
    series = {"as the model says": "p_yes", "calibrated on valid": "p_calibrated"}
    known = {name: test.drop_nulls(column) for name, column in series.items()}
    known = {name: frame for name, frame in known.items() if len(frame)}
    rows = [row for name, frame in known.items() for row in reliability(frame, series[name], name)]
    base = float(test["label"].cast(pl.Float64).mean())  # type: ignore[arg-type]
    briers = [Brier(name, _brier(frame[series[name]], frame["label"])) for name, frame in known.items()]
    return Calibration(
        charts.reliability(rows), len(test), base, (*briers, Brier("always the base rate", base * (1 - base)))
    )


def _brier(p: pl.Series, label: pl.Series) -> float:
    return float(((p.to_numpy() - label.cast(pl.Float64).to_numpy()) ** 2).mean())


def reliability(frame: pl.DataFrame, column: str, name: str) -> list[dict[str, Any]]:
    """At most `BINS` bins of equal count: mean prediction, observed share with its Wilson interval, n."""
    order = (pl.col(column).rank("average") - 0.5) * BINS / pl.len()
    binned = (
        frame.with_columns(bin=order.floor().cast(pl.Int32))
        .group_by("bin")
        .agg(predicted=pl.col(column).mean(), observed=pl.col("label").mean(), n=pl.len())
        .sort("bin")
    )
    return [
        {"series": name, **row, **dict(zip(("low", "high"), wilson(row["observed"], row["n"]), strict=True))}
        for row in binned.drop("bin").iter_rows(named=True)
    ]


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share."""
    centre, reach = share + z * z / (2 * n), z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - reach) / (1 + z * z / n)), min(1.0, (centre + reach) / (1 + z * z / n))


# --- audit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VerdictRow:
    """Verdict counts of one kind of text; `share` is the unsupported among the judged, with its interval."""

    subject: str
    claims: int
    grounded: int
    unsupported: int
    not_visual: int
    unjudged: int
    share: Interval


@dataclass(frozen=True)
class Audit:
    similarity: Markup | None
    quantile: Markup | None
    rows: tuple[VerdictRow, ...]
    n: int
    null_images: int | None
    grounded_from: float | None


def audit(shown: Shown) -> Audit | None:
    table = shown.table("audit")
    if table is None:
        return None
    params = shown.params("audit")
    judged = table.drop_nulls(["similarity", "verdict"])
    compared = judged.drop_nulls("quantile")
    bins = min((params.get("null_images") or 16) + 1, MAX_NULL_BINS)
    places = (compared, "quantile", bins, "place among other pictures", (0.0, 1.0), len(compared) / bins)
    return Audit(
        _histogram(judged, "similarity", HISTOGRAM_BINS, "cosine of claim and picture") if len(judged) else None,
        _histogram(*places) if len(compared) else None,
        tuple(_verdict_row(rows, str(name)) for (name,), rows in table.group_by("subject", maintain_order=True)),
        len(compared),
        params.get("null_images"),
        params.get("grounded_from"),
    )


def _verdict_row(rows: pl.DataFrame, subject: str) -> VerdictRow:
    verdict = rows["verdict"].cast(pl.String)
    counts = {name: int((verdict == name).sum()) for name in charts.VERDICTS}
    judged = counts["grounded"] + counts["unsupported"]
    share = counts["unsupported"] / judged if judged else None
    reach = wilson(share, judged) if share is not None else (None, None)
    unjudged = int(verdict.is_null().sum())
    return VerdictRow(subject, len(rows), **counts, unjudged=unjudged, share=Interval(share, *reach))


def _histogram(
    claims: pl.DataFrame,
    column: str,
    bins: int,
    title: str,
    span: tuple[float, float] | None = None,
    expected: float | None = None,
) -> Markup:
    """Counted here, so that the chart holds a few bars however many claims there are."""
    values = claims[column].to_numpy()
    edges = np.histogram_bin_edges(values, bins, span)
    rows = []
    for verdict in charts.VERDICTS:
        counts, _ = np.histogram(values[(claims["verdict"].cast(pl.String) == verdict).to_numpy()], edges)
        rows += [
            {"start": float(start), "stop": float(stop), "n": int(n), "verdict": verdict}
            for start, stop, n in zip(edges[:-1], edges[1:], counts, strict=True)
            if n
        ]
    return charts.histogram(rows, title, expected)
