"""One stage as the pipeline runs it: look for its record, else gather its inputs, run it and publish.

The store's records decide what is reused. Knows nothing of Prefect.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl

import mllmsrec_core
from mllmsrec_core import protocol
from mllmsrec_core.errors import UsageError
from mllmsrec_core.stage import Inputs, Stage
from mllmsrec_core.stages import STAGES, examples, preference
from tasks.run_stage import How, fingerprint, run_stage
from tasks.work import Sample, Work

STAGE_BY_NAME = {stage.name: stage for stage in STAGES}
MAKER = {table: stage.name for stage in STAGES for table in stage.writes}


def table_records(stages: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Table name -> pointer, over the stage records of an environment or of a run so far."""
    return {table: pointer for record in stages.values() for table, pointer in record["tables"].items()}


def gather(work: Work, stage: Stage, stages: Mapping[str, Any]) -> Inputs:
    """The stage's inputs from the tables that `stages` published. Raises UsageError when one is missing."""
    pointers = table_records(stages)
    if missing := [table for table in stage.reads if table not in pointers]:
        upstream = MAKER[missing[0]]
        raise UsageError(
            f"stage {stage.name} reads the table `{missing[0]}`, which this environment does not have; "
            f"run what is upstream first: mllmsrec run --stage {upstream}"
        )
    tables = {table: work.store.tables.read(table, pointers[table]["write_id"]) for table in stage.reads}
    return inputs_of(work, stage, tables)


def inputs_of(work: Work, stage: Stage, tables: Mapping[str, pl.DataFrame]) -> Inputs:
    """What the stage's functions see of these tables in this run."""
    if work.sample:
        tables = work.sample.narrow(stage, tables)
    return Inputs(tables, work.params, work.models.get(stage.name), work.source, work.source.versions)


def parts(work: Work, stage: Stage, inputs: Inputs, digests: Mapping[str, str]) -> dict[str, Any]:
    """Everything the stage's output may depend on, by name, so that a difference can be said in words."""
    return {
        "stage": stage.name,
        "params": {name: work.params[name].model_dump(mode="json") for name in (stage.name, *stage.needs)},
        "model": asdict(inputs.model) if inputs.model else None,
        "inputs": dict(digests),
        "source": stage.outside(inputs) if stage.outside else None,
        "sample": work.sample and work.sample.n,
        "code": code_digest(),
    }


@cache
def code_digest() -> str:
    """A digest over the pure package's source: any change makes every stage due again, and asks nothing twice."""
    root = Path(inspect.getfile(mllmsrec_core)).parent
    total = sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:16]


def perform(work: Work, name: str, stages: Mapping[str, Any], how: How) -> tuple[dict[str, Any], bool]:
    """Run or reuse one stage; returns its record and whether it was reused."""
    stage = STAGE_BY_NAME[name]
    inputs = gather(work, stage, stages)
    pointers = table_records(stages)
    now = parts(work, stage, inputs, {table: pointers[table]["digest"] for table in stage.reads})
    record = standing_record(work, stage, now)
    if record and not how.retry:
        return record, True
    if work.sample:
        how = replace(how, keep_rows=work.sample.keep)
    return run_stage(work.store, stage, inputs, now, work.engine_for, how), False


def standing_record(work: Work, stage: Stage, now: dict[str, Any]) -> dict[str, Any] | None:
    """What the stage made of exactly these inputs, if every table of it is still whole."""
    record = work.store.envs.record(stage.name, fingerprint(now))
    if record and all(work.store.tables.whole(table, made["write_id"]) for table, made in record["tables"].items()):
        return record
    return None


def draw_sample(work: Work, stages: Mapping[str, Any], n: int) -> Work:
    """The same work narrowed to `n` users by hash and the items their histories and candidates touch."""
    pointers = table_records(stages)
    tables = {name: work.store.tables.read(name, pointers[name]["write_id"]) for name in ("items", "interactions")}
    return narrow(work, tables, n)


def narrow(work: Work, tables: Mapping[str, pl.DataFrame], n: int) -> Work:
    """`draw_sample` on the frames of `items` and `interactions`; candidates do not depend on preferences."""
    frames = {**tables, "preferences": preference.Preferences.create_empty()}
    drawn = examples.STAGE.rows(inputs_of(work, examples.STAGE, frames))
    users = protocol.sample(tables["interactions"]["user_id"], n)
    items = protocol.reached(users, tables["interactions"], drawn)
    return replace(work, sample=Sample(frozenset(users), frozenset(items), n))
