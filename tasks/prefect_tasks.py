"""The Prefect side of a stage: one task run per stage, reused stages shown as Cached, progress as an artifact.

Prefect shows and schedules; what is reused is decided by the store's records, so nothing changes when its database is
wiped. Tasks receive names and pointers, never frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed

from mllmsrec_core.errors import EngineError
from tasks.active import active_first
from tasks.config import Options
from tasks.runner import Counts, How
from tasks.stage_task import draw_sample, perform
from tasks.work import open_work

SECONDS_BETWEEN_UPDATES = 5.0  # each update is a request to the Prefect server

watch: Callable[[str, Counts], None] | None = None
"""Set by a terminal that draws bars in the same process."""


class Progress:
    """Passes counts to the terminal at once, and to a Prefect artifact now and then."""

    def __init__(self, stage: str) -> None:
        self.stage, self.updated, self.artifact = stage, 0.0, None

    def __call__(self, stage: str, counts: Counts) -> None:
        if watch:
            watch(stage, counts)
        over = counts.done >= counts.rows
        if not over and time.monotonic() - self.updated < SECONDS_BETWEEN_UPDATES:
            return
        self.updated = time.monotonic()
        share = 100.0 * counts.done / max(1, counts.rows)
        with suppress(Exception):  # a server that is away must not end the stage
            if self.artifact is None:
                self.artifact = create_progress_artifact(
                    share, key=f"{stage}-progress", description=f"{stage}: rows done"
                )
            else:
                update_progress_artifact(self.artifact, share)  # type: ignore[arg-type]


def _engine_broke(task: Any, run: Any, state: State) -> bool:
    """Only a broken engine is worth another try: bad input and failed rows would fail again."""
    return isinstance(state.result(raise_on_failure=False), EngineError)


@task(
    name="stage",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=1,
    retry_delay_seconds=5,
    retry_condition_fn=_engine_broke,
)
def stage_task(
    name: str,
    config_json: str,
    stages: Mapping[str, Any],
    before: Mapping[str, Any],
    options: Options,
    deadline: float | None = None,
) -> State[dict[str, Any]]:
    """Run or reuse one stage on the tables that `stages` points at; its record is the result.

    `before` are the records the environment shows; after `deadline` (seconds since the epoch) no row is started.
    """
    work = open_work(config_json)
    if options.sample and name != "ingest":
        work = draw_sample(work, stages, options.sample)
    how = How(
        work.config.settings.window,
        frozenset(options.retry),
        progress=Progress(name),
        deadline=deadline,
        rank=active_first(work, stages) if options.order == "active" else None,
    )
    try:
        record, reused = perform(work, name, stages, how, before, options.retrain)
    except EngineError:
        work.engine_for.drop()  # whoever tries again opens a fresh one
        raise
    rows = ", ".join(f"{table} {pointer['rows']:,} rows" for table, pointer in record["tables"].items())
    if reused:
        return Completed(name="Cached", message=f"{rows}, made {record['at']}", data=record)
    counts = record["counts"]
    get_run_logger().info(
        "%s: %s; asked %d, known %d, failed %d, not reached %d, %.1f s",
        *(name, rows, counts["asked"], counts["known"], counts["failed"], counts["unreached"], record["seconds"]),
    )
    return Completed(message=rows, data=record)
