"""The report's data card: what the dataset looks like, from the table that ingest publishes. Knows nothing of HTML."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.report.shown import Shown


@dataclass(frozen=True)
class Bar:
    """A figure with its share of the longest bar beside it."""

    name: str
    value: float
    share: float


@dataclass(frozen=True)
class Card:
    """Facts as (name, figure, what it is); history lengths and shares of popular items as bars."""

    facts: tuple[tuple[str, str, str], ...]
    lengths: tuple[Bar, ...]
    popularity: tuple[Bar, ...]
    compat: str  # the construction other than our own that the histories follow; empty: none


def card(shown: Shown) -> Card | None:
    """None where ingest has not run, or its table is gone."""
    table = shown.table("data_card")
    if table is None:
        return None
    figures = {(metric, detail): value for metric, detail, value in table.iter_rows() if value is not None}
    compat = shown.params("ingest").get("compat", "none")
    lengths = bars(figures, "history_length", max(1.0, figures.get(("history_length", "100 %"), 1.0)))
    return Card(facts(figures), lengths, bars(figures, "popularity_share", 1.0), "" if compat == "none" else compat)


Figures = dict[tuple[str, str], float]


def facts(figures: Figures) -> tuple[tuple[str, str, str], ...]:
    """The small table; a figure the card does not have is left out."""
    counts = (
        ("users", "users", "", "with interactions"),
        ("items", "items", "in all", "in the catalogue"),
        ("items touched", "items", "with interactions", "that any interaction is with"),
        ("interactions", "interactions", "in all", ""),
        ("liked", "interactions", "liked", "of these"),
        ("repeated pairs", "repeated_pairs", "", "interactions with an item that the user had met before"),
        ("without a title", "missing", "title", "items"),
        ("without a picture", "missing", "picture", "items, before any is fetched"),
        ("without a time", "time", "interactions without", "interactions, ordered as their file is"),
        ("users waiting", "waiting", "users", "of whom a rule holds every interaction back (min_history, k_core)"),
        ("interactions waiting", "waiting", "interactions", "kept, and used once the rules let them"),
        ("rejects", "rejects", "", "rows that could not be used, or wait"),
    )
    figures = {**figures, ("rejects", ""): sum(n for (metric, _), n in figures.items() if metric == "rejects")}
    told = [
        (name, f"{figures[metric, detail]:,.0f}", what)
        for name, metric, detail, what in counts
        if (metric, detail) in figures
    ]
    for name, metric, what in (
        ("sparsity", "sparsity", "share of the pairs of these users and items that never met"),
        ("Gini of popularity", "popularity_gini", "0: all items are equally popular; towards 1: one item has it all"),
    ):
        if (metric, "") in figures:
            told.append((name, f"{figures[metric, '']:.4f}", what))
    spans = [detail.partition(": ") for metric, detail in figures if metric == "time"]
    told += [(f"{name} interaction", said, "") for name, colon, said in spans if colon]
    return tuple(told)


def bars(figures: Figures, metric: str, longest: float) -> tuple[Bar, ...]:
    """The quantiles or shares of one metric in the order of their per cent."""
    found = [(detail, value) for (name, detail), value in figures.items() if name == metric and detail.endswith("%")]
    found.sort(key=lambda one: float(one[0].strip("top %")))
    return tuple(Bar(detail, value, value / longest) for detail, value in found)
