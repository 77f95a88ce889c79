"""The report's figures besides the ranking's: training curve, calibration, and the audit in numbers.

Every figure says how many candidates or claims it rests on, and what chance would give. Knows nothing of HTML.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import polars as pl
from markupsafe import Markup

from tasks.report import charts
from tasks.report.shown import Shown

BINS = 10
HISTOGRAM_BINS = 24
MAX_NULL_BINS = 33  # with 16 null pictures a quantile has 17 places, and each gets a bin of its own


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; None where it cannot be had."""

    value: float | None
    low: float | None
    high: float | None


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
