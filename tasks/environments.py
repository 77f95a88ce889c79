"""Moving environments on purpose: promote one to another, roll one back, set two side by side.

An environment is a list of pointers, so nothing here copies a table or asks a model. Whole tables are a condition that
nothing overrides: an environment never comes to show what is not there. Knows nothing of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from mllmsrec_core import metrics
from mllmsrec_core.errors import StoreError, UsageError, nearest
from storage.store import Store

Stages = Mapping[str, Any]
PAIR = ("user_id", "target_seq", "item_id")


# --- promote and roll back ------------------------------------------------------------------------------------------


def promote(store: Store, source: str, target: str, min_coverage: float, force: bool = False) -> int:
    """Let `target` show exactly what `source` shows; returns the number of its state, the old one if nothing changed.

    Raises UsageError when `source` is empty, when files of its tables are gone, and, unless `force`, when a stage has
    less than `min_coverage` of its rows up to date.
    """
    if source == target:
        raise UsageError(f"environment `{source}` shows what it shows already; name two: mllmsrec promote dev prod")
    now = shown(store, source)
    if broken := gone(store, now["stages"]):
        raise UsageError(
            f"environment `{source}` ({now['seq']}) cannot be promoted: files of {', '.join(broken)} are gone. "
            f"Make them again from the replies: mllmsrec run --env {source}"
        )
    low = {name: part for name, record in now["stages"].items() if (part := coverage(record)) < min_coverage}
    if low and not force:
        found = ", ".join(f"{name} {100 * part:.1f} %" for name, part in low.items())
        raise UsageError(
            f"environment `{source}` ({now['seq']}) has fewer rows up to date than the {100 * min_coverage:g} % that are "
            f"asked for: {found}. Bring it up to date (mllmsrec run --env {source}), or promote it as it is "
            f"(mllmsrec promote {source} {target} --force)"
        )
    return store.envs.replace(target, now["stages"], f"promoted from {source} {now['seq']}")


def rollback(store: Store, name: str, to: int | None = None) -> int:
    """Let the environment show again what its state `to` showed, by default the one before the newest.

    The state is written under the next number, so a roll-back is rolled back the same way. Returns that number.
    Raises UsageError when there is no such state, or files of its tables are gone.
    """
    shown(store, name)
    states = {state["seq"]: state for state in store.envs.history(name)}
    newest = max(states)
    earlier = [seq for seq in states if seq != newest]
    if to is None and not earlier:
        raise UsageError(f"environment `{name}` has one state only, {newest}: there is nothing to roll back to")
    to = max(earlier) if to is None else to
    if to not in states:
        known = ", ".join(str(seq) for seq in sorted(states)[-10:])
        raise UsageError(
            f"environment `{name}` has no state {to}; the newest ones: {known}. See: mllmsrec history --env {name}"
        )
    if broken := gone(store, states[to]["stages"]):
        raise UsageError(
            f"environment `{name}` cannot go back to {to}: files of {', '.join(broken)} are gone. Choose another: "
            f"mllmsrec history --env {name}"
        )
    return store.envs.replace(name, states[to]["stages"], f"rolled back to {to}")


def shown(store: Store, name: str) -> dict[str, Any]:
    """The environment's state. Raises UsageError, with the nearest name, when nothing was ever published to it."""
    now = store.envs.current(name)
    if not now["stages"]:
        names = store.envs.names()
        hint = nearest(name, names) if names else "nothing was ever published here; `mllmsrec demo` does"
        raise UsageError(f"environment `{name}` of {store.url} is empty; {hint}")
    return now


def coverage(record: Mapping[str, Any]) -> float:
    """Share of a stage's rows that are up to date."""
    return record.get("coverage", 1.0)


def gone(store: Store, stages: Stages) -> list[str]:
    """Tables of these records whose files are not all there."""
    return [
        table
        for record in stages.values()
        for table, pointer in record["tables"].items()
        if not store.tables.whole(table, pointer["write_id"])
    ]


# --- compare --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableRow:
    """One table in both environments; rows are None where it is absent."""

    stage: str
    table: str
    rows: tuple[int | None, int | None]
    equal: bool


@dataclass(frozen=True)
class ParamRow:
    """A parameter (`caption.prompt`, `caption: model`) whose values differ; None where the stage has not run."""

    name: str
    values: tuple[Any, Any]


@dataclass(frozen=True)
class MetricRow:
    """A figure of both environments as (value, low, high), and second minus first.

    `low` and `high` bound the difference by resampling users of the very same lists; they are None where the lists
    differ or only the figures are kept, as for the baselines.
    """

    scorer: str
    metric: str
    k: int
    figures: tuple[tuple[float | None, ...], tuple[float | None, ...]]
    difference: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two environments side by side. `same_lists`: both ranked the same candidates, so that figures can be compared."""

    names: tuple[str, str]
    seqs: tuple[int, int]
    tables: tuple[TableRow, ...]
    params: tuple[ParamRow, ...]
    metrics: tuple[MetricRow, ...]
    same_lists: bool


def compare(store: Store, a: str, b: str) -> Comparison:
    """Tables, parameters that differ, and metrics of two environments, differences being `b` minus `a`.

    Raises UsageError when one of them is empty.
    """
    states = shown(store, a), shown(store, b)
    first, second = (state["stages"] for state in states)
    together = _together(_read(store, first, "scores"), _read(store, second, "scores"))
    figures = _read(store, first, "metrics"), _read(store, second, "metrics")
    return Comparison(
        (a, b),
        (states[0]["seq"], states[1]["seq"]),
        tuple(_tables(first, second)),
        tuple(_params(first, second)),
        tuple(_metrics(*figures, together)),
        together is not None,
    )


def _tables(first: Stages, second: Stages) -> list[TableRow]:
    rows = []
    for stage in dict.fromkeys([*first, *second]):
        pair = [stages.get(stage, {"tables": {}})["tables"] for stages in (first, second)]
        for table in dict.fromkeys([*pair[0], *pair[1]]):
            a, b = (tables.get(table) for tables in pair)
            counts = (a and a["rows"], b and b["rows"])
            rows.append(TableRow(stage, table, counts, bool(a and b and a["digest"] == b["digest"])))
    return rows


def _params(first: Stages, second: Stages) -> list[ParamRow]:
    ours, theirs = (
        {name: value for stage, record in stages.items() for name, value in _settled(stage, record["parts"]).items()}
        for stages in (first, second)
    )
    names = dict.fromkeys([*ours, *theirs])
    return [ParamRow(n, (ours.get(n), theirs.get(n))) for n in names if ours.get(n) != theirs.get(n)]


def _settled(stage: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What was decided for a stage, by the name a profile gives it; its model is told apart down to the revision."""
    own = parts["params"].get(stage, {})
    found = {f"{stage}.{name}": value for name, value in own.items() if name != "model"}
    if model := parts.get("model"):
        how = [model["dtype"], model["quantisation"]]
        found[f"{stage}: model"] = ", ".join(
            [f"{model['name']}@{model['revision'][:12]}", *(word for word in how if word != "none")]
        )
    return found | ({f"{stage}: sample": parts["sample"]} if parts.get("sample") else {})


def _metrics(first: pl.DataFrame | None, second: pl.DataFrame | None, together: pl.DataFrame | None) -> list[MetricRow]:
    ours, theirs = _figures(first), _figures(second)
    bounds = {} if together is None else _bounds(together)
    rows = []
    for name in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(name, (None, None, None)), theirs.get(name, (None, None, None))
        difference = None if a[0] is None or b[0] is None else b[0] - a[0]
        scorer, metric, k = name
        rows.append(MetricRow(scorer, metric, k, (a, b), difference, *bounds.get(name, (None, None))))
    return rows


def _figures(table: pl.DataFrame | None) -> dict[tuple[str, str, int], tuple[float | None, ...]]:
    """(scorer, metric, k) -> value, low, high over all test users."""
    if table is None:
        return {}
    rows = table.filter(pl.col("slice") == "all").sort("scorer", "metric", "k")
    return {row[:3]: row[3:] for row in rows.select("scorer", "metric", "k", "value", "low", "high").iter_rows()}


def _together(first: pl.DataFrame | None, second: pl.DataFrame | None) -> pl.DataFrame | None:
    """Both models' logits on the test candidates; None unless those are the same."""
    if first is None or second is None:
        return None
    a, b = (scores.filter(pl.col("split") == "test") for scores in (first, second))
    both = a.select(*PAIR, "label", first="logit").join(b.select(*PAIR, "label", second="logit"), on=(*PAIR, "label"))
    return both if 0 < len(both) == len(a) == len(b) else None


def _bounds(together: pl.DataFrame) -> dict[tuple[str, str, int], tuple[float | None, float | None]]:
    found = metrics.paired(together, "second", "first")
    rows = {
        ("model", metric, k): (low, high) for metric, k, low, high in found.select("metric", "k", "low", "high").rows()
    }
    same = {("model", "recall", k): bound for (_, metric, k), bound in rows.items() if metric == "hr"}
    return rows | same  # one positive in a list: recall is HR


def _read(store: Store, stages: Stages, table: str) -> pl.DataFrame | None:
    pointers = {name: pointer for record in stages.values() for name, pointer in record["tables"].items()}
    if table not in pointers:
        return None
    try:
        return store.tables.read(table, pointers[table]["write_id"])
    except StoreError:  # its files are gone: there is nothing to compare
        return None
