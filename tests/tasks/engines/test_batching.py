"""Batching of waiting Asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mllmsrec_core.ask import Reply
from mllmsrec_core.errors import ContextTooLong, EngineError
from tasks.engines.batching import Batcher


class Numbers:
    """Answers numbers with themselves; even and odd ones never share a batch."""

    def __init__(self, run: Callable[[list[int]], Any] | None = None, size: Callable[[int], int] | None = None) -> None:
        self.ran: list[list[int]] = []
        self._answers = run or (lambda asks: [Reply(ask) for ask in asks])
        self.batches = Batcher[int]("numbers", 8, lambda ask: ask % 2, size or (lambda ask: ask), self._run)
        self.answer, self.close = self.batches.submit, self.batches.close

    def _run(self, asks: list[int]) -> Any:
        self.ran.append(asks)
        return self._answers(asks)


def refuse_more_than(limit: int) -> Callable[[list[int]], list[Reply]]:
    def run(asks: list[int]) -> list[Reply]:
        if len(asks) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return [Reply(ask) for ask in asks]

    return run


def test_what_waits_together_runs_in_full_batches_of_one_group_and_similar_size(ask_all: Any) -> None:
    numbers = Numbers()
    asked = [*range(1, 64, 2), *range(0, 64, 2)]
    assert [reply.value for reply in ask_all(numbers, asked)] == asked
    assert [len(batch) for batch in numbers.ran] == [8] * 8
    for batch in numbers.ran:
        assert len({ask % 2 for ask in batch}) == 1
        assert max(batch) - min(batch) == 14


def test_what_begins_alike_runs_together_and_a_batch_is_cut_between_families(ask_all: Any) -> None:
    ran: list[list[tuple[int, int]]] = []

    def run(asks: list[tuple[int, int]]) -> list[Reply]:
        ran.append(asks)
        return [Reply(ask) for ask in asks]

    asked = [(family, n) for n in range(6) for family in range(5)]
    batches = Batcher[tuple[int, int]]("families", 8, lambda ask: 0, lambda ask: ask, run)
    engine = type("Families", (), {"answer": staticmethod(batches.submit), "close": staticmethod(batches.close)})
    assert [reply.value for reply in ask_all(engine, asked)] == asked
    assert [{family for family, _ in batch} for batch in ran] == [{n} for n in range(5)]


def test_the_event_loop_stays_free_while_a_batch_runs() -> None:
    import time

    async def main() -> int:
        numbers = Numbers(run=lambda asks: [time.sleep(0.2)] and [Reply(ask) for ask in asks])
        work = asyncio.create_task(numbers.answer(1))
        ticks = 0
        while not work.done():
            await asyncio.sleep(0.01)
            ticks += 1
        await numbers.close()
        return ticks

    assert asyncio.run(main()) > 5


def test_a_row_that_cannot_be_measured_fails_alone(ask_all: Any) -> None:
    def size(ask: int) -> int:
        if ask == 4:
            raise ContextTooLong("four")
        return ask

    outcomes = ask_all(Numbers(size=size), [2, 4, 6])
    assert isinstance(outcomes[1], ContextTooLong)
    assert [outcomes[0].value, outcomes[2].value] == [2, 6]


def test_an_unexpected_error_fails_everything_that_waits_and_says_where(ask_all: Any) -> None:
    outcomes = ask_all(Numbers(run=lambda asks: 1 / 0), [1, 2, 3])
    assert all(isinstance(error, EngineError) and "ZeroDivisionError" in str(error) for error in outcomes)


def test_a_cancelled_row_is_left_out_and_the_others_are_answered() -> None:
    async def main() -> tuple[list[Any], list[list[int]]]:
        numbers = Numbers()
        work = [asyncio.create_task(numbers.answer(ask)) for ask in (2, 4, 6)]
        await asyncio.sleep(0)
        work[1].cancel()
        done = await asyncio.gather(*work, return_exceptions=True)
        await numbers.close()
        return done, numbers.ran

    done, ran = asyncio.run(main())
    assert isinstance(done[1], asyncio.CancelledError)
    assert ran == [[6, 2]]


def test_a_batch_without_memory_is_halved_and_later_ones_are_no_larger(ask_all: Any) -> None:
    numbers = Numbers(run=refuse_more_than(2))
    asked = list(range(0, 20, 2))
    assert [reply.value for reply in ask_all(numbers, asked)] == asked
    sizes = [len(batch) for batch in numbers.ran]
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2


def test_a_single_row_without_memory_is_an_engine_error_with_a_remedy(ask_all: Any) -> None:
    errors = ask_all(Numbers(run=refuse_more_than(0)), [1, 2, 3])
    assert all(isinstance(error, EngineError) and "max_pixels" in str(error) for error in errors)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_at_least_one_row(size: int) -> None:
    with pytest.raises(EngineError, match="at least 1"):
        Batcher[int]("numbers", size, lambda ask: 0, lambda ask: 0, lambda asks: [])
