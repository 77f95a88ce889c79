"""A few rows of one stage with other parameters: every question and answer, beside what is published. Publishes nothing.

The answers are kept as replies, so a full run with the same parameters does not ask them again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mllmsrec_core.ask import Ask, Message, Reply, key
from mllmsrec_core.errors import UsageError, nearest
from mllmsrec_core.stage import Inputs, Row, Stage
from storage.replies import Replies
from tasks.config import Config
from tasks.runner import How, run_rows
from tasks.stage_task import STAGE_BY_NAME, gather, table_records
from tasks.work import Work, open_work

Asked = list[tuple[Ask, Reply]]


def trial(config: Config, name: str, n: int) -> list[dict[str, Any]]:
    """`n` rows of stage `name` on the environment's tables: `row`, `asked` (prompt, answer), `old`, `new`."""
    if name not in STAGE_BY_NAME or STAGE_BY_NAME[name].ask is None:
        raise UsageError(f"`{name}` is not a stage that asks; {nearest(name, _asking())}")
    work, stage = open_work(config.to_json()), STAGE_BY_NAME[name]
    stages = work.store.envs.current(config.settings.env)["stages"]
    inputs, _ = gather(work, stage, stages, stages)
    rows = stage.rows(inputs).head(n)
    run_rows(stage, _forgiving(inputs, name), rows, work.store, work.engine_for, How(config.settings.window))
    published = _published(work, stage, stages)
    return [
        {
            "row": label,
            "asked": [_shown(*pair) for pair in asked],
            "old": _answer(published.get(label)),
            "new": _answer(new),
        }
        for row in rows.iter_rows(named=True)
        for new, asked in _again(stage, inputs, row, work.store.replies)
        for label in [_label(new, stage)]
    ]


def _asking() -> list[str]:
    return [stage.name for stage in STAGE_BY_NAME.values() if stage.ask]


def _forgiving(inputs: Inputs, name: str) -> Inputs:
    """The same inputs without a limit on failed rows: of three rows one that fails is what the trial is there to show."""
    params = {**inputs.params, name: inputs.params[name].model_copy(update={"max_error_rate": 1.0})}
    return replace(inputs, params=params)


def _again(stage: Stage, inputs: Inputs, row: Row, replies: Replies) -> list[tuple[Row, Asked]]:
    """The finished rows of one unit of work, each with the questions up to its own, from the replies just given."""
    assert stage.ask is not None
    chain, asked, finished = stage.ask(inputs, row), [], []
    try:
        ask = next(chain)
        while True:
            reply = replies.find(key(ask))
            asked.append((ask, reply[1] if reply else Reply(error="passing", passing=True)))
            ask = chain.send(asked[-1][1])
    except StopIteration as end:
        for done in end.value:
            own = next((n for n, (ask, _) in enumerate(asked, 1) if key(ask) == done.get("ask")), len(asked))
            finished.append((done, asked[:own]))
            asked = asked[own:]
    return finished


def _published(work: Work, stage: Stage, stages: dict[str, Any]) -> dict[str, Row]:
    """The environment's rows of the stage's first table by label; empty before its first run."""
    table = next(iter(stage.writes))
    pointer = table_records(stages).get(table)
    frame = work.store.tables.read(table, pointer["write_id"]) if pointer else None
    return {_label(row, stage): row for row in frame.iter_rows(named=True)} if frame is not None else {}


def _label(row: Row, stage: Stage) -> str:
    """The row's key in words; where it has none yet, as for pictures that several items share, its first column."""
    keys = next(iter(stage.writes.values())).primary_key()
    return " ".join(f"{name}={row[name]}" for name in (keys if keys[0] in row else list(row)[:1]) if name in row)


def _answer(row: Row | None) -> str:
    said = ((name, value) for name, value in (row or {}).items() if name != "ask" and value is not None)
    return ", ".join(f"{name}={value}" for name, value in said) or "nothing"


def _shown(ask: Ask, reply: Reply) -> dict[str, str]:
    """One question as the model read it, and its answer or what went wrong."""
    return {"prompt": _prompt(ask), "answer": f"{reply.error}: {reply.detail}" if reply.error else str(reply.value)}


def _prompt(ask: Ask) -> str:
    messages: tuple[Message, ...] = getattr(ask, "messages", ())
    parts = [part for message in messages for part in message.parts]
    return "\n".join(part if isinstance(part, str) else f"[picture {part.sha256[:12]}]" for part in parts) or repr(ask)
