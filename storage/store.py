"""The store as one thing: blobs, replies, tables and pointers below one URL, guarded by a schema version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mllmsrec_core.errors import StoreError
from storage.blobs import Blobs
from storage.corrections import Corrections
from storage.envs import Envs
from storage.files import Files
from storage.forgotten import Forgotten
from storage.replies import Replies
from storage.tables import Tables

SCHEMA_VERSION = 1


class Store:
    """Opens any fsspec URL; a store written by another schema version is refused, never touched."""

    def __init__(
        self, url: str, flush_rows: int = 2_000, flush_seconds: float = 5.0, options: Mapping[str, Any] | None = None
    ) -> None:
        self.url = url
        self.files = Files(url, options or {})
        self._check_version()
        self.blobs = Blobs(self.files)
        self.corrections = Corrections(self.files)
        self.replies = Replies(self.files, flush_rows, flush_seconds, self.corrections)
        self.forgotten = Forgotten(self.files)
        self.tables = Tables(self.files)
        self.envs = Envs(self.files)

    def subjects(self, row: Mapping[str, Any]) -> tuple[bytes, ...]:
        """Whom a row's questions are about, as the index that `forget` reads names them: its user, its item."""
        subject, user, item = self.forgotten.subject, row.get("user_id"), row.get("item_id")
        return (*([subject("user", user)] if user else ()), *([subject("item", item)] if item else ()))

    def _check_version(self) -> None:
        try:
            written = json.loads(self.files.read("store.json"))["schema"]
        except FileNotFoundError:
            self.files.write("store.json", json.dumps({"schema": SCHEMA_VERSION}).encode())
            return
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.url}/store.json is not readable as a store's version; is this a store?") from error
        if written != SCHEMA_VERSION:
            raise StoreError(
                f"the store at {self.url} has schema version {written}, this package writes {SCHEMA_VERSION}. "
                "Use the package version that wrote it, or give another --store."
            )
