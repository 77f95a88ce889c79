"""Drives any stage: known Asks are answered from the store, the rest by engines, and finished tables are published.

One bounded window of rows is in flight; a chain goes on as soon as its own reply is there, so users never wait for each
other. Replies are flushed as they come, on Ctrl-C and on SIGTERM too. Knows nothing of Prefect or of any one stage.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import polars as pl

import mllmsrec_core
from mllmsrec_core.ask import Ask, Fetch, Generate, Reply, Train, digest, key
from mllmsrec_core.errors import AskError, EmptyReply, TooManyErrors
from mllmsrec_core.stage import Chain, Inputs, Row, Stage, conform
from storage.store import Store
from tasks.engines import Engine

MIN_ROWS_FOR_ERROR_RATE = 50  # fewer say little about a share; the end of the stage checks in any case

MIN_ASKS_FOR_RATE = 20  # fewer measure the start-up, not the engine

ROWS_PER_BREATH = 50  # known rows between two looks at signals, progress and engines: some milliseconds


@dataclass
class Counts:
    """What a stage has done so far; the progress bar reads it while the runner writes it."""

    rows: int = 0
    done: int = 0
    failed: int = 0
    known: int = 0
    asked: int = 0
    passing: int = 0  # asked in vain for now: the next run asks them again
    tokens_in: int = 0
    tokens_out: int = 0
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class How:
    """Settings of one run: none of them changes a byte of output."""

    window: int = 256
    retry: frozenset[str] = frozenset()
    keep_rows: Callable[[pl.DataFrame], pl.DataFrame] | None = None  # a sample
    progress: Callable[[str, Counts], None] | None = None


class Oracle:
    """Answers Asks: from the store where it can, once per key where several rows ask the same."""

    def __init__(self, store: Store, engine_for: Callable[[Ask], Engine], how: How, counts: Counts) -> None:
        self.store, self.engine_for, self.how, self.counts = store, engine_for, how, counts
        self._in_flight: dict[bytes, asyncio.Future[Reply]] = {}
        self._asked: set[bytes] = set()  # a retry asks once, not once per row

    def known(self, ask: Ask, name: bytes) -> Reply | None:
        retry = self.how.retry if name not in self._asked else frozenset[str]()
        reply = self.store.replies.get(ask, name, retry)
        if reply is None or (retry and self._lost(ask, reply)):
            return None
        self.counts.known += 1
        return reply

    def _lost(self, ask: Ask, reply: Reply) -> bool:
        """Whether the answer names a blob that is gone. Looked up only in a retry, the command that mends it."""
        return isinstance(ask, Fetch | Train) and bool(reply.value) and not self.store.blobs.has(reply.value["sha256"])

    async def answer(self, ask: Ask, name: bytes) -> Reply:
        """The engine's reply, stored. A bad row becomes a failed Reply; EngineError goes through to the caller."""
        if name in self._in_flight:
            self.counts.known += 1
            return await asyncio.shield(self._in_flight[name])
        if (reply := self.known(ask, name)) is not None:  # another row asked it while this one waited for the window
            return reply
        future = self._in_flight[name] = asyncio.get_running_loop().create_future()
        try:
            self._asked.add(name)
            reply = self.store.replies.add(ask, name, await self._ask(ask))
            future.set_result(reply)
        except BaseException as error:
            future.set_exception(error)
            future.exception()  # read once, so that a lone asker leaves no warning behind
            raise
        finally:
            self._in_flight.pop(name, None)
        return reply

    async def _ask(self, ask: Ask) -> Reply:
        started = time.monotonic()
        try:
            reply = await self.engine_for(ask).answer(ask)
            if isinstance(ask, Generate) and isinstance(reply.value, str) and not reply.value.strip():
                reply = replace(reply, value=None, error=EmptyReply.error_class, detail="the model wrote nothing")
        except AskError as error:
            reply = Reply(error=error.error_class, detail=str(error), passing=error.passing)
        self.counts.asked += 1
        self.counts.passing += reply.passing
        self.counts.tokens_in += reply.tokens_in
        self.counts.tokens_out += reply.tokens_out
        return replace(reply, seconds=reply.seconds or time.monotonic() - started)


def _advance(chain: Chain, oracle: Oracle, reply: Reply | None) -> tuple[Ask, bytes] | list[Row]:
    """Run a chain through everything already known: its next open question, or its finished rows."""
    try:
        ask = next(chain) if reply is None else chain.send(reply)
        while (known := oracle.known(ask, name := key(ask))) is not None:
            ask = chain.send(known)
        return ask, name
    except StopIteration as end:
        return end.value


class Run:
    """One pass of one stage over its rows."""

    def __init__(self, stage: Stage, inputs: Inputs, oracle: Oracle, how: How, counts: Counts) -> None:
        self.stage, self.inputs, self.oracle, self.how, self.counts = stage, inputs, oracle, how, counts
        self.limit: float = getattr(inputs.params[stage.name], "max_error_rate", 1.0)
        self.finished: dict[int, list[Row]] = {}

    async def all(self, rows: pl.DataFrame) -> list[Row]:
        """Every row's finished rows, in the order of `rows`; longest chains start first where the stage says so."""
        self.counts.rows = len(rows)
        try:
            async with asyncio.TaskGroup() as outer:  # a ticker that cannot write must end the run too
                ticker = outer.create_task(self._tick())
                async with asyncio.TaskGroup() as group:
                    await self._start_all(rows, group)
                ticker.cancel()
        except BaseExceptionGroup as errors:  # the first one says why; the others are its echoes
            raise _first(errors) from None
        finally:
            self.oracle.store.replies.flush()
        self._check_error_rate(at_end=True)
        return [row for number in sorted(self.finished) for row in self.finished[number]]

    async def _start_all(self, rows: pl.DataFrame, group: asyncio.TaskGroup) -> None:
        """Finish what is known, and start what is not as the window has room."""
        window = asyncio.Semaphore(self.how.window)
        for count, (number, row) in enumerate(self._in_order(rows), 1):
            assert self.stage.ask is not None
            chain = self.stage.ask(self.inputs, row)
            step = _advance(chain, self.oracle, None)
            if isinstance(step, list):
                self._finish(number, step)
            else:
                await window.acquire()
                group.create_task(self._drive(number, chain, step, window))
            if count % ROWS_PER_BREATH == 0:
                await asyncio.sleep(0)

    def _in_order(self, rows: pl.DataFrame) -> Iterator[tuple[int, Row]]:
        order = rows.with_row_index("__row")
        if self.stage.longest_first:
            order = order.sort(self.stage.longest_first, descending=True, maintain_order=True)
        for row in order.iter_rows(named=True):
            yield row.pop("__row"), row

    async def _drive(self, number: int, chain: Chain, first: tuple[Ask, bytes], window: asyncio.Semaphore) -> None:
        step: tuple[Ask, bytes] | list[Row] = first
        try:
            while not isinstance(step, list):
                step = _advance(chain, self.oracle, await self.oracle.answer(*step))
            self._finish(number, step)
        finally:
            window.release()

    def _finish(self, number: int, rows: list[Row]) -> None:
        self.finished[number] = rows
        self.counts.done += 1
        failed = [row["error"] for row in rows if row.get("error")]
        self.counts.failed += bool(failed)
        for error in failed:
            self.counts.errors[error] = self.counts.errors.get(error, 0) + 1
        if failed:
            self._check_error_rate()

    def _check_error_rate(self, at_end: bool = False) -> None:
        counts = self.counts
        enough = at_end or counts.done >= MIN_ROWS_FOR_ERROR_RATE
        if enough and counts.failed > self.limit * counts.done:
            raise TooManyErrors(
                f"{self.stage.name}: {counts.failed} of {counts.done} rows failed ({_summary(counts.errors)}), more than "
                f"max_error_rate = {self.limit}. Look with `mllmsrec errors --stage {self.stage.name}`, mend the cause and "
                f"`mllmsrec retry --stage {self.stage.name}`, or raise `{self.stage.name}.max_error_rate`."
            )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self.oracle.store.replies.flush_if_old()
            if self.how.progress:
                self.how.progress(self.stage.name, self.counts)


def _summary(errors: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(errors.items(), key=lambda pair: -pair[1]))


def _first(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def run_rows(
    stage: Stage, inputs: Inputs, rows: pl.DataFrame, store: Store, engine_for: Callable[[Ask], Engine], how: How
) -> tuple[list[Row], Counts]:
    """All finished rows of a stage that asks. Interrupted by Ctrl-C or SIGTERM, everything answered is flushed first."""
    counts = Counts()
    run = Run(stage, inputs, Oracle(store, engine_for, how, counts), how, counts)
    finished = ENGINE_LOOP.run(run.all(rows))
    if how.progress:
        how.progress(stage.name, counts)
    return finished, counts


class _EngineLoop:
    """One event loop for the process: engines outlive stages, and what they hold belongs to their loop."""

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None

    def run(self, work: Awaitable[Any]) -> Any:
        self._runner = self._runner or asyncio.Runner()
        return self._runner.run(_until_terminated(work))


async def _until_terminated(work: Awaitable[Any]) -> Any:
    """Let SIGTERM end the work as Ctrl-C does: cancelled, flushed, then KeyboardInterrupt."""
    task = asyncio.ensure_future(work)
    on_main = threading.current_thread() is threading.main_thread()
    loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
    if on_main:
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        if on_main:
            loop.remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


ENGINE_LOOP = _EngineLoop()


def fingerprint(parts: dict[str, Any]) -> str:
    """The name of one stage's exact inputs: what it may read, its parameters, its model, and the code."""
    return digest(parts)[:32]


def run_stage(
    store: Store, stage: Stage, inputs: Inputs, parts: dict[str, Any], engine_for: Callable[[Ask], Engine], how: How
) -> dict[str, Any]:
    """Run the stage and publish its tables; returns the record, which is written after them.

    A record is kept for reuse only when no passing failure stands in it, so that the next run tries those rows again.
    """
    started = time.monotonic()
    rows = stage.rows(inputs)
    if how.keep_rows:
        rows = how.keep_rows(rows)
    counts = Counts(rows=len(rows), done=len(rows))
    if stage.ask is None:
        done = rows
    else:
        finished, counts = run_rows(stage, inputs, rows, store, engine_for, how)
        done = pl.DataFrame(finished, schema=stage.done or done_schema(stage), orient="row")
    about = {
        "stage": stage.name,
        "parts_of_fingerprint": parts,
        "counts": counts.__dict__,
        "seconds": round(time.monotonic() - started, 3),
        "version": mllmsrec_core.__version__,
    }
    frames = {name: conform(frame, stage.writes[name]) for name, frame in stage.tables(inputs, done).items()}
    tables = {name: store.tables.publish(name, frame, about) for name, frame in frames.items()}
    seconds = round(time.monotonic() - started, 3)
    record = {
        "stage": stage.name,
        "fingerprint": fingerprint(parts),
        "parts": parts,
        "tables": {name: {"write_id": p.write_id, "digest": p.digest, "rows": p.rows} for name, p in tables.items()},
        "counts": counts.__dict__,
        "seconds": seconds,
        "rate": counts.asked / seconds
        if counts.asked >= min(MIN_ASKS_FOR_RATE, counts.rows) > 0
        else None,  # Asks a second
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if not counts.passing:
        store.envs.write_record(stage.name, record["fingerprint"], record)
    store.replies.compact()
    return record


def done_schema(stage: Stage) -> dict[str, Any]:
    """The polars schema of finished rows where a stage states none: that of the one table it writes."""
    (contract,) = stage.writes.values()
    return {name: column.dtype for name, column in contract.columns().items()}
