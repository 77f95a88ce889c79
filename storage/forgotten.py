"""Who asked to be forgotten, and the names under which the store indexes whom a question is about; no id in either.

An id becomes 16 bytes of an HMAC under a secret of the store's own, made once. Without the secret the index says nothing;
with it an id can be checked, not read. Also the lock under which one process at a time removes things from the store.
Knows nothing of what is removed.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from typing import Literal

import polars as pl

from mllmsrec_core.errors import UsageError
from storage.files import Files

LOCK = "locks/forget.json"
KEY_FILE = "subjects/secret"
KEY_BYTES = 32  # as long as the hash it keys
SUBJECT_BYTES = 16  # two ids in 2**64 would meet: beyond any store

Subject = Literal["user", "item"]


class Forgotten:
    """The suppression list `forgotten/<hex>.json`, read at the first question; `refresh` reads it again."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._secret: bytes | None = None
        self._listed: frozenset[str] | None = None

    def subject(self, kind: Subject, name: str) -> bytes:
        """The 16 bytes that stand for a user or an item in this store."""
        return hmac.digest(self._key(), f"{kind}\0{name}".encode(), "sha256")[:SUBJECT_BYTES]

    def suppress(self, user: str) -> None:
        """Put a user on the list, durably; nothing happens where it is there."""
        entry = {"at": _now()}
        self.files.create(f"forgotten/{self.subject('user', user).hex()}.json", json.dumps(entry).encode())
        self.refresh()

    def users(self, ids: pl.Series) -> pl.Series:
        """Whether each user id is on the list; null is not. Only distinct ids are hashed, and none while it is empty."""
        listed = self._names()
        if not listed:
            return pl.Series(ids.name, [False], dtype=pl.Boolean).new_from_index(0, len(ids))
        on_it = [name for name in ids.unique().drop_nulls() if self.subject("user", name).hex() in listed]
        return ids.is_in(pl.Series(on_it, dtype=pl.String).implode()).fill_null(False)

    def digest(self) -> str | None:
        """A sha256 over the list; None while it is empty."""
        listed = self._names()
        return sha256("".join(sorted(listed)).encode()).hexdigest() if listed else None

    def refresh(self) -> None:
        """Let the next question see whom others have put on the list since."""
        self._listed = None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for removals. Raises UsageError where another process does, naming what to do if it is dead."""
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "at": _now()}
        if not self.files.create(LOCK, json.dumps(mine).encode()) and not self._take_over(mine):
            raise UsageError(f"{self.at_work()}; repeat the command when it is done")
        try:
            yield
        finally:
            self.files.remove(LOCK)

    def at_work(self) -> str | None:
        """Who holds the lock, in words that name how to remove a dead one; None when nobody does."""
        held = self._holder()
        if held is None:
            return None
        return (
            f"process {held.get('pid')} on {held.get('host')} has been removing things from the store since "
            f"{held.get('at')} (if it is dead: remove {self.files.path(LOCK)})"
        )

    def _take_over(self, mine: dict[str, object]) -> bool:
        """Whether the holder is a process of this machine that is no more, in whose place this one stands now."""
        held = self._holder() or {}
        if held.get("host") != mine["host"] or _runs(held.get("pid")):
            return False
        self.files.remove(LOCK)
        return self.files.create(LOCK, json.dumps(mine).encode())

    def _holder(self) -> dict[str, object] | None:
        try:
            return json.loads(self.files.read(LOCK))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _names(self) -> frozenset[str]:
        if self._listed is None:
            names = self.files.names("forgotten", ".json")
            self._listed = frozenset(name.rsplit("/", 1)[1].removesuffix(".json") for name in names)
        return self._listed

    def _key(self) -> bytes:
        """The store's secret; of two processes that find none, both use the one that was first to write."""
        if self._secret is None:
            try:
                written = self.files.read(KEY_FILE)
            except FileNotFoundError:
                self.files.create(KEY_FILE, secrets.token_hex(KEY_BYTES).encode())
                written = self.files.read(KEY_FILE)
            self._secret = bytes.fromhex(written.decode())
        return self._secret


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _runs(pid: object) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(int(str(pid)), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError):
        return True
    return True
