"""The plan: one in-memory pass over the pipeline that asks nothing and loads no model.

Stages whose record stands are read; pure ones are computed; the others walk their chains with placeholders for unknown
answers, whose tables feed the stages behind them. A table is certain while nothing above it holds a placeholder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from mllmsrec_core.plan import Due, cause, walk
from mllmsrec_core.stage import Inputs, Stage, conform
from mllmsrec_core.stages import STAGES
from storage.tables import content_digest
from tasks.run_stage import done_schema
from tasks.stage_task import inputs_of, narrow, parts, standing_record
from tasks.work import Work

UNCERTAIN = "not known yet"


@dataclass(frozen=True)
class Line:
    """What one stage would do. `why` is empty where it would be reused, `seconds` None where nothing was measured."""

    stage: str
    due: Due
    why: str
    seconds: tuple[float, float] | None


@dataclass
class _Tables:
    """Frames and digests the pass has reached so far; a digest is UNCERTAIN where placeholders are inside."""

    frames: dict[str, pl.DataFrame]
    digests: dict[str, str]

    def certain(self, stage: Stage) -> bool:
        return all(self.digests[table] != UNCERTAIN for table in stage.reads)


def make_plan(work: Work, env: str, sample: int = 0, retry: frozenset[str] = frozenset()) -> list[Line]:
    """One line per stage, in order."""
    before = work.store.envs.current(env)["stages"]
    tables, lines = _Tables({}, {}), []
    for stage in STAGES:
        if sample and not work.sample and "interactions" in tables.frames:
            work = narrow(work, tables.frames, sample)
        lines.append(_plan_stage(work, stage, tables, before, retry))
    return lines


def _plan_stage(work: Work, stage: Stage, tables: _Tables, before: Mapping[str, Any], retry: frozenset[str]) -> Line:
    inputs = inputs_of(work, stage, {table: tables.frames[table] for table in stage.reads})
    now = parts(work, stage, inputs, {table: tables.digests[table] for table in stage.reads})
    certain = tables.certain(stage)
    record = standing_record(work, stage, now) if certain and not retry else None
    if record:
        for table, pointer in record["tables"].items():
            tables.frames[table] = work.store.tables.read(table, pointer["write_id"])
            tables.digests[table] = pointer["digest"]
        counts = record["counts"]
        return Line(stage.name, Due(rows=counts["rows"], known=counts["known"] + counts["asked"]), "", (0.0, 0.0))
    due = _compute(work, stage, inputs, tables, certain, retry)
    old = before.get(stage.name)
    return Line(stage.name, due, cause(now, old and old["parts"]), _seconds(due, old))


def _compute(work: Work, stage: Stage, inputs: Inputs, tables: _Tables, certain: bool, retry: frozenset[str]) -> Due:
    rows = stage.rows(inputs)
    if work.sample and stage.name != "ingest":
        rows = work.sample.keep(rows)
    if stage.ask is None:
        done, due = rows, Due(rows=len(rows))
    else:
        finished, due = walk(stage, inputs, rows, lambda ask, key: work.store.replies.get(ask, key, retry), certain)
        done = pl.DataFrame(finished, schema=stage.done or done_schema(stage), orient="row")
    certain = certain and due.high == 0
    for table, frame in stage.tables(inputs, done).items():
        tables.frames[table] = conform(frame, stage.writes[table])
        tables.digests[table] = content_digest(tables.frames[table]) if certain else UNCERTAIN
    return due


def _seconds(due: Due, old: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """At the rate of the environment's last run of the stage that asked anything."""
    if due.high == 0:
        return 0.0, 0.0
    if not old or not old.get("rate"):
        return None
    return due.low / old["rate"], due.high / old["rate"]
