"""Drives the rows of any stage: known Asks are answered from the store, the rest by engines.

One bounded window of rows is in flight; a chain goes on as soon as its own reply is there, so users never wait for each
other. Replies are flushed as they come, on Ctrl-C and on SIGTERM too. Knows nothing of tables, Prefect or any one stage.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import polars as pl

from mllmsrec_core.ask import Ask, Fetch, Generate, Reply, Train, key
from mllmsrec_core.errors import AskError, EmptyReply, TooManyErrors
from mllmsrec_core.stage import Chain, Inputs, Row, Stage
from storage.presence import Presence, present
from storage.store import Store
from tasks.engines import Engine
from tasks.loop import ENGINE_LOOP
from tasks.spent import Meter

MIN_ROWS_FOR_ERROR_RATE = 50  # fewer say little about a share; the end of the stage checks in any case

SECONDS_ALONE = 1.0  # between two looks for other runs on the stage: one listing of a small folder
SECONDS_TOGETHER = 0.25  # between two looks at each other's answers while several runs share a stage
LOT = 2_000  # finished units handed over at once: some milliseconds, in which nothing else goes on
ROWS_PER_BREATH = 50  # known rows between two looks at signals, progress and engines: some milliseconds


@dataclass
class Counts:
    """What a stage has done so far; the progress bar reads it while the runner writes it."""

    rows: int = 0
    done: int = 0
    failed: int = 0
    known: int = 0
    asked: int = 0
    carried: int = 0  # of the rows: published before for the very same row
    unreached: int = 0  # of the rows: left as they were when the time was over
    passing: int = 0  # asked in vain for now: the next run asks them again
    tokens_in: int = 0
    tokens_out: int = 0
    asked_by_shards: int = 0  # of the asked
    images: int = 0  # in the questions asked
    read_tokens: int = 0  # of prompts, by engines that say how many of them they did not compute
    reused_tokens: int = 0  # of the read: not computed, their beginning had been
    compared_tokens: int = 0  # of the first prompts, by rule of thumb
    shared_tokens: int = 0  # of the compared: repeat how the prompt asked before began
    asking_seconds: float = 0.0  # from the first question to the last answer
    errors: dict[str, int] = field(default_factory=dict)


# Counts of what was asked that add up, whoever asked.
SPENT = ("tokens_in", "tokens_out", "images", "read_tokens", "reused_tokens", "compared_tokens", "shared_tokens")


@dataclass(frozen=True)
class Elsewhere:
    """What other processes, the stage's shards, have asked of its rows just before."""

    counts: Counts
    seconds: float  # from the first shard's start to the last one's end
    shards: int  # that returned

    def added(self, counts: Counts) -> Counts:
        """`counts` of the stage with what its shards asked: that was found known, and was asked for this run."""
        answered = self.counts.asked - self.counts.passing  # a passing failure is never found known
        return replace(
            counts,
            known=max(0, counts.known - answered),
            asked=counts.asked + self.counts.asked,
            asked_by_shards=self.counts.asked,
            asking_seconds=counts.asking_seconds + (self.seconds if self.counts.asked else 0.0),
            **{name: getattr(counts, name) + getattr(self.counts, name) for name in SPENT},
        )


@dataclass(frozen=True)
class How:
    """Settings of one run: none of them changes a byte of output."""

    window: int = 256
    retry: frozenset[str] = frozenset()
    keep_rows: Callable[[pl.DataFrame], pl.DataFrame] | None = None  # a sample
    progress: Callable[[str, Counts], None] | None = None
    deadline: float | None = None  # seconds since the epoch after which no further row is started
    most_asks: int | None = None  # start no further row once this many were asked
    rank: Callable[[pl.DataFrame], pl.DataFrame] | None = None  # the order in which rows go, instead of the stage's own
    part: str = ""  # names the part of the stage's rows this pass is about: other parts are no rivals
    elsewhere: Elsewhere | None = None  # what shards asked: it is published even when the time is over


@dataclass(slots=True)
class Unit:
    """One row's chain under way: the keys of its Asks so far, and its finished rows at the end."""

    number: int
    chain: Chain
    subjects: tuple[bytes, ...]
    keys: list[bytes] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


Take = Callable[[list[Unit]], None]


class Oracle:
    """Answers Asks: from the store where it can, once per key where several rows ask the same."""

    def __init__(self, store: Store, engine_for: Callable[[Ask], Engine], how: How, counts: Counts) -> None:
        self.store, self.engine_for, self.how, self.counts = store, engine_for, how, counts
        self._in_flight: dict[bytes, asyncio.Future[Reply]] = {}
        self._began = 0.0  # when the first question was asked
        self._asked: set[bytes] = set()  # a retry asks once, not once per row; empty in other runs

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
            if self.how.retry:
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
        self._began = self._began or started
        try:
            reply = await self.engine_for(ask).answer(ask)
            if isinstance(ask, Generate) and isinstance(reply.value, str) and not reply.value.strip():
                reply = replace(reply, value=None, error=EmptyReply.error_class, detail="the model wrote nothing")
        except AskError as error:
            reply = Reply(error=error.error_class, detail=str(error), passing=error.passing)
        self.counts.asking_seconds = time.monotonic() - self._began
        self.counts.asked += 1
        self.counts.passing += reply.passing
        self.counts.tokens_in += reply.tokens_in
        self.counts.tokens_out += reply.tokens_out
        return reply if reply.seconds else replace(reply, seconds=time.monotonic() - started)


def _advance(unit: Unit, oracle: Oracle, reply: Reply | None) -> tuple[Ask, bytes] | None:
    """Run a chain through everything already known: its next open question, or None when its rows are finished."""
    try:
        ask = next(unit.chain) if reply is None else unit.chain.send(reply)
        while (known := oracle.known(ask, name := _name(unit, ask, oracle.store))) is not None:
            ask = unit.chain.send(known)
        return ask, name
    except StopIteration as end:
        unit.rows = end.value
        return None


def _name(unit: Unit, ask: Ask, store: Store) -> bytes:
    """The Ask's key, noted for its unit and for whom it is about."""
    name = key(ask)
    unit.keys.append(name)
    if unit.subjects:
        store.replies.used(name, unit.subjects)
    return name


class Run:
    """One pass of one stage over its rows."""

    def __init__(
        self, stage: Stage, inputs: Inputs, oracle: Oracle, how: How, counts: Counts, take: Take | None
    ) -> None:
        self.stage, self.inputs, self.oracle, self.how, self.counts = stage, inputs, oracle, how, counts
        self.take = take
        self.limit: float = getattr(inputs.params[stage.name], "max_error_rate", 1.0)
        self.finished: dict[int, Unit] = {}
        self.together = False  # whether other runs are at work on the stage

    async def all(self, rows: pl.DataFrame, presence: Presence) -> list[Unit]:
        """Every row that was reached and not taken, in the order of `rows`."""
        place, runs = presence.place()
        self.together = runs > 1
        try:
            async with asyncio.TaskGroup() as outer:  # a ticker that cannot write must end the run too
                ticker = outer.create_task(self._tick(presence))
                async with asyncio.TaskGroup() as group:
                    await self._start_all(self._in_order(rows, place), group, presence)
                ticker.cancel()
        except BaseExceptionGroup as errors:  # the first one says why; the others are its echoes
            raise _first(errors) from None
        finally:
            self.oracle.store.replies.flush()
        self._check_error_rate(at_end=True)
        self._hand_over()
        return [self.finished[number] for number in sorted(self.finished)]

    def over(self) -> bool:
        """Whether the time or the number of questions this run was given is used up."""
        how = self.how
        late = how.deadline is not None and time.time() >= how.deadline
        return late or (how.most_asks is not None and self.counts.asked >= how.most_asks)

    async def _start_all(self, rows: pl.DataFrame, group: asyncio.TaskGroup, presence: Presence) -> None:
        """Finish what is known, and start what is not as the window has room."""
        window = asyncio.Semaphore(self._window(len(rows)))
        for count, row in enumerate(rows.iter_rows(named=True), 1):
            if self.over() and not self.how.elsewhere:
                return
            assert self.stage.ask is not None
            number = row.pop("__row")
            unit = Unit(number, self.stage.ask(self.inputs, row), self.oracle.store.subjects(row))
            step = _advance(unit, self.oracle, None)
            if step is None:
                self._finish(unit)
            else:
                await window.acquire()
                group.create_task(self._drive(unit, step, window, presence))
            if count % ROWS_PER_BREATH == 0:
                await asyncio.sleep(0)

    def _window(self, rows: int) -> int:
        """Runs that share a stage keep fewer rows in flight, so that few are in flight twice where they meet."""
        return min(self.how.window, max(1, rows // 16)) if self.together else self.how.window

    def _in_order(self, rows: pl.DataFrame, place: int) -> pl.DataFrame:
        """Runs that share a stage start at different ends: the first, the last, then from the middle both ways."""
        if self.how.rank:
            rows = self.how.rank(rows)
        elif self.stage.longest_first:
            rows = rows.sort(self.stage.longest_first, descending=True, maintain_order=True)
        if place % 4 >= 2:
            rows = pl.concat([rows[len(rows) // 2 :], rows[: len(rows) // 2]])
        return rows.reverse() if place % 2 else rows

    async def _drive(
        self, unit: Unit, step: tuple[Ask, bytes] | None, window: asyncio.Semaphore, presence: Presence
    ) -> None:
        try:
            while step is not None:
                if self.over():
                    return  # what it asked is kept; the row stays as it was
                if isinstance(step[0], Train):
                    await self._after_elders(*step, presence)
                step = _advance(unit, self.oracle, await self.oracle.answer(*step))
            self._finish(unit)
        finally:
            window.release()

    async def _after_elders(self, ask: Ask, name: bytes, presence: Presence) -> None:
        """Training is too dear to be done twice: whoever began later waits while an earlier run is alive at it."""
        while presence.place()[0] > 0 and self.oracle.store.replies.get(ask, name) is None:
            await asyncio.sleep(SECONDS_TOGETHER)
            self.oracle.store.replies.refresh()

    def _finish(self, unit: Unit) -> None:
        self.finished[unit.number] = unit
        self.counts.done += 1
        if len(self.finished) >= LOT:
            self._hand_over()
        failed = [row["error"] for row in unit.rows if row.get("error")]
        self.counts.failed += bool(failed)
        for error in failed:
            self.counts.errors[error] = self.counts.errors.get(error, 0) + 1
        if failed:
            self._check_error_rate()

    def _hand_over(self) -> None:
        """Let whoever takes finished units have them, and keep them no longer."""
        if self.take and self.finished:
            self.take(list(self.finished.values()))
            self.finished.clear()

    def _check_error_rate(self, at_end: bool = False) -> None:
        counts = self.counts
        enough = at_end or counts.done >= MIN_ROWS_FOR_ERROR_RATE
        if enough and counts.failed > self.limit * counts.done:
            raise TooManyErrors(
                f"{self.stage.name}: {counts.failed} of {counts.done} rows failed ({_summary(counts.errors)}), more than "
                f"max_error_rate = {self.limit}. Look with `mllmsrec errors --stage {self.stage.name}`, mend the cause and "
                f"`mllmsrec retry --stage {self.stage.name}`, or raise `{self.stage.name}.max_error_rate`."
            )

    async def _tick(self, presence: Presence) -> None:
        """Make answers durable by time, read those of other runs, show progress."""
        replies = self.oracle.store.replies
        looked = read = time.monotonic()
        while True:
            await asyncio.sleep(SECONDS_TOGETHER if self.together else 0.5)
            presence.renew()
            if time.monotonic() - looked >= SECONDS_ALONE:
                looked, self.together = time.monotonic(), presence.place()[1] > 1
            if self.together:
                replies.flush()
            else:
                replies.flush_if_old()
            if self.together or time.monotonic() - read >= replies.flush_seconds:
                read = time.monotonic()
                replies.refresh()
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
    stage: Stage,
    inputs: Inputs,
    rows: pl.DataFrame,
    store: Store,
    engine_for: Callable[[Ask], Engine],
    how: How,
    counts: Counts | None = None,
    take: Take | None = None,
) -> tuple[list[Unit], Counts]:
    """The units of a stage that asks, as far as `how` lets it go. Interrupted by Ctrl-C or SIGTERM, everything answered
    is flushed first.

    `rows` may hold a column `__row`, its place in a larger frame. `counts` go on from what was carried over.
    With `take` no unit is returned: it is given them as they finish, in lots and in no order, so that a large stage need
    not hold all of them.
    """
    counts = counts or Counts(rows=len(rows))
    rows = rows if "__row" in rows.columns else rows.with_row_index("__row")
    meter = Meter(engine_for)
    run = Run(stage, inputs, Oracle(store, meter, how, counts), how, counts, take)
    with present(store.files, stage.name + how.part) as presence:
        try:
            finished = ENGINE_LOOP.run(run.all(rows, presence))
        finally:
            meter.note(counts)
    counts.unreached = counts.rows - counts.done
    if how.progress:
        how.progress(stage.name, counts)
    return finished, counts
