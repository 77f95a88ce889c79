"""A dataset's files on any fsspec URL: lists them, reads tables, and says which version of a picture lies where.

One broken row never costs the others: what does not parse is handed back beside what does, with line and reason.
Knows file formats, not datasets: what a column means is the reader's business.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import accumulate
from tempfile import TemporaryDirectory
from typing import IO, Any, TypeVar

import polars as pl
import pyarrow
from fsspec.compression import compr
from fsspec.core import split_protocol
from fsspec.utils import infer_compression

from mllmsrec_core.datasets import REJECTS
from mllmsrec_core.datasets.generic import ARCHIVE
from mllmsrec_core.errors import ImageRefused, ImageUnreadable, SourceError, StoreError, UsageError, nearest
from storage.files import Files
from storage.formats import COMPRESSED, DELIMITERS, JSON_LINES, TABLES, extension_of, keys_of
from storage.parquet import parquet
from storage.places import Places, parts
from storage.rows import Rows, delimited, json_lines, refuse_array

T = TypeVar("T")

PIECE = 1 << 26  # bytes of text turned into a frame at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SOMETHING = re.compile(rb"\S")
EMPTY_PACKED = 64  # bytes; nothing packs into 14 to 32, by format

# Where file systems keep what changes when a file does, best first.
MARKS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
UNKNOWN, ABSENT = "unknown", "absent"


class FsspecSource:
    """The dataset at `url`. Pictures may also lie below `image_roots`; nothing elsewhere is ever listed.

    Behind a network, trouble that passes is waited out; what stays is a SourceError.
    """

    def __init__(self, url: str, image_roots: Sequence[str] = ()) -> None:
        self.url = url
        self.files = Files(url)
        if self.files.local:
            self.files.root = os.path.normpath(self.files.root)
        self.roots = (self.uri(""), *image_roots)

    def names(self, under: str = "") -> list[str]:
        """Every file below `under`, sorted; empty where there is no such folder.

        A name that is no UTF-8 is left out: no table can name it, and no file that we look for has one. Members of a zip
        archive are called as `Places` reads them. Raises SourceError for an archive that is missing or damaged.
        """
        if under.lower().endswith(ARCHIVE) and not self._isdir(under):
            return self._members(under)
        names = _of_source(lambda: self.files.names(under))
        return [name for name in names if name.isascii() or name == name.encode(errors="replace").decode()]

    def _members(self, archive: str) -> list[str]:
        try:
            contents = _of_source(lambda: Places().contents(self.uri(archive)))
        except FileNotFoundError as error:
            raise self._missing(archive) from error
        except (OSError, ValueError, ImageRefused, ImageUnreadable) as error:
            raise SourceError(f"cannot read {self.uri(archive)}: {error}; download or pack it again") from error
        return sorted(f"zip://{name}::{archive}" for name in contents if "::" not in name)

    def uri(self, name: str) -> str:
        """The absolute path (local) or URL (elsewhere) of `name`; of the root for an empty name."""
        path = self.files.path(name) if name else self.files.root
        return path if self.files.local else self.files.fs.unstrip_protocol(path)

    def version(self, name: str) -> str | None:
        """ETag, or size and mtime, of one file; None when there is no such file."""
        try:
            info = self._steadily(name, lambda: self.files.fs.info(self.files.path(name)))
        except FileNotFoundError:
            return None
        return _version(info) if info["type"] == "file" else None

    def versions(self, uris: list[str]) -> list[str]:
        """The version of each picture, from one listing per folder or archive.

        `absent` where the listing lacks it, `1` for demo://, `unknown` for what is not ours to list (http, elsewhere).
        """
        folders: dict[str, set[str]] = defaultdict(set)
        archives: dict[str, set[str]] = defaultdict(set)
        for uri in uris:
            if parts(uri)[1]:
                archives[parts(uri)[0]].add(uri)
            elif not uri.startswith(("demo://", "http://", "https://")):
                folders[uri.rpartition("/")[0]].add(uri)
        found: dict[str, str] = {}
        for folder, members in sorted(folders.items()):
            found |= self._listed(folder, members)
        for archive, members in sorted(archives.items()):
            found |= self._packed(archive, members)
        return [found.get(uri, "1" if uri.startswith("demo://") else UNKNOWN) for uri in uris]

    def _listed(self, folder: str, members: set[str]) -> dict[str, str]:
        try:
            if not any(inside(folder, root) for root in self.roots):
                return dict.fromkeys(members, UNKNOWN)
            files = Files(folder)
            infos = files.steadily("", lambda: files.fs.ls(files.root, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            infos = []
        except (OSError, ValueError, UsageError):  # nobody may list it, no file system takes it: the fetch will tell
            return dict.fromkeys(members, UNKNOWN)
        except StoreError as error:
            if isinstance(error.__cause__, PermissionError):
                return dict.fromkeys(members, UNKNOWN)
            raise SourceError(str(error)) from error  # a version read another time is another question
        by_name = {info["name"].rpartition("/")[2]: _version(info) for info in infos if info["type"] == "file"}
        return {uri: by_name.get(uri.rpartition("/")[2], ABSENT) for uri in members}

    def _packed(self, archive: str, members: set[str]) -> dict[str, str]:
        """Checksum and size of each member, from the archive's table of contents."""
        if not any(inside(archive, root) for root in self.roots):
            return dict.fromkeys(members, UNKNOWN)
        try:
            contents = _of_source(lambda: Places().contents(archive))
        except (FileNotFoundError, NotADirectoryError):
            contents = {}
        except (OSError, ValueError, ImageRefused, ImageUnreadable):  # the fetch will tell
            return dict.fromkeys(members, UNKNOWN)
        return {uri: contents.get(parts(uri)[1], ABSENT) for uri in members}

    def table(self, name: str, columns: Mapping[str, str] | None = None) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The rows of a file or a folder of parts, and the broken ones: see `mllmsrec_core.stage.Source`."""
        names = self._parts(name) if self._isdir(name) else [name]
        wanted = None if columns is None else set(columns.values())
        read = self._rows(name, names, wanted)
        known = {column for rows in read.values() for column in rows.known}
        if wanted and not wanted <= known:  # of a column without values, all are asked
            known |= {column for rows in self._rows(name, names, set()).values() for column in rows.known}
        broken = [(part, line, reason) for part, rows in read.items() for line, reason in rows.broken]
        if broken and not known:
            part, line, reason = broken[0]
            raise SourceError(
                f"no line of {self.uri(part)} can be read, the first being line {line}: {reason}; export it as JSON lines, one "
                "object a line"
            )
        rejects = pl.DataFrame(broken, schema=REJECTS, orient="row")
        return self._joined(name, read, _checked(columns, known - {"line"}, self.uri(name))), rejects

    def _joined(self, folder: str, read: Mapping[str, Rows], columns: Mapping[str, str] | None) -> pl.DataFrame:
        """Parts one behind another, with null where a part lacks a column, and the type that holds those of all parts."""
        if columns is None:
            before = accumulate((rows.n_lines for rows in read.values()), initial=0)
            frames = [
                rows.frame.with_columns(pl.col("line") + n) for rows, n in zip(read.values(), before, strict=False)
            ]
        else:
            frames = [_wanted(rows.frame, columns, part) for part, rows in read.items()]
        try:
            frame = pl.concat(frames, how="diagonal_relaxed")
        except pl.exceptions.PolarsError as error:
            raise SourceError(
                f"the parts of {self.uri(folder)} hold different types in one column: {error}; export them with one schema"
            ) from error
        if columns is None:
            return frame
        missing = [pl.lit(None, pl.String).alias(ours) for ours in columns if ours not in frame.columns]
        return frame.with_columns(missing).select(*columns, "source", "line")

    def lines(self, name: str) -> Iterator[pl.DataFrame]:
        """The lines of a text file, a bounded number at a time: see `mllmsrec_core.stage.Source`."""
        first = 1
        for piece in self._pieces(name):
            text = piece.removesuffix(b"\n").decode("utf-8", "replace")
            split = pl.Series("text", [text]).str.split("\n").explode().str.strip_suffix("\r")
            frame = split.to_frame().with_row_index("line", first).select("text", "line")
            first += frame.height
            frame = frame.filter(pl.col("text").str.strip_chars() != "")
            if frame.height:
                yield frame

    def _rows(self, folder: str, names: Sequence[str], wanted: set[str] | None) -> dict[str, Rows]:
        """The one file `folder`, or each of its parts, by name; key=value folders are columns of text.

        A part that is text may be without a byte.
        """
        if names == [folder]:
            return {folder: self._file(folder, wanted)}
        read = {}
        for name in filter(self._filled, names):
            keys = keys_of(name.removeprefix(folder))
            rows = self._file(name, None if wanted is None else wanted - set(keys))
            of_folders = [pl.lit(value, pl.String).alias(key) for key, value in keys.items()]
            known = dict.fromkeys([*rows.known, *keys])
            read[name] = replace(rows, frame=rows.frame.with_columns(of_folders), known=known)
        if not read:
            raise self._empty(folder)
        return read

    def _file(self, name: str, wanted: set[str] | None) -> Rows:
        """The rows of one file; of Parquet and JSON lines those columns that are wanted."""
        extension = extension_of(name)
        if extension == ".parquet":
            return self._parquet(name, wanted)
        if extension in DELIMITERS:
            return delimited(self._whole(name), DELIMITERS[extension], self.uri(name))
        if extension not in JSON_LINES:
            raise SourceError(
                f"cannot tell the format of {self.uri(name)}: name it .parquet, "
                f"{', '.join((*DELIMITERS, *JSON_LINES))}, or one of these with {', '.join(COMPRESSED)}"
            )
        return json_lines(self._objects(name), wanted)

    def _objects(self, name: str) -> Iterator[bytes]:
        """The pieces of JSON lines. Raises SourceError where the file is one JSON array."""
        pieces = self._pieces(name)
        first = next(pieces)
        refuse_array(first, self.uri(name))
        yield first
        yield from pieces

    def _filled(self, name: str) -> bool:
        """Whether a part holds a byte, unpacked; Parquet always has to."""
        if extension_of(name) == ".parquet":
            return True
        size = self.files.size(name) or 0
        if size > EMPTY_PACKED or not name.endswith(COMPRESSED):
            return size > 0
        with self._opened(name) as file:
            return file.read(1) != b""

    def _parts(self, folder: str) -> list[str]:
        """The tables below a folder, all of one format, in the order of their names."""
        hidden = re.compile(r"/(?!\.\./)[._]")  # what engines write beside tables; `..` is refused later
        below = [name for name in self.names(folder) if not hidden.search(name.removeprefix(folder.rstrip("/")))]
        names = [name for name in below if extension_of(name) in TABLES]
        kinds = sorted({extension_of(name) for name in names})
        if not names:
            raise SourceError(f"{self.uri(folder)} holds no file with rows ({', '.join(TABLES)}); check the path")
        if len(kinds) > 1:
            raise SourceError(
                f"{self.uri(folder)} holds tables of several formats ({', '.join(kinds)}): name the one file that is meant, "
                "or a folder of one format"
            )
        return names

    def _missing(self, name: str) -> SourceError:
        known = self.names()
        if not known:
            return SourceError(f"there is no {self.uri(name)}, nor anything else in {self.url}; check the path")
        hint = nearest(name, known)
        return SourceError(f"there is no {self.uri(name)}; {hint if len(hint) < 500 else 'check the file name'}")

    def _empty(self, name: str) -> SourceError:
        return SourceError(f"{self.uri(name)} is empty; export or download it again")

    @contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        """The bytes of a file, unpacked as they are read. Raises SourceError where that fails."""
        try:
            unpack: Any = compr.get(infer_compression(name))  # type: ignore[call-overload]
            with self._packed_bytes(name) as content:
                yield unpack(content, mode="rb") if unpack else content
        except FileNotFoundError as error:
            raise self._missing(name) from error
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise SourceError(f"cannot read {self.uri(name)}: {error}; export or download it again") from error

    def _packed_bytes(self, name: str) -> IO[bytes]:
        """A file as it lies there; from elsewhere it is fetched whole, so that no reader meets a connection that fails."""
        if self.files.local:
            return open(self.files.path(name), "rb")
        return io.BytesIO(_of_source(lambda: self.files.read(name)))

    def _whole(self, name: str) -> bytes:
        """All bytes of a text file, unpacked. Raises SourceError where it is empty."""
        with self._opened(name) as file:
            content = file.read()
        if not content.removeprefix(BYTE_ORDER_MARK).strip():
            raise self._empty(name)
        return content

    def _pieces(self, name: str) -> Iterator[bytes]:
        """A text file as whole lines, some PIECE bytes at a time, without a byte order mark; SourceError where it is empty."""
        left, filled = b"", False
        with self._opened(name) as file:
            begin = file.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
            while more := begin + file.read(PIECE):
                begin, text = b"", left + more
                end = text.rfind(b"\n") + 1
                left = text[end:]
                filled = filled or SOMETHING.search(text) is not None
                if end:
                    yield text[:end]
        if left:
            yield left
        if not filled:
            raise self._empty(name)

    def _parquet(self, name: str, wanted: set[str] | None) -> Rows:
        if not _of_source(lambda: self.files.exists(name)):
            raise self._missing(name)
        try:
            with self._at_hand(name) as path:
                return parquet(path, wanted)
        except (OSError, pyarrow.ArrowException) as error:
            raise SourceError(f"cannot read {self.uri(name)} as Parquet: {error}; export it again") from error

    @contextmanager
    def _at_hand(self, name: str) -> Iterator[str]:
        """The local path of a file: from elsewhere it is fetched whole.

        Through fsspec, pyarrow would take a connection that fails for a file that is not there.
        """
        if self.files.local:
            yield self.files.path(name)
            return
        if ".." in name.split("/"):  # as a key may be called
            raise SourceError(f"{self.uri(name)} leads out of its folder; rename it")
        with TemporaryDirectory(prefix="mllmsrec-") as root:
            path = os.path.join(root, "part.parquet")
            with open(path, "wb") as file:
                file.write(_of_source(lambda: self.files.read(name)))
            yield path

    def _isdir(self, name: str) -> bool:
        return self._steadily(name, lambda: self.files.fs.isdir(self.files.path(name)))

    def _steadily(self, name: str, action: Callable[[], T]) -> T:
        return _of_source(lambda: self.files.steadily(name, action))


def _of_source(action: Callable[[], T]) -> T:
    """What `action` returns; what would be trouble of the store is trouble of the dataset here."""
    try:
        return action()
    except StoreError as error:
        raise SourceError(str(error)) from error


def inside(uri: str, root: str) -> bool:
    """Whether `uri` is `root` or lies below it, once symbolic links and `..` are followed."""
    kinds, paths = zip(*(_place(place) for place in (uri, root)), strict=True)
    if kinds[0] != kinds[1] or "::" in uri:
        return False
    if kinds[0] == "file":
        paths = tuple(os.path.realpath(path) for path in paths)
    elif ".." in paths[0].split("/"):
        return False
    return paths[0] == paths[1] or paths[0].startswith(paths[1].rstrip("/") + "/")


def _place(uri: str) -> tuple[str, str]:
    """The scheme and path of a URI; a plain path is a `file`."""
    scheme, path = split_protocol(uri)
    if scheme in (None, "file", "local"):
        return "file", path
    return str(scheme), path.strip("/")


def _version(info: Mapping[str, Any]) -> str:
    """ETag where there is one, else size and the time of the last change."""
    key = next((key for key in MARKS if info.get(key) is not None), None)
    if key is None:
        return f"{info.get('size')}-{UNKNOWN}"
    mark = info[key]
    if key in ("ETag", "etag", "md5Hash"):
        return str(mark).strip('"')
    mark = mark.timestamp() if isinstance(mark, datetime) else mark
    return f"{info.get('size')}-{mark:.6f}" if isinstance(mark, float) else f"{info.get('size')}-{mark}"


def _checked(columns: Mapping[str, str] | None, known: Collection[str], where: str) -> Mapping[str, str] | None:
    """`columns`, where the table has them all."""
    for ours, theirs in (columns or {}).items():
        if theirs not in known:
            raise SourceError(f"{where} has no column `{theirs}` (wanted as {ours}); {nearest(theirs, known)}")
    return columns


def _wanted(frame: pl.DataFrame, columns: Mapping[str, str], part: str) -> pl.DataFrame:
    """Those of `columns` that `frame` has, under our names, with where each row stands."""
    there = [pl.col(theirs).alias(ours) for ours, theirs in columns.items() if theirs in frame.columns]
    return frame.select(*there, "line").with_columns(source=pl.lit(part))
