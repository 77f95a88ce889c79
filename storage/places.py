"""One file on any fsspec file system, or inside a zip archive on one: its bytes, bounded, and what its archive says of it.

`zip://covers/7.jpg::/shop/covers.zip` is fsspec's way to name a member. Nothing is unpacked to disk, and nothing is read
before its size is known to be small enough. Knows nothing of roots: whoever asks has decided that the file may be read.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from functools import lru_cache
from threading import Lock
from typing import Any

import fsspec
from fsspec.core import split_protocol

from mllmsrec_core.errors import ImageRefused, ImageUnreadable
from storage.files import steadily

ARCHIVES = 16  # kept open at once; each holds a file descriptor and its table of contents
BLOCK = 1 << 18  # bytes read at once of an archive behind a network: about one cover and its header
PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what gives out no more than is asked for at a time
ENCRYPTED = 1  # bit of a member's flags
SHOWN = 200  # characters of a URI in a message


def parts(uri: str) -> tuple[str, str]:
    """The file `uri` lies in, and its name inside where that file is an archive (else empty)."""
    member, chained, archive = uri.partition("::")
    if chained and member.startswith("zip://"):
        return archive, member.removeprefix("zip://").lstrip("/")
    return uri, ""


class Places:
    """Reads files; archives stay open between two reads for as long as they are the same. Safe to share by threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept = lru_cache(maxsize=ARCHIVES)(_opened)

    def read(self, uri: str, most: int) -> bytes:
        """The bytes at `uri`. Raises ImageRefused for more than `most` of them and for what is no plain file,
        ImageUnreadable for a damaged archive, FileNotFoundError, other OSErrors of a local disk, and StoreError for
        trouble of a remote one."""
        place, member = parts(uri)
        if place == uri and _local(uri):
            return _read_local(split_protocol(uri)[1], uri, most)
        if place == uri:
            return steadily(uri, lambda: _read_remote(uri, most))
        if _local(place):
            return self._read_member(place, member, uri, most)
        return steadily(uri, lambda: self._read_member(place, member, uri, most))

    def contents(self, archive: str) -> dict[str, str]:
        """The version (checksum and size) of every member of an archive, by name."""
        look = lambda: self._archive(archive)  # noqa: E731
        opened = look() if _local(archive) else steadily(archive, look)
        return {info.filename: f"{info.CRC:08x}-{info.file_size}" for info in opened.infolist() if not info.is_dir()}

    def _archive(self, archive: str) -> zipfile.ZipFile:
        fs, path = fsspec.url_to_fs(archive)
        info = fs.info(path)
        if info["type"] != "file":
            raise ImageRefused(f"{shown(archive)} is a folder, a device or a pipe, not an archive")
        mark = str([info.get(name) for name in ("size", "ETag", "etag", "mtime", "LastModified", "created")])
        try:
            with self._lock:
                return self._kept(archive, mark)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ImageUnreadable(f"{shown(archive)} is no zip archive that can be read: {error}") from error

    def _read_member(self, archive: str, member: str, uri: str, most: int) -> bytes:
        if ".." in member.split("/"):
            raise ImageRefused(f"{shown(uri)} leads out of its archive")
        opened = self._archive(archive)
        try:
            info = opened.getinfo(member)
        except KeyError:
            raise FileNotFoundError(uri) from None
        if info.is_dir():
            raise IsADirectoryError(uri)
        if info.compress_type not in PLAIN or info.flag_bits & ENCRYPTED:
            raise ImageRefused(f"{shown(uri)} is encrypted or compressed in another way than `deflate`; pack it again")
        within(info.file_size, most, uri)
        try:
            with opened.open(info) as file:
                return file.read(most + 1)  # never more than `file_size`, whatever the stream holds
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
            raise ImageUnreadable(f"{shown(uri)} is damaged: {error}") from error


def shown(uri: str) -> str:
    """A URI as it may stand in a message: on one line, at most SHOWN characters, without control characters."""
    short = uri if len(uri) <= SHOWN else f"{uri[:SHOWN]}..."
    return short if short.isprintable() else ascii(short)


def within(size: int, most: int, uri: str) -> None:
    """Raise ImageRefused where `size` bytes are more than `most`."""
    if size > most:
        raise ImageRefused(f"{shown(uri)} has more than {most:,} bytes")


def _local(uri: str) -> bool:
    return split_protocol(uri)[0] in (None, "file", "local")


def _opened(archive: str, mark: str) -> zipfile.ZipFile:
    """The archive as it is at `mark`. Whoever drops the last reference closes its file."""
    fs, path = fsspec.url_to_fs(archive)
    how: dict[str, Any] = {} if _local(archive) else {"block_size": BLOCK, "cache_type": "readahead"}
    return zipfile.ZipFile(fs.open(path, "rb", **how))


def _read_local(path: str, uri: str, most: int) -> bytes:
    path = os.path.realpath(path)
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(path)
    if not stat.S_ISREG(found.st_mode):
        raise ImageRefused(f"{shown(uri)} is a device or a pipe, not a file")
    within(found.st_size, most, uri)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    within(len(content), most, uri)
    return content


def _read_remote(uri: str, most: int) -> bytes:
    fs, path = fsspec.url_to_fs(uri)
    size = fs.size(path) or 0
    within(size, most, uri)
    return fs.cat_file(path, start=0, end=size) if size else b""
