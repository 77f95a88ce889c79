"""What a run leaves on its page in Prefect: the plan, what became of each stage, data card, metrics, lineage, report.

Each artifact's key names the dataset and the environment, so that Prefect keeps the history of each. They show what the
store holds and decide nothing: a server that is away costs a line in the log. Knows nothing of order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import polars as pl
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger

from mllmsrec_core.errors import MllmsrecError
from mllmsrec_core.plan import cause
from storage.store import Store
from tasks import failures
from tasks.child import Told, why_due
from tasks.config import Config, Options
from tasks.report.shown import Shown

LATER = "is looked at when it begins"
STANDS = "stands, if nothing upstream of it changes"
HEADLINE = (("auc", 0), ("ndcg", 10), ("hr", 10))  # of the metrics: the figures beside the report
COUNTS = {
    "asked": "asked",
    "asked_by_shards": "by shards",
    "known": "known",
    "carried": "carried over",
    "failed": "failed",
}
DIGEST = 12  # characters of a digest that are shown


def artifact_key(kind: str, config: Config, sample: int = 0) -> str:
    """Prefect allows lower-case letters, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", f"{kind}-{config.shown_as(sample)}".lower()).strip("-")


def show_plan(config: Config, options: Options, before: Mapping[str, Any], names: Sequence[str]) -> None:
    """What is due and why, before the first stage; as `plan` says it, without counting a single row."""

    def why(name: str) -> tuple[str, str]:
        if name not in before:
            return "due", "never run"
        said = why_due(Told(config.to_json(), name, before, before, options))
        return ("", LATER) if said is None else ("due", said) if said else ("", STANDS)

    _show(
        lambda: create_markdown_artifact(
            table(("stage", "", "why"), [(name, *why(name)) for name in names]),
            key=artifact_key("plan", config, options.sample),
            description="what is due as the run begins; `mllmsrec plan` says how much, too",
        )
    )


def show_made(
    config: Config, options: Options, env: str, before: Mapping[str, Any], made: Mapping[str, Any], reused: set[str]
) -> None:
    """What became of each stage, where every table comes from, and the data card and metrics that were published."""

    def key(kind: str) -> str:
        return artifact_key(kind, config, options.sample)

    def tables() -> None:
        shown = Shown(_store(config), env)
        create_markdown_artifact(funnel(before, made, reused), key=key("stages"), description="what the stages did")
        create_markdown_artifact(
            lineage(shown), key=key("lineage"), description="what every table of the environment was made of"
        )
        if "ingest" in made and (card := rows_of(shown, "data_card")):
            create_table_artifact(card, key=key("data-card"), description="the dataset in figures")
        if "score" in made and (metrics := rows_of(shown, "metrics", slice="all")):
            create_table_artifact(metrics, key=key("metrics"), description="on the test split, with 95 % intervals")

    _show(tables)


def show_report(config: Config, options: Options, env: str, path: str) -> None:
    """Where the report is, and its figures in short."""

    def report() -> None:
        shown = Shown(_store(config), env)
        lines = [f"### {config.place}, state {shown.seq}", f"The report: `{path}`", headline(shown)]
        create_markdown_artifact(
            "\n\n".join(line for line in lines if line),
            key=artifact_key("report", config, options.sample),
            description="the report's place and its figures in short",
        )
        create_link_artifact(
            path if "://" in path else f"file://{path}",
            "the report",
            key=artifact_key("report-link", config, options.sample),
            description="opens where the browser sees the store",
        )

    _show(report)


def funnel(before: Mapping[str, Any], made: Mapping[str, Any], reused: set[str]) -> str:
    """One line per table that the run shows: reused or why it was made, its rows, and what that took."""
    lines = []
    for name, record in made.items():
        counts = {**record["counts"], "failed": sum(failures.counts(record).values())}
        last = before.get(name)
        why = "reused" if name in reused else cause(record["parts"], last and last["parts"])
        numbers = (*(counts.get(count, 0) for count in COUNTS), record["seconds"])
        lines += [(name, table, pointer["rows"], why, *numbers) for table, pointer in record["tables"].items()]
    return table(("stage", "table", "rows", "why", *COUNTS.values(), "seconds"), lines)


def lineage(shown: Shown) -> str:
    """One line per table of the environment: what it was made of, by digest, and where it lies, by write id."""
    adapters = {row["name"]: row["sha256"] for row in rows_of(shown, "adapters")}
    lines = []
    for name, record in shown.stages.items():
        parts, counts = record["parts"], record["counts"]
        reads = ", ".join(f"{table} {digest[:DIGEST]}" for table, digest in parts["inputs"].items())
        model = parts["model"]
        for made, pointer in record["tables"].items():
            lines.append(
                (
                    *(name, f"{made} {pointer['digest'][:DIGEST]}", pointer["rows"], pointer["write_id"], reads or "-"),
                    f"{model['name']}@{model['revision'][:DIGEST]}" if model else "-",
                    *(counts["asked"], counts["known"], record["at"]),
                )
            )
    heads = ("stage", "table and digest", "rows", "write id", "reads", "model", "asked", "known", "made")
    worn = ", ".join(f"{name} {sha256[:DIGEST]}" for name, sha256 in adapters.items() if sha256)
    return table(heads, lines) + (f"\n\nAdapter of the scoring model: {worn}" if worn else "")


def headline(shown: Shown) -> str:
    """The model's main metrics beside those of the baselines; empty without metrics."""
    found = {(row["scorer"], row["metric"], row["k"]): row for row in rows_of(shown, "metrics", slice="all")}
    names = [pair for pair in HEADLINE if ("model", *pair) in found]
    if not names:
        return ""
    scorers = dict.fromkeys(scorer for scorer, _, _ in found)
    lines = [(scorer, *(_interval(found.get((scorer, *pair))) for pair in names)) for scorer in scorers]
    return table(("scorer", *(metric_name(*pair) for pair in names)), lines)


def metric_name(metric: str, k: int) -> str:
    """`ndcg@10`; without a cut-off `auc`."""
    return f"{metric}@{k}" if k else metric


def model_metrics(store: Store, env: str) -> dict[str, dict[str, Any]]:
    """The model's metrics over all test users, by name, as the table has them."""
    found = rows_of(Shown(store, env), "metrics", slice="all", scorer="model")
    return {metric_name(row["metric"], row["k"]): row for row in found}


def rows_of(shown: Shown, name: str, **equal: str) -> list[dict[str, Any]]:
    """The rows of a small published table as plain values; none where it is not there."""
    frame = shown.table(name)
    if frame is None:
        return []
    for column, value in equal.items():
        frame = frame.filter(pl.col(column) == value)
    return frame.drop("ask", "error", "stale_since", strict=False).to_dicts()


def table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def _interval(row: Mapping[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "-"
    if row["low"] is None or row["high"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _store(config: Config) -> Store:
    return Store(config.settings.store, options=config.settings.storage_options)


def _show(create: Callable[[], Any]) -> None:
    """What a page shows must not end a run: a server that is away, or a table that is gone, is said in the log."""
    try:
        create()
    except MllmsrecError as error:
        get_run_logger().warning("an artifact is missing: %s", error)
    except Exception as error:
        get_run_logger().warning("an artifact is missing: %s: %s", type(error).__name__, error)
