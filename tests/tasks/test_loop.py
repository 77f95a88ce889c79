"""Whoever waits for the engines' loop gets what the work returns or raises, and a signal's handler stays its owner's."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from contextvars import ContextVar

import pytest

from tasks.loop import EngineLoop

WHO: ContextVar[str] = ContextVar("WHO", default="nobody")


@pytest.fixture(scope="module")
def loop() -> EngineLoop:
    return EngineLoop()


class Ended(BaseException):
    """What somebody else's handler raises."""


def somebody_elses(*_: object) -> None:
    raise Ended


async def long(kept: list[str]) -> None:
    """Asks for SIGTERM as soon as it is at work, and needs a moment to keep what it has when it is ended."""
    kept.append(str(signal.getsignal(signal.SIGTERM)))
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.05)
        kept.append("flushed")


def test_work_runs_in_one_other_thread_and_in_the_context_of_the_caller(loop):
    async def where() -> tuple[int, str]:
        return threading.get_ident(), WHO.get()

    token = WHO.set("me")
    try:
        first, second = loop.run(where()), loop.run(where())
    finally:
        WHO.reset(token)
    assert first == second
    assert first[0] != threading.get_ident() and first[1] == "me"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_the_caller_gets_what_the_work_raises_and_the_loop_goes_on(loop, error):
    async def fail() -> None:
        raise error("no")

    async def work() -> str:
        return "done"

    with pytest.raises(error):
        loop.run(fail())
    assert loop.run(work()) == "done"


def test_sigterm_interrupts_where_nobody_handles_it_and_what_was_done_is_kept(loop):
    before, kept = signal.signal(signal.SIGTERM, signal.SIG_DFL), list[str]()
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run(long(kept))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert kept[1:] == ["flushed"]


def test_a_handler_that_is_in_place_stays_there_and_what_it_raises_ends_the_work_first(loop):
    before, kept = signal.signal(signal.SIGTERM, somebody_elses), list[str]()
    try:
        with pytest.raises(Ended):
            loop.run(long(kept))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert kept == [str(somebody_elses), "flushed"]
