"""Many waiting Asks become few large batches, run in one worker thread.

Each round takes the group of the Ask that has waited longest, orders that group by size, and runs the slice of it in
which that Ask stands, so that rows of one batch are of similar length, or begin alike, and nobody waits for ever. Knows
neither models nor kinds of Ask: it is given three functions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from mllmsrec_core.ask import Reply
from mllmsrec_core.errors import EngineError, MllmsrecError
from mllmsrec_core.prefixes import neighbours

LINGER_S = 0.003  # a round with room left waits this long for rows that are about to ask; a batch takes tens of ms

A = TypeVar("A")
Outcome = Reply | MllmsrecError


@dataclass(eq=False)
class _Job(Generic[A]):
    ask: A
    group: Hashable
    future: asyncio.Future[Reply]
    size: int | tuple[int, ...] | None = None


class Batcher(Generic[A]):
    """Collects Asks on the event loop, runs them in batches of one group in a worker thread.

    `group(ask)` names what may share a batch. `size(ask)` is the length by which a group is ordered, or its tokens, where
    batches are wanted that begin alike; one kind within a group. `run(asks)` gives one Outcome per Ask, in order; both
    run in the worker thread. An AskError from `size`, or any error as an
    Outcome, fails that Ask alone; whatever else is raised fails everything that waits. A batch for which CUDA has no
    memory is halved, and later batches are no larger.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        group: Callable[[A], Hashable],
        size: Callable[[A], int | tuple[int, ...]],
        run: Callable[[list[A]], Sequence[Outcome]],
    ) -> None:
        if batch_size < 1:
            raise EngineError(f"{name}: batch_size is {batch_size}; it must be at least 1")
        self.name = name
        self.batch_size = batch_size
        self._group, self._size, self._run = group, size, run
        self._waiting: list[_Job[A]] = []
        self._pump: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def submit(self, ask: A) -> Reply:
        """The Reply to `ask`, once its batch is done. Raises what its row, or the whole engine, failed with."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Job(ask, self._group(ask), future))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._rounds())
        return await future

    async def close(self, last: Callable[[], None] = lambda: None) -> None:
        """Cancel what waits, let the running batch end, run `last` in the worker thread, end the thread."""
        for job in self._waiting:
            job.future.cancel()
        self._waiting.clear()
        await asyncio.get_running_loop().run_in_executor(self._thread, last)
        self._thread.shutdown(wait=True)

    async def _rounds(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(0 if len(self._waiting) >= self.batch_size else LINGER_S)
            self._waiting = [job for job in self._waiting if not job.future.done()]
            if not self._waiting:
                return
            oldest = self._waiting[0]
            group = [job for job in self._waiting if job.group == oldest.group]
            batch: list[_Job[A]] = []
            try:
                for job, error in await loop.run_in_executor(self._thread, self._measure, group):
                    _settle(job, error)
                batch = self._slice(group, oldest)
                self._waiting = [job for job in self._waiting if job not in batch and not job.future.done()]
                outcomes = await loop.run_in_executor(self._thread, self._halving, [job.ask for job in batch])
            except Exception as error:
                self._fail(batch, error)
                return
            for job, outcome in zip(batch, outcomes, strict=True):
                _settle(job, outcome)

    def _measure(self, group: list[_Job[A]]) -> list[tuple[_Job[A], MllmsrecError]]:
        """Fill in missing sizes; returns the jobs that have none and why."""
        failed = []
        for job in group:
            if job.size is not None:
                continue
            try:
                job.size = self._size(job.ask)
            except EngineError:
                raise
            except MllmsrecError as error:
                failed.append((job, error))
        return failed

    def _slice(self, group: list[_Job[A]], oldest: _Job[A]) -> list[_Job[A]]:
        """At most `batch_size` jobs of similar size, or that begin alike; `oldest` among them unless it is settled."""
        sized: list[tuple[Any, _Job[A]]] = [(job.size, job) for job in group if not job.future.done()]
        sized.sort(key=lambda pair: pair[0], reverse=True)
        ready = [job for _, job in sized]
        place = ready.index(oldest) if oldest in ready else 0
        if ready and isinstance(ready[0].size, tuple):
            return ready[neighbours([size for size, _ in sized], place, self.batch_size)]
        start = min(place // self.batch_size * self.batch_size, max(0, len(ready) - self.batch_size))
        return ready[start : start + self.batch_size]

    def _halving(self, asks: list[A]) -> list[Outcome]:
        """Run `asks`, in ever smaller batches while CUDA has no memory for them."""
        done: list[Outcome] = []
        while len(done) < len(asks):
            rows = asks[len(done) : len(done) + self.batch_size]
            try:
                done += self._run(rows)
            except torch.OutOfMemoryError as error:
                if len(rows) == 1:
                    raise EngineError(
                        f"{self.name}: no memory for a single row: {error}. Lower `max_pixels`, shorten the prompt, "
                        "use a smaller model or `quantisation = 'nf4'`; everything answered before is kept."
                    ) from error
                self.batch_size = len(rows) // 2
            if torch.cuda.is_available() and len(done) < len(asks):
                torch.cuda.empty_cache()
        return done

    def _fail(self, batch: list[_Job[A]], error: Exception) -> None:
        """Hand `error` to the batch and to all that waits: the engine cannot go on."""
        if not isinstance(error, MllmsrecError):
            what = f"{self.name}: {type(error).__name__} in a batch of {len(batch)}: {error}"
            cause, error = error, EngineError(f"{what}. Everything answered before is kept; repeat the command.")
            error.__cause__ = cause
        for job in [*batch, *self._waiting]:
            _settle(job, error)
        self._waiting.clear()


def _settle(job: _Job[A], outcome: Outcome) -> None:
    """Give `outcome` to whoever waits for `job`, unless they have gone."""
    if job.future.done():
        return
    if isinstance(outcome, Reply):
        job.future.set_result(outcome)
    else:
        job.future.set_exception(outcome)
