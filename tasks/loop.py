"""One event loop for the process, in a thread of its own: engines outlive stages, and what they hold belongs to a loop.

The caller's thread only waits, so that whoever handles a signal stays its owner. Prefect takes a run for cancelled, and
not for crashed, only as long as its own handler of SIGTERM is in place. Knows nothing of stages.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn


class EngineLoop:
    """Runs coroutines for threads that wait for them."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What `work` returns or raises, in the context of the caller.

        Whatever a signal raises in the thread that waits (KeyboardInterrupt by Ctrl-C, and by SIGTERM where nobody
        handles it) cancels the work, which may flush what it has, and then goes on to the caller.
        """
        loop, ended, tasks = self._started(), threading.Event(), list[asyncio.Task[Any]]()

        def start() -> None:
            tasks.append(loop.create_task(work))
            tasks[0].add_done_callback(lambda _: ended.set())

        def cancel() -> None:
            if tasks:
                tasks[0].cancel()
            else:  # the signal came before the work had begun
                work.close()
                ended.set()

        with terminable():
            try:
                loop.call_soon_threadsafe(start)
                ended.wait()
            except BaseException:
                loop.call_soon_threadsafe(cancel)
                ended.wait()
                raise
        return tasks[0].result()

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_forever, args=(self._loop,), name="engines", daemon=True).start()
            return self._loop


def _forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        with suppress(KeyboardInterrupt, SystemExit):  # of one task, whose caller gets it; the others go on
            loop.run_forever()


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM interrupt as Ctrl-C does, where it would end the process at once."""
    try:
        ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        before = signal.signal(signal.SIGTERM, _interrupt) if ours else None
    except ValueError:  # signals are the main thread's
        before = None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


ENGINE_LOOP = EngineLoop()
