"""A few rows of one stage with other parameters: every question and answer, beside what is published. Publishes nothing.

The answers are kept as replies, so a full run with the same parameters does not ask them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mllmsrec_core.errors import UsageError, nearest
from mllmsrec_core.stage import Row, Stage
from tasks.config import Config
from tasks.run_stage import How, run_rows
from tasks.stage_task import STAGE_BY_NAME, gather, table_records
from tasks.work import Work, open_work


def trial(config: Config, name: str, n: int) -> list[dict[str, Any]]:
    """`n` rows of stage `name` on the environment's tables: `row`, `asked` (prompt, answer), `old`, `new`."""
    if name not in STAGE_BY_NAME or STAGE_BY_NAME[name].ask is None:
        raise UsageError(f"`{name}` is not a stage that asks; {nearest(name, _asking())}")
    work, stage = open_work(config.to_json()), STAGE_BY_NAME[name]
    stages = work.store.envs.current(config.settings.env)["stages"]
    inputs = gather(work, stage, stages)
    rows = stage.rows(inputs).head(n)
    finished, _ = run_rows(stage, inputs, rows, work.store, work.engine_for, How(config.settings.window))
    published = _published(work, stage, stages)
    return [
        {"row": _label(new, stage), "asked": list(_asked(work, new)), "old": _answer(old), "new": _answer(new)}
        for new in finished
        for old in [published.get(_label(new, stage), {})]
    ]


def _asking() -> list[str]:
    return [stage.name for stage in STAGE_BY_NAME.values() if stage.ask]


def _published(work: Work, stage: Stage, stages: dict[str, Any]) -> dict[str, Row]:
    """The environment's rows of the stage's first table by label; empty before its first run."""
    table = next(iter(stage.writes))
    pointer = table_records(stages).get(table)
    frame = work.store.tables.read(table, pointer["write_id"]) if pointer else None
    return {_label(row, stage): row for row in frame.iter_rows(named=True)} if frame is not None else {}


def _label(row: Row, stage: Stage) -> str:
    return " ".join(f"{name}={row[name]}" for name in next(iter(stage.writes.values())).primary_key() if name in row)


def _answer(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.items() if name != "ask" and value is not None) or "nothing"


def _asked(work: Work, row: Row) -> Iterator[dict[str, str]]:
    """The last question behind a row, as the model read it, and its answer."""
    if not row.get("ask"):
        return
    question = work.store.replies.question(row["ask"])
    found = work.store.replies.find(row["ask"])
    yield {"prompt": _prompt(question), "answer": str(found[1].value if found else None)}


def _prompt(question: dict[str, Any] | None) -> str:
    if not question or "messages" not in question:
        return str(question)
    parts = [part for message in question["messages"] for part in message["parts"]]
    return "\n".join(part if isinstance(part, str) else f"[picture {part['sha256'][:12]}]" for part in parts)
