"""One stage from its inputs to its published tables and record. Knows nothing of Prefect or of any one stage.

What is the very row published last time is carried over, what is left is asked, and what a run had no time for stays as
it was, marked stale. Tables first, then the record that points at them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl

import mllmsrec_core
from mllmsrec_core.ask import Ask, digest
from mllmsrec_core.errors import OutOfTime
from mllmsrec_core.stage import Inputs, Stage, conform
from storage.store import Store
from tasks.carry import (
    HASHES,
    Carried,
    Last,
    carry_over,
    count_asks,
    hashed,
    left_standing,
    names,
    read_last,
)
from tasks.engines import Engine
from tasks.finished import Finished, done_schema
from tasks.runner import Counts, How, run_rows
from tasks.spent import engine_figures

MIN_ASKS_FOR_RATE = 20  # fewer measure the start-up, not the engine


@dataclass(frozen=True)
class Made:
    """The finished rows of a stage, and the units they belong to (None for a stage that asks nothing)."""

    done: pl.DataFrame
    units: pl.DataFrame | None
    counts: Counts


def fingerprint(parts: Mapping[str, Any]) -> str:
    """The name of one stage's exact inputs: what it may read, its parameters, its model, and the code."""
    return digest(parts)[:32]


def run_stage(
    store: Store,
    stage: Stage,
    inputs: Inputs,
    parts: dict[str, Any],
    engine_for: Callable[[Ask], Engine],
    how: How,
    last: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the stage and publish its tables; returns the record, which is written after them.

    `last` is the record the environment shows, from which rows are carried over. A record is kept for reuse only when
    every row was reached and no passing failure stands in it, so that the next run tries those rows again.
    """
    started = time.monotonic() - (how.elsewhere.seconds if how.elsewhere else 0.0)
    rows = stage.rows(inputs)
    if how.keep_rows:
        rows = how.keep_rows(rows)
    made = Made(rows, None, Counts(rows=len(rows), done=len(rows)))
    if stage.ask is not None:
        made = _ask_all(store, stage, inputs, rows, parts, engine_for, how, last)
    counts = made.counts
    shaped = stage.tables(inputs, made.done.select(*done_schema(stage)) if stage.ask else made.done)
    frames = {name: conform(frame, stage.writes[name]) for name, frame in shaped.items()}
    about = {
        "stage": stage.name,
        "parts_of_fingerprint": parts,
        "counts": counts.__dict__,
        "failures": counted(frames.values()),
        "coverage": coverage(counts),
        "engine": engine_figures(counts),
        "seconds": round(time.monotonic() - started, 3),
        "version": mllmsrec_core.__version__,
    }
    seconds = time.monotonic() - started
    record = {
        "stage": stage.name,
        "fingerprint": fingerprint(parts),
        "parts": parts,
        "tables": {name: _publish(store, name, frame, about) for name, frame in frames.items()},
        "carried": _publish_carried(store, stage, made, about),
        "counts": counts.__dict__,
        "failures": about["failures"],
        "coverage": coverage(counts),
        "engine": about["engine"],
        "seconds": round(time.monotonic() - started, 3),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if counts.asked >= min(MIN_ASKS_FOR_RATE, counts.rows) > 0:
        store.envs.write_rate(stage.name, model_name(inputs), counts.asked / seconds)
    if not counts.passing and not counts.unreached:
        for name in {record["fingerprint"], fingerprint(_repeated(parts, record["tables"]))}:
            store.envs.write_record(stage.name, name, record)
    store.replies.compact()
    return record


def failed(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows whose question failed, with its `class`.

    A picture that is lost for good says so in `reason` alone: it counts against no error rate, and is a failure to show.
    """
    if "error" not in frame.columns:
        return frame.clear()
    names = [name for name in ("error", "reason") if name in frame.columns]
    return frame.with_columns(pl.coalesce(names).alias("class")).drop_nulls("class")


def counted(frames: Iterable[pl.DataFrame]) -> dict[str, int]:
    """Error class -> rows of the tables that failed with it, by name."""
    classes = Counter[str]()
    for frame in frames:
        rows = failed(frame)
        classes.update(dict(rows["class"].value_counts().iter_rows()) if rows.height else {})
    return dict(sorted(classes.items()))


def coverage(counts: Counts) -> float:
    """The share of rows that are up to date."""
    return 1.0 if not counts.unreached else round(counts.done / counts.rows, 6)


def model_name(inputs: Inputs) -> str:
    """The folder name of the model a stage asks; `source` where it asks none."""
    return inputs.model.slug if inputs.model else "source"


def _repeated(parts: dict[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the same run once more. A stage that goes on from its own tables would publish the same again."""
    if parts.get("before") is None:
        return parts
    return {**parts, "before": {name: pointer["digest"] for name, pointer in tables.items()}}


def _ask_all(
    store: Store,
    stage: Stage,
    inputs: Inputs,
    rows: pl.DataFrame,
    parts: dict[str, Any],
    engine_for: Callable[[Ask], Engine],
    how: How,
    record: Mapping[str, Any] | None,
) -> Made:
    """Carry over what is unchanged, ask the rest, leave standing what was not reached."""
    rows, last, kept = unfinished(store, stage, rows, parts, how, record)
    if how.elsewhere:
        store.replies.refresh()
    counts = Counts(rows=len(rows), done=len(kept.units), carried=len(kept.units), known=count_asks(kept.units))
    finished = Finished(stage)
    _, counts = run_rows(stage, inputs, kept.rest.drop(*HASHES), store, engine_for, how, counts, finished.take)
    counts = how.elsewhere.added(counts) if how.elsewhere else counts
    asked = kept.rest.select("__row", *stage.unit, *HASHES)
    asked = asked.join(finished.asks(), on="__row", maintain_order="left")
    missed = kept.rest.join(asked.select("__row"), on="__row", how="anti", maintain_order="left")
    stale = left_standing(stage, missed, last, datetime.now(UTC)) if counts.unreached else None
    if stale is not None and counts.unreached == counts.rows and last is None:
        raise OutOfTime(
            f"{stage.name}: the time was over before its first row, and nothing was published of it before. "
            "Everything answered is kept; repeat the command with a larger --budget-minutes."
        )
    parts_done = [kept.done, finished.rows(asked)] + ([stale.done] if stale else [])
    parts_units = [kept.units, asked] + ([stale.units] if stale else [])
    done = pl.concat([_shaped(stage, part, asked) for part in parts_done]).sort("__row", maintain_order=True)
    columns = ["__row", *stage.unit, *HASHES, "asks"]
    return Made(done, pl.concat([part.select(columns) for part in parts_units]).sort("__row"), counts)


def unfinished(
    store: Store, stage: Stage, rows: pl.DataFrame, parts: Mapping[str, Any], how: How, record: Mapping[str, Any] | None
) -> tuple[pl.DataFrame, Last | None, Carried]:
    """`rows` numbered and hashed, what was published of them last, and what of them is carried over or left to ask."""
    rows = hashed(rows.with_row_index("__row"), without="__row")
    last = read_last(store, stage, parts, record)
    if last and not set(done_schema(stage)) <= set(last.done.columns):
        last = None  # published by a version with other columns
    return rows, last, split(store, stage, rows, last, how.retry)


def split(store: Store, stage: Stage, rows: pl.DataFrame, last: Any, retry: frozenset[str]) -> Carried:
    """What of hashed `rows` is carried over: nothing in a retry, or where the stage names no unit of work."""
    able = bool(stage.unit) and not retry
    return carry_over(stage, rows, last if able else None, store.corrections.keys(stage.name) if able else ())


def _shaped(stage: Stage, done: pl.DataFrame, asked: pl.DataFrame) -> pl.DataFrame:
    """Finished rows, carried or new, with the same columns in the same order."""
    lacking = {name: asked.schema[name] for name in stage.unit if name not in done_schema(stage)}
    schema = {"__row": pl.UInt32, **done_schema(stage), **lacking}
    if done.is_empty():
        return pl.DataFrame(schema=schema)
    return done.select(pl.col(name).cast(dtype) for name, dtype in schema.items())


def _publish(store: Store, name: str, frame: pl.DataFrame, about: dict[str, Any]) -> dict[str, Any]:
    made = store.tables.publish(name, frame, about)
    return {"write_id": made.write_id, "digest": made.digest, "rows": made.rows}


def _publish_carried(store: Store, stage: Stage, made: Made, about: dict[str, Any]) -> dict[str, Any]:
    if made.units is None or not stage.unit:
        return {}
    frames = dict(zip(names(stage), (made.units.drop("__row"), made.done.drop("__row")), strict=True))
    return {name.split(".")[0]: _publish(store, name, frame, about) for name, frame in frames.items()}
