"""How well the candidates were ranked: metrics beside chance and baselines, and the differences between them.

Every figure says how many users and lists it rests on. Differences are paired: the model and a baseline on the very
same lists, users resampled together, which tells apart what two separate intervals cannot. Knows nothing of HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import polars as pl
from markupsafe import Markup

from mllmsrec_core import baselines, protocol
from mllmsrec_core import metrics as measures
from tasks.report import charts
from tasks.report.figures import Interval
from tasks.report.shown import Shown

SCORERS = {"model": "model", "itemknn": "ItemKNN", "popularity": "popularity", "random": "random"}  # in this order
NAMES = {"hr": "HR", "ndcg": "NDCG", "mrr": "MRR", "auc": "AUC", "auc_pooled": "AUC, pooled", "recall": "Recall"}
# Recall equals HR with one positive in a list, and at 1 so do NDCG and MRR; the table `metrics` holds the rest.
SHOWN = (
    ("auc", 0), ("auc_pooled", 0), ("hr", 1), ("hr", 5), ("hr", 10), ("ndcg", 5), ("ndcg", 10), ("mrr", 10),
)  # fmt: skip
SLICES = ("all", "cold items", "warm items", "cold users", "history 5-9", "history 10-19", "history 20+")
FEW_USERS = 10  # a bootstrap over fewer users has an interval that says too little, down to none for one user


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
class Difference:
    """The model minus one baseline on the same lists; `effect` is Cohen's d of the users' AUC differences."""

    other: str
    cells: tuple[Interval, ...]
    effect: float | None
    n_users: int


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
    difference_columns: tuple[str, ...]
    differences: tuple[Difference, ...]  # none where the tables they are computed from are not the ones scored with


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
    k = cut_off(sorted(whole.filter(pl.col("metric") == "hr")["k"].unique().to_list()), sizes)
    compared = [("auc", 0), ("hr", k), ("ndcg", k)]
    differences = paired(shown, [name for name in scorers if name != "model"], compared)
    rows = tuple(_scorer_row(whole.filter(pl.col("scorer") == name), name, columns) for name in scorers)
    return Metrics(
        _interval_chart(whole, scorers, compared),
        tuple(label(*column) for column in columns),
        rows,
        tuple(_slices(table, scorers)),
        tuple(SCORERS.get(name, name) for name in scorers),
        rows[0].n_users,
        n_lists,
        sizes,
        str(whole["candidate_set"][0]),
        tuple((f"HR@{k}", value) for k, value in _chance(whole)),
        tuple(verdicts(whole, scorers, differences)),
        tuple(label(*column) for column in compared),
        tuple(differences),
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
    """The largest K below a third of the list: where HR@K still tells scorers apart; 0 where there is no K."""
    fitting = [k for k in ks if sizes is None or 3 * k <= sizes[1]]
    return max(fitting) if fitting else min(ks, default=0)


def _interval_chart(whole: pl.DataFrame, scorers: list[str], compared: Sequence[tuple[str, int]]) -> Markup:
    panels = []
    for metric, k in compared:
        rows = whole.filter(pl.col("metric") == metric, pl.col("k") == k).drop_nulls("value")
        if rows.is_empty():
            continue
        random = rows.filter(pl.col("scorer") == "random")["value"]
        chance = 0.5 if metric == "auc" else random[0] if len(random) else None
        rows = rows.select(pl.col("scorer").replace(SCORERS), "value", "low", "high")
        panels.append((label(metric, k), chance, rows.to_dicts()))
    return charts.intervals(panels, [SCORERS.get(name, name) for name in scorers]) if panels else Markup("")


# --- differences ----------------------------------------------------------------------------------------------------


def paired(shown: Shown, others: Sequence[str], columns: Sequence[tuple[str, int]]) -> list[Difference]:
    """The model minus each of `others`, with 95 % bounds from resampling users of the very same lists.

    The baselines are scored again, so nothing is said where the tables shown are not the ones the scores were made of,
    or of a scorer that is none of our baselines.
    """
    together = beside_baselines(shown)
    if together is None:
        return []
    found = []
    for other in (name for name in others if name in together.columns):
        rows = measures.paired(together, "model", other, ks=[k for _, k in columns if k] or [1])
        by_column = {(row["metric"], row["k"]): row for row in rows.iter_rows(named=True)}
        cells = [by_column.get(column, {}) for column in columns]
        auc = by_column["auc", 0]
        intervals = tuple(Interval(cell.get("difference"), cell.get("low"), cell.get("high")) for cell in cells)
        found.append(Difference(SCORERS.get(other, other), intervals, auc["effect"], auc["n_users"]))
    return found


def beside_baselines(shown: Shown) -> pl.DataFrame | None:
    """The test candidates with the scores of the model and each baseline; None where they cannot be had again."""
    tables = shown.tables("scores", "interactions", "examples")
    if tables is None or "score" in shown.stale():
        return None
    scores, interactions, examples = tables
    test = scores.filter(pl.col("split") == "test")
    if test.is_empty():
        return None
    known = protocol.training(interactions, examples, _valid_from(shown))
    return test.select("user_id", "target_seq", "item_id", "label", model="logit").with_columns(
        random=pl.Series(baselines.random(test)),
        popularity=pl.Series(baselines.popularity(test, known)),
        itemknn=pl.Series(baselines.itemknn(test, interactions, known)),
    )


def _valid_from(shown: Shown) -> date | None:
    """Where a global-time split of the scored examples begins; None for the last items of each user."""
    said = shown.stages["score"]["parts"]["params"].get("examples", {}).get("valid_from")
    return date.fromisoformat(said) if said else None


def verdicts(whole: pl.DataFrame, scorers: Sequence[str], differences: Sequence[Difference] = ()) -> list[str]:
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
    on_same_lists = {one.other: one.cells[0] for one in differences}
    for name in scorers:
        other, called = auc.get(name), SCORERS.get(name, name)
        if name in ("model", "random") or not other or other["low"] is None:
            continue
        difference = on_same_lists.get(called)
        if difference is not None and difference.low is not None:
            said.append(_beside(difference, called, other["value"]))
        else:
            said.append(_against(model, called, other))
    return said


def _beside(difference: Interval, name: str, value: float) -> str:
    assert difference.value is not None and difference.low is not None and difference.high is not None
    figures = f"{name}, whose AUC is {value:.3f}, by {abs(difference.value):.3f} on the same lists"
    bounds = f"the difference is {difference.low:+.3f} to {difference.high:+.3f}"
    if difference.low > 0:
        return f"It is above {figures}: {bounds}."
    if difference.high < 0:
        return f"It is below {figures}: {bounds}."
    return f"It cannot be told from {name}, whose AUC is {value:.3f}: on the same lists {bounds}, which holds 0."


def _against(model: dict[str, Any], name: str, other: dict[str, Any]) -> str:
    figures = f"{other['value']:.3f} ({other['low']:.3f} to {other['high']:.3f})"
    if model["low"] > other["high"]:
        return f"It is above {name}, whose AUC is {figures}: the intervals do not overlap."
    if model["high"] < other["low"]:
        return f"It is below {name}, whose AUC is {figures}: the intervals do not overlap."
    return f"Its interval overlaps that of {name}, {figures}: this run does not settle which is better."
