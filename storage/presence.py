"""Who is at work on a stage right now, as a hint: runs that know of each other start at different ends.

A run leaves a small file while it works and renews it; one that died is ignored after a while. Nothing waits for these
files and nothing is right or wrong by them: without them two runs would only ask more twice.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mllmsrec_core.errors import StoreError
from storage.files import Files

RENEWED_EVERY = 15.0  # seconds
DEAD_AFTER = 60.0  # seconds without renewal: four were missed


class Presence:
    """One run's file below `runs/<stage>/`; its name begins with the time of the start, so that names sort by age."""

    def __init__(self, files: Files, stage: str) -> None:
        self.files, self.stage = files, stage
        self.name = f"runs/{stage}/{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
        self._renewed = 0.0

    def renew(self) -> None:
        """Say that the run is alive, at most once in `RENEWED_EVERY` seconds."""
        if time.monotonic() - self._renewed >= RENEWED_EVERY:
            self._renewed = time.monotonic()
            content = {"at": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
            with suppress(StoreError):  # whoever cannot write a hint will say so when it matters
                self.files.write(self.name, json.dumps(content).encode())

    def place(self) -> tuple[int, int]:
        """This run's place among the runs at work on the stage, oldest first, and how many there are."""
        names = sorted({*live(self.files, self.stage), self.name})
        return names.index(self.name), len(names)


@contextmanager
def present(files: Files, stage: str) -> Iterator[Presence]:
    """Leave a file for as long as the block runs."""
    presence = Presence(files, stage)
    presence.renew()
    try:
        yield presence
    finally:
        with suppress(StoreError, OSError):  # what is left over is ignored after a while
            files.remove(presence.name)


def live(files: Files, stage: str | None = None) -> list[str]:
    """The files of runs at work now, on one stage or on any, oldest first."""
    return [name for name in files.names(f"runs/{stage}" if stage else "runs", ".json") if _alive(files, name)]


def _alive(files: Files, name: str) -> bool:
    """Whether the run renewed its file of late; of one on this machine whether its process is there."""
    try:
        run = json.loads(files.read(name))
        if run["host"] == socket.gethostname() and not _runs(run["pid"]):
            return False
        return time.time() - run["at"] < DEAD_AFTER
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True
