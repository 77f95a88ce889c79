"""The plan: one in-memory pass over the pipeline that asks nothing and loads no model.

Stages whose record stands are left unread until somebody behind them is due; pure ones are computed; of the others the
rows that would be carried over are, and the rest walk their chains with placeholders for unknown answers, whose tables
feed the stages behind them. A table is certain while nothing above it holds a placeholder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from mllmsrec_core.plan import Due, cause, walk
from mllmsrec_core.prefixes import cheaper
from mllmsrec_core.stage import Inputs, Stage, conform
from mllmsrec_core.stages import STAGES, score
from storage.tables import content_digest
from tasks.carry import HASHES, count_asks, hashed, read_last
from tasks.config import Options
from tasks.finished import done_schema
from tasks.run_stage import fingerprint, model_name, split
from tasks.stage_task import STAGE_BY_NAME, draw_sample, gather, readers, ready, sample_of, standing
from tasks.work import Work

READ = {table for stage in STAGES for table in stage.reads}  # nobody is priced by the others: metrics cost seconds
UNCERTAIN = "not known yet"
PINNED = "sft: there are new examples, but the environment pins its adapter; --retrain trains anew"
MILLION = 1_000_000
Span = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """What one stage would do. `why` is empty where it would be reused.

    `seconds` and `money` are intervals; None where nothing was measured, or no price was given.
    """

    stage: str
    due: Due
    why: str
    seconds: Span | None
    money: Span | None
    note: str = ""  # how the same could be had for less


@dataclass
class _Pass:
    """Frames and digests the pass has reached so far; a digest is UNCERTAIN where placeholders are inside."""

    work: Work
    options: Options
    before: Mapping[str, Any]
    note: str = ""  # on the stage at hand
    readers: dict[str, Callable[[], pl.DataFrame]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def retry(self) -> frozenset[str]:
        return frozenset(self.options.retry)

    def certain(self, stage: Stage) -> bool:
        return all(self.digests[table] != UNCERTAIN for table in stage.reads)

    def show(self, table: str, frame: pl.DataFrame, digest: str) -> None:
        self.readers[table], self.digests[table] = lambda: frame, digest


def make_plan(work: Work, env: str, options: Options | None = None, only: str | None = None) -> list[Line]:
    """One line per stage, in order; for `only` one stage a line of what it would do on the environment's tables."""
    options = options or Options()
    state = _Pass(work, options, work.store.envs.current(env)["stages"])
    if only:
        return [_plan_alone(state, STAGE_BY_NAME[only])]
    lines = []
    for stage in STAGES:
        if options.sample and not state.work.sample and "interactions" in state.readers:
            tables = {table: state.readers[table]() for table in ("items", "interactions", "waiting")}
            state.work = replace(work, sample=sample_of(work, tables, options.sample))
        lines.append(_plan_stage(state, stage))
    return lines


def _plan_alone(state: _Pass, stage: Stage) -> Line:
    gather(state.work, stage, state.before, state.before)  # says which table is missing
    for record in state.before.values():
        state.readers |= readers(state.work, record["tables"])
        state.digests |= {table: pointer["digest"] for table, pointer in record["tables"].items()}
    if state.options.sample:
        state.work = draw_sample(state.work, state.before, state.options.sample)
    return _plan_stage(state, stage)


def _plan_stage(state: _Pass, stage: Stage) -> Line:
    work, last = state.work, state.before.get(stage.name)
    inputs, now = ready(work, stage, state.readers, state.digests, last)
    certain = state.certain(stage)
    record = standing(work, stage, now, last, state.options.retrain) if not state.retry else None
    if record:
        state.readers |= readers(work, record["tables"])
        state.digests |= {table: pointer["digest"] for table, pointer in record["tables"].items()}
        counts = record["counts"]
        note = PINNED if stage.pinned and record["fingerprint"] != fingerprint(now) else ""
        known = counts["known"] + counts["asked"]
        return Line(stage.name, Due(rows=counts["rows"], known=known), "", (0, 0), (0, 0), note)
    due = _compute(state, stage, inputs, now, last, certain)
    why = cause(now, last and last["parts"], retry=bool(state.retry), coverage=(last or {}).get("coverage", 1.0))
    rate = work.store.envs.rate(stage.name, model_name(inputs))
    return Line(stage.name, due, why, _seconds(due, rate), _money(work, due), state.note)


def _compute(
    state: _Pass,
    stage: Stage,
    inputs: Inputs,
    now: Mapping[str, Any],
    last: Mapping[str, Any] | None,
    certain: bool,
) -> Due:
    work, state.note = state.work, ""
    rows = stage.rows(inputs)
    if work.sample and stage.name != "ingest":
        rows = work.sample.keep(rows)
    if stage.ask is None:
        done, due = rows, Due(rows=len(rows))
    else:
        rows = hashed(rows.with_row_index("__row"), without="__row")
        kept = split(work.store, stage, rows, read_last(work.store, stage, now, last), state.retry)
        replies = work.store.replies
        open_rows = kept.rest.drop("__row", *HASHES)
        finished, due = walk(stage, inputs, open_rows, lambda ask, key: replies.get(ask, key, state.retry), certain)
        if stage is score.STAGE and len(open_rows):
            params: score.Params = inputs.params["score"]
            state.note = cheaper(open_rows, params.layout, params.prompt, params.picture)
        walked = pl.DataFrame(finished, schema=done_schema(stage), orient="row")
        done = pl.concat([kept.done.select(walked.columns), walked]) if len(kept.done) else walked
        due.rows, due.known = len(rows), due.known + count_asks(kept.units)
    if not READ & set(stage.writes):
        return due
    certain = certain and due.high == 0
    for table, shaped in stage.tables(inputs, done).items():
        frame = conform(shaped, stage.writes[table])
        state.show(table, frame, content_digest(frame) if certain else UNCERTAIN)
    return due


def _seconds(due: Due, rate: float | None) -> Span | None:
    """At the rate last measured for the stage and its model."""
    if due.high == 0:
        return 0.0, 0.0
    return (due.low / rate, due.high / rate) if rate else None


def _money(work: Work, due: Due) -> Span | None:
    """At the prices of the settings. Tokens are known for all that may be asked; the low end is its share of them."""
    settings = work.config.settings
    if due.high == 0:
        return 0.0, 0.0
    if settings.price_in is None and settings.price_out is None:
        return None
    high = (due.tokens_in * (settings.price_in or 0) + due.tokens_out * (settings.price_out or 0)) / MILLION
    return high * due.low / due.high, high
