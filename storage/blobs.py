"""Bytes named by their sha256: pictures and adapters, kept here or by reference to the file they were read from."""

from __future__ import annotations

import json
from hashlib import sha256

from mllmsrec_core.errors import AskError, StoreError
from storage.files import Files
from storage.places import Places


def _name(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


def _reference(digest: str) -> str:
    return f"{_name(digest)}.ref"


class Blobs:
    """Content-addressed bytes below `blobs/`; writing what is there already writes nothing."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.places = Places()

    def put(self, content: bytes) -> str:
        """Keep `content`; returns its sha256."""
        digest = sha256(content).hexdigest()
        if not self.files.exists(_name(digest)):
            self.files.write(_name(digest), content)
        return digest

    def refer(self, content: bytes, uri: str) -> str:
        """Keep only where `content` was read, a path or any URL that fsspec reads; returns its sha256.

        The bytes are read there at every `get`, and handed out only while they are the same.
        """
        digest = sha256(content).hexdigest()
        if not self.has(digest):
            self.files.write(_reference(digest), json.dumps({"uri": uri, "size": len(content)}).encode())
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes named `digest`. Raises StoreError when they are gone or are others."""
        try:
            content = self.files.read(_name(digest))
        except FileNotFoundError:
            return self._referred(digest)
        if sha256(content).hexdigest() != digest:
            raise StoreError(
                f"{self.files.path(_name(digest))} does not hold what its name says; remove the file, then make it again: "
                "`mllmsrec retry --stage images` for pictures, `--stage sft` for adapters."
            )
        return content

    def has(self, digest: str) -> bool:
        """Whether the bytes, or a reference to them, are here."""
        return self.files.exists(_name(digest)) or self.files.exists(_reference(digest))

    def _referred(self, digest: str) -> bytes:
        try:
            kept = json.loads(self.files.read(_reference(digest)))
        except FileNotFoundError as error:
            raise StoreError(
                f"blob {digest} is not in {self.files.url}; it was removed by hand or the store was copied in part. "
                "Restore it, or make it again: `mllmsrec retry --stage images` for pictures, `--stage sft` for adapters."
            ) from error
        try:
            content = self.places.read(kept["uri"], kept["size"])
            why = "" if sha256(content).hexdigest() == digest else "its bytes are others now"
        except (OSError, ValueError, AskError, StoreError) as error:
            content, why = b"", str(error)
        if why:
            raise StoreError(
                f"picture {digest} is kept by reference to {kept['uri']}, which has changed or cannot be read: {why}. "
                "Restore that file, or run `mllmsrec run --stage images`, which looks at what lies there now."
            )
        return content
