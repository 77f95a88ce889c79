"""One root on one fsspec file system: the few operations everything else in the store is built from.

A file is whole or absent: local writes go to a temporary file, are flushed to disk and renamed; object stores take one
PUT; memory is atomic as it is. Nothing is changed in place.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mllmsrec_core.errors import StoreError


class Files:
    """Paths are relative to the root, with forward slashes."""

    def __init__(self, url: str) -> None:
        self.fs, root = fsspec.url_to_fs(url, use_listings_cache=False)  # others write here too
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.url = url

    def path(self, name: str) -> str:
        """The file system's own path of `name`."""
        return f"{self.root}/{name}"

    def write(self, name: str, content: bytes) -> None:
        """Write `name` so that it is whole or absent. Raises StoreError when the store cannot take it."""
        path = self.path(name)
        with _writing(path):
            if not self.local:
                self.fs.pipe_file(path, content)
                return
            temporary = _temporary(path, content)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
            _sync_folder(os.path.dirname(path))

    def create(self, name: str, content: bytes) -> bool:
        """Write `name` unless it exists; False when it does. Two racers never both win."""
        path = self.path(name)
        try:
            with _writing(path):
                if not self.local:
                    self.fs.pipe_file(path, content, mode="create")
                    return True
                temporary = _temporary(path, content)
                try:
                    os.link(temporary, path)
                finally:
                    os.unlink(temporary)
                return True
        except FileExistsError:
            return False

    def read(self, name: str) -> bytes:
        """The bytes of `name`. Raises FileNotFoundError."""
        return self.fs.cat_file(self.path(name))

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.path(name))

    def size(self, name: str) -> int | None:
        """Bytes in `name`; None where there is no such file."""
        try:
            return self.fs.size(self.path(name))
        except FileNotFoundError:
            return None

    def names(self, under: str, suffix: str = "") -> list[str]:
        """Every file below the folder `under` whose name ends with `suffix`, sorted; empty where there is no folder."""
        base = self.path(under)
        found = (path[len(self.root) + 1 :] for path in self._walk(base))
        return sorted(name for name in found if name.endswith(suffix))

    def _walk(self, base: str) -> Iterator[str]:
        try:
            yield from (str(path) for path in self.fs.find(base))
        except FileNotFoundError:
            return

    def remove(self, name: str) -> None:
        """Remove a file or a folder with everything below it; nothing happens where there is none."""
        with suppress(FileNotFoundError):  # another writer may have been faster
            self.fs.rm(self.path(name), recursive=True)


@contextmanager
def _writing(path: str) -> Iterator[None]:
    """Turn what the system says of a failed write into one clear error; FileExistsError goes through."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        why = "no space left" if error.errno == errno.ENOSPC else str(error)
        raise StoreError(
            f"cannot write {path}: {why}. Everything written before is kept; free space or fix access, then repeat the "
            "command."
        ) from error


def _temporary(path: str, content: bytes) -> str:
    """A file beside `path` with this content, flushed to disk; nothing is left of it when that fails."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return temporary


def _sync_folder(folder: str) -> None:
    """Make a rename survive a power cut: the name stands in the folder, not in the file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
