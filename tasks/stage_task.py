"""One stage as the pipeline runs it: look for its record, else gather its inputs, run it and publish.

The store's records decide what is reused. Knows nothing of Prefect.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl

import mllmsrec_core
from mllmsrec_core import protocol
from mllmsrec_core.ask import canonical
from mllmsrec_core.errors import UsageError
from mllmsrec_core.stage import Inputs, Stage
from mllmsrec_core.stages import STAGES, examples, preference
from tasks.run_stage import fingerprint, run_stage
from tasks.runner import How
from tasks.work import Sample, Work

STAGE_BY_NAME = {stage.name: stage for stage in STAGES}
MAKER = {table: stage.name for stage in STAGES for table in stage.writes}


class Lazy(Mapping[str, pl.DataFrame]):
    """Tables by name, each read when it is first asked for: a stage that is reused reads none."""

    def __init__(self, readers: Mapping[str, Callable[[], pl.DataFrame]]) -> None:
        self.readers, self._read = readers, {}

    def __getitem__(self, name: str) -> pl.DataFrame:
        if name not in self._read:
            self._read[name] = self.readers[name]()
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def table_records(stages: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Table name -> pointer, over the stage records of an environment or of a run so far."""
    return {table: pointer for record in stages.values() for table, pointer in record["tables"].items()}


def gather(
    work: Work, stage: Stage, stages: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> tuple[Inputs, dict[str, Any]]:
    """The stage's inputs from the tables that `stages` published, and everything its output may depend on, by name.

    `before` are the records the environment shows. Raises UsageError when a table is missing.
    """
    pointers = table_records(stages)
    if missing := [table for table in stage.reads if table not in pointers]:
        upstream = MAKER[missing[0]]
        raise UsageError(
            f"stage {stage.name} reads the table `{missing[0]}`, which this environment does not have; "
            f"run what is upstream first: mllmsrec run --stage {upstream}"
        )
    digests = {table: pointer["digest"] for table, pointer in pointers.items()}
    return ready(work, stage, readers(work, pointers), digests, (before or {}).get(stage.name))


def readers(work: Work, pointers: Mapping[str, Any]) -> dict[str, Callable[[], pl.DataFrame]]:
    """Table name -> what reads it, once."""

    def reader(table: str, write_id: str) -> Callable[[], pl.DataFrame]:
        return cache(lambda: work.store.tables.read(table, write_id))

    return {table: reader(table, pointer["write_id"]) for table, pointer in pointers.items()}


def ready(
    work: Work,
    stage: Stage,
    reading: Mapping[str, Callable[[], pl.DataFrame]],
    digests: Mapping[str, str],
    last: Mapping[str, Any] | None,
) -> tuple[Inputs, dict[str, Any]]:
    """`gather` on tables that are at hand; `last` is the stage's record that the environment shows."""
    inputs = inputs_of(work, stage, Lazy({table: reading[table] for table in stage.reads}))
    own = last if stage.continues and stage.continues(inputs) else None
    if own:
        inputs = replace(inputs, before=Lazy(readers(work, own["tables"])))
    return inputs, parts(work, stage, inputs, {table: digests[table] for table in stage.reads}, own)


def inputs_of(work: Work, stage: Stage, tables: Mapping[str, pl.DataFrame]) -> Inputs:
    """What the stage's functions see of these tables in this run."""
    if work.sample:
        tables = work.sample.narrow(stage, tables)
    return Inputs(
        tables,
        work.params,
        work.models.get(stage.name),
        work.source,
        work.source.versions,
        forgotten=work.store.forgotten.users,
    )


def parts(
    work: Work, stage: Stage, inputs: Inputs, digests: Mapping[str, str], own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything the stage's output may depend on, by name, so that a difference can be said in words.

    `own` is the stage's record that it goes on from, where it does.
    """
    goes_on = stage.continues is not None and stage.continues(inputs)
    return {
        "stage": stage.name,
        "params": _params(work, stage),
        "model": asdict(inputs.model) if inputs.model else None,
        "inputs": dict(digests),
        "before": {table: p["digest"] for table, p in own["tables"].items()} if own else {} if goes_on else None,
        "source": stage.outside(inputs) if stage.outside else None,
        "sample": work.sample and work.sample.n,
        "corrections": work.store.corrections.digest(stage.name),
        "forgotten": None if stage.reads else work.store.forgotten.digest(),
        "code": code_digest(),
    }


def _params(work: Work, stage: Stage) -> dict[str, Any]:
    """The stage's own parameters and those it needs of others, by stage."""
    needed: dict[str, Any] = {}
    for need in (stage.name, *stage.needs):
        name, _, alone = need.partition(".")
        needed[name] = work.params[name].model_dump(mode="json", include={alone} if alone else None)
    return needed


@cache
def code_digest() -> str:
    """A digest over the pure package's source and polars: any change makes every stage due, and asks nothing twice."""
    root = Path(inspect.getfile(mllmsrec_core)).parent
    total = sha256(pl.__version__.encode())
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:16]


def perform(
    work: Work,
    name: str,
    stages: Mapping[str, Any],
    how: How,
    before: Mapping[str, Any] | None = None,
    retrain: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Run or reuse one stage; returns its record and whether it was reused.

    `stages` are the records to read from, `before` those the environment shows: rows are carried over from them.
    Raises UsageError while something is being removed from the store.
    """
    if held := work.store.forgotten.at_work():
        raise UsageError(f"{held}; run again when it is done")
    stage, last = STAGE_BY_NAME[name], (before or {}).get(name)
    inputs, now = gather(work, stage, stages, before)
    record = None if how.retry else standing(work, stage, now, last, retrain)
    if record:
        return record, True
    if work.sample:
        how = replace(how, keep_rows=work.sample.keep)
    return run_stage(work.store, stage, inputs, now, work.engine_for, how, last), False


def standing(
    work: Work, stage: Stage, now: dict[str, Any], last: Mapping[str, Any] | None, retrain: bool = False
) -> dict[str, Any] | None:
    """The record to reuse: what the environment pins, else what the stage made of exactly these inputs."""
    if not retrain and last and pinned(stage, now, last) and _whole(work, last):
        return dict(last)
    record = work.store.envs.record(stage.name, fingerprint(now))
    return record if record and _whole(work, record) else None


def pinned(stage: Stage, now: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Whether the environment's output stands although there are new data: same parameters and model, no failure."""
    same = all(now[name] == last["parts"].get(name) for name in ("params", "model", "sample"))
    return stage.pinned and same and not last["counts"]["failed"]


def _whole(work: Work, record: Mapping[str, Any]) -> bool:
    return all(work.store.tables.whole(table, made["write_id"]) for table, made in record["tables"].items())


_DRAWN: dict[str, Sample] = {}  # by what it was drawn from: every stage of a run asks for the same one


def draw_sample(work: Work, stages: Mapping[str, Any], n: int) -> Work:
    """The same work narrowed to `n` users by hash and the items their histories and candidates touch."""
    pointers = {table: table_records(stages)[table] for table in ("items", "interactions", "waiting")}
    name = canonical([pointers, n, work.params["examples"].model_dump(mode="json")])
    if name not in _DRAWN:
        _DRAWN[name] = sample_of(work, {t: work.store.tables.read(t, p["write_id"]) for t, p in pointers.items()}, n)
    return replace(work, sample=_DRAWN[name])


def sample_of(work: Work, tables: Mapping[str, pl.DataFrame], n: int) -> Sample:
    """`n` users by hash, and the items they touch; candidates do not depend on preferences."""
    frames = {**tables, "preferences": preference.Preferences.create_empty()}
    drawn = examples.STAGE.rows(inputs_of(work, examples.STAGE, frames))
    users = protocol.sample(tables["interactions"]["user_id"], n)
    items = protocol.reached(users, tables["interactions"], drawn)
    return Sample(frozenset(users), frozenset(items), n)
