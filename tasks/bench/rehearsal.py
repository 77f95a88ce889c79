"""The pipeline on a few rows in a store of its own: what each stage that asks is then measured on.

Ingest runs whole; of every other stage some rows do. Items without an answer are lent the answers of others, so that
the prompts further down are as long as those of a whole run. Nothing is trained: scoring asks the base model. Knows
nothing of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import polars as pl

from mllmsrec_core import protocol
from mllmsrec_core.ask import Ask, Reply, key
from mllmsrec_core.errors import Passing
from mllmsrec_core.stage import Inputs, Row, Stage, conform
from mllmsrec_core.stages import STAGES
from storage.replies import Replies
from tasks.finished import done_schema
from tasks.runner import How, Unit, run_rows
from tasks.stage_task import inputs_of
from tasks.work import Work

UNTRAINED = "sft"
MOST_USERS = 2_000  # whose histories and candidates are looked at: some 84,000 pairs to score, of which rows are drawn
LENT = {"images": "items", "item_summaries": "items", "preferences": "interactions"}  # table -> where the ids stand
Asked = list[tuple[Ask, Reply]]


@dataclass(frozen=True)
class Bout:
    """One stage, the rows of it that are measured, and for each row its questions in order with their answers."""

    stage: Stage
    inputs: Inputs
    rows: pl.DataFrame
    units: list[Asked]

    def asked(self) -> Asked:
        """Each different question once, in the order in which it is first asked."""
        found: dict[bytes, tuple[Ask, Reply]] = {}
        for unit in self.units:
            for ask, reply in unit:
                found.setdefault(key(ask), (ask, reply))
        return list(found.values())


def rehearse(work: Work, n: int) -> Iterator[Bout]:
    """Every stage that asks a model or fetches, on at most `n` rows, in order; a stage without any rows is left out.

    `work` is on a store of its own, which is filled. The engines are open and warm for a stage when it is yielded.
    """
    tables: dict[str, pl.DataFrame] = {}
    for stage in STAGES:
        if stage.name == UNTRAINED:
            tables |= {name: contract.create_empty() for name, contract in stage.writes.items()}
            continue
        inputs = forgiving(stage, inputs_of(work, stage, {name: tables[name] for name in stage.reads}))
        rows = stage.rows(inputs)
        if stage.ask is None:
            tables |= _shaped(stage, inputs, rows)
            if stage.name == "ingest":
                drawn = protocol.sample(tables["interactions"]["user_id"], MOST_USERS)
                tables["interactions"] = tables["interactions"].filter(pl.col("user_id").is_in(drawn))
            continue
        rows = _some(stage, rows, n)
        units, _ = run_rows(stage, inputs, rows, work.store, work.engine_for, How(work.config.settings.window))
        if stage.name != "score":  # its figures need whole lists of candidates, and nobody reads them here
            tables |= _shaped(stage, inputs, _done(stage, units))
            _lend(tables, stage)
        if len(rows):
            again = [_walk(stage, inputs, row, work.store.replies) for row in rows.iter_rows(named=True)]
            yield Bout(stage, inputs, rows, again)


def forgiving(stage: Stage, inputs: Inputs) -> Inputs:
    """The same inputs without a limit on failed rows: they are counted."""
    free = {name: 1.0 for name in ("max_error_rate", "max_host_error_rate") if name in stage.params.model_fields}
    own = inputs.params[stage.name].model_copy(update=free)
    return replace(inputs, params={**inputs.params, stage.name: own})


def _some(stage: Stage, rows: pl.DataFrame, n: int) -> pl.DataFrame:
    """`n` rows spread evenly; of score neighbours, which begin alike as those of a whole run do."""
    return (rows if stage.name == "score" else rows.gather_every(max(1, len(rows) // n))).head(n)


def _shaped(stage: Stage, inputs: Inputs, rows: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {name: conform(frame, stage.writes[name]) for name, frame in stage.tables(inputs, rows).items()}


def _done(stage: Stage, units: list[Unit]) -> pl.DataFrame:
    return pl.DataFrame([row for unit in units for row in unit.rows], schema=dict(done_schema(stage)))


def _lend(tables: dict[str, pl.DataFrame], stage: Stage) -> None:
    """Give items, and users, that a stage did not reach the rows of those it did, in turn."""
    for name, of in LENT.items():
        if name not in stage.writes:
            continue
        who = "user_id" if of == "interactions" else "item_id"
        reached = tables[name].filter(pl.col("ask").is_not_null())
        ids, lenders = tables[of].select(who).unique().sort(who), reached.select(who).unique().sort(who)
        left = ids.join(lenders, on=who, how="anti", maintain_order="left")
        if lenders.is_empty() or left.is_empty():
            continue
        turns = pl.int_range(len(left), eager=True) % len(lenders)
        borrowed = left.with_columns(lender=lenders[who][turns])
        lent = borrowed.join(reached.rename({who: "lender"}), on="lender").select(reached.columns)
        tables[name] = pl.concat([reached, lent])


def _walk(stage: Stage, inputs: Inputs, row: Row, replies: Replies) -> Asked:
    """The questions of one row's chain, with the answers just given."""
    assert stage.ask is not None
    chain, asked = stage.ask(inputs, row), Asked()
    try:
        ask = next(chain)
        while True:
            reply = replies.get(ask, key(ask)) or Reply(error=Passing.error_class, passing=True)
            asked.append((ask, reply))
            ask = chain.send(reply)
    except StopIteration:
        return asked
