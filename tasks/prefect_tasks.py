"""The Prefect side of a stage: one task run per stage, reused stages shown as Cached, progress as an artifact.

Prefect shows and schedules; what is reused is decided by the store's records, so nothing changes when its database is
wiped. Tasks receive names and pointers, never frames.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings
from prefect.states import Completed

from mllmsrec_core.errors import EngineError
from tasks.child import Outcome, StageTimeout, Told, carry_out, carry_out_apart, holds_gpu, why_due
from tasks.config import Options
from tasks.failures import summary
from tasks.runner import Counts, Elsewhere
from tasks.work import open_work

SECONDS_BETWEEN_UPDATES = 5.0  # each update is a request to the Prefect server
GPU = "gpu"  # the name of the server's concurrency limit; `deploy` makes it
LEASE_S = 60.0  # the shortest that Prefect accepts; at its default, a restart waits five minutes for a dead holder

watch: Callable[[str, Counts], None] | None = None
"""Set by a terminal that draws bars in the same process."""


class Progress:
    """Passes counts to the terminal at once, and to a Prefect artifact now and then.

    It is called within the runner's event loop, where Prefect would hand back a coroutine, and where no request should
    be waited for: artifacts are sent by a thread, in the context of the task that made this object.
    """

    def __init__(self, stage: str, place: str = "") -> None:
        self.key = re.sub("[^a-z0-9]+", "-", f"progress-{stage}-{place}".lower()).strip("-")
        self.updated, self.artifact, self.context, self.sent = 0.0, None, copy_context(), None
        self.sender = ThreadPoolExecutor(1, thread_name_prefix=self.key)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.sender.shutdown()

    def __call__(self, stage: str, counts: Counts) -> None:
        if watch:
            watch(stage, counts)
        over = counts.done >= counts.rows
        if not over and time.monotonic() - self.updated < SECONDS_BETWEEN_UPDATES:
            return
        if not over and self.sent and not self.sent.done():
            return  # a slow server gets fewer updates, not a queue of them
        self.updated = time.monotonic()
        share = 100.0 * counts.done / max(1, counts.rows)
        self.sent = self.sender.submit(self.context.run, self._send, stage, share)

    def _send(self, stage: str, share: float) -> None:
        with suppress(Exception):  # a server that is away must not end the stage
            if self.artifact is None:
                self.artifact = create_progress_artifact(share, key=self.key, description=f"{stage}: rows done")
            else:
                update_progress_artifact(self.artifact, share)  # type: ignore[arg-type]


def engine_broke(task: Any, run: Any, state: State) -> bool:
    """Only a broken engine is worth another try: bad input and failed rows would fail again, a limit be met again."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, EngineError) and not isinstance(error, StageTimeout)


@contextmanager
def gpu_slot(log: Callable[..., None]) -> Iterator[None]:
    """Hold a slot of the server's `gpu` limit; without a server, or a limit of that name, nothing is waited for.

    The lease is renewed while it is held, so a dead holder's slot is free again after `LEASE_S`.
    """
    if not get_current_settings().api.url:
        yield
        return
    log("waits for a slot of the limit `%s`", GPU)
    with concurrency(GPU, occupy=1, lease_duration=LEASE_S):
        log("goes on: it holds the slot, if there is such a limit")
        yield


# Nothing of Prefect's cache, and one more try where an engine broke: a stage and its shards alike.
ONCE_MORE: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 1,
    "retry_delay_seconds": 5,
    "retry_condition_fn": engine_broke,
}


@task(name="stage", task_run_name="{name}", **ONCE_MORE)
def stage_task(
    name: str,
    config_json: str,
    stages: Mapping[str, Any],
    before: Mapping[str, Any],
    options: Options,
    deadline: float | None = None,
    elsewhere: Elsewhere | None = None,
) -> State[dict[str, Any]]:
    """Run or reuse one stage on the tables that `stages` points at; its record is the result.

    `before` are the records the environment shows; after `deadline` (seconds since the epoch) no row is started.
    `elsewhere` is what the stage's shards have asked just before. A stage that has a time limit or holds a GPU runs in a
    process of its own.
    """
    log = get_run_logger()
    told = Told(config_json, name, stages, before, options, deadline, elsewhere)
    record, reused = _carry_out(told, log)
    rows = ", ".join(f"{table} {pointer['rows']:,} rows" for table, pointer in record["tables"].items())
    if reused:
        log.info("%s: reused, nothing it depends on has changed since %s: %s", name, record["at"], rows)
        return Completed(name="Cached", message=f"{rows}, made {record['at']}", data=record)
    counts, lost = record["counts"], summary(record)
    log.info(
        "%s: done in %.1f s: %s; asked %d, known %d, failed %s, not reached %d",
        *(name, record["seconds"], rows, counts["asked"], counts["known"], lost or 0, counts["unreached"]),
    )
    return Completed(message=rows, data=record)


def _carry_out(told: Told, log: Any) -> Outcome:
    """Here, or in a child where the stage needs one; a stage that is reused never does."""
    work, why = open_work(told.config_json), why_due(told)
    if why != "":
        log.info("%s: begins%s", told.name, f", due for: {why}" if why else "")
    gpu, minutes = holds_gpu(work, told.name), work.config.settings.stage_timeout_minutes
    with Progress(told.name, work.config.shown_as(told.options.sample)) as progress:
        if why == "" or not (gpu or minutes):
            return carry_out(told, progress)
        with gpu_slot(lambda words, *values: log.info(f"{told.name}: {words}", *values)) if gpu else nullcontext():
            return carry_out_apart(told, minutes, progress, log.info)
