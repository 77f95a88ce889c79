"""Bytes named by their sha256: pictures and adapters."""

from __future__ import annotations

from hashlib import sha256

from mllmsrec_core.errors import StoreError
from storage.files import Files


def _name(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


class Blobs:
    """Content-addressed bytes below `blobs/`; writing what is there already writes nothing."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def put(self, content: bytes) -> str:
        """Keep `content`; returns its sha256."""
        digest = sha256(content).hexdigest()
        if not self.has(digest):
            self.files.write(_name(digest), content)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes named `digest`. Raises StoreError when they are gone or are others."""
        try:
            content = self.files.read(_name(digest))
        except FileNotFoundError as error:
            raise StoreError(
                f"blob {digest} is not in {self.files.url}; it was removed by hand or the store was copied in part. "
                "Restore it, or make it again: `mllmsrec retry --stage images` for pictures, `--stage sft` for adapters."
            ) from error
        if sha256(content).hexdigest() != digest:
            raise StoreError(
                f"{self.files.path(_name(digest))} does not hold what its name says; remove the file, then make it again: "
                "`mllmsrec retry --stage images` for pictures, `--stage sft` for adapters."
            )
        return content

    def has(self, digest: str) -> bool:
        return self.files.exists(_name(digest))
