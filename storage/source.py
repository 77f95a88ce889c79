"""A dataset's files on any fsspec URL: lists them, reads tables, and says which version of a picture lies where.

One broken row never costs the others: what does not parse is handed back beside what does, with line and reason.
Knows file formats, not datasets: what a column means is the reader's business.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import polars as pl
import pyarrow
import pyarrow.dataset
from fsspec.compression import compr
from fsspec.core import split_protocol
from fsspec.utils import infer_compression

from mllmsrec_core.datasets import REJECTS
from mllmsrec_core.errors import ImageRefused, ImageUnreadable, SourceError, StoreError, UsageError, nearest
from storage.files import Files
from storage.places import Places, parts

T = TypeVar("T")

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".psv": "|", ".ssv": ";"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
PIECE = 1 << 26  # bytes of text turned into a frame at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK = 100_000  # rows of text turned into a frame at a time, so that 10 million never stand in Python objects at once

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
        """Every file below `under`, sorted; empty where there is no such folder."""
        return _of_source(lambda: self.files.names(under))

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
        """The rows of a file, and its broken ones: see `mllmsrec_core.stage.Source`."""
        plain = name.removesuffix(next((end for end in COMPRESSED if name.endswith(end)), ""))
        extension = os.path.splitext(plain)[1].lower()
        if extension == ".parquet" or self._isdir(name):
            frame = self._parquet(name)
            return _wanted(frame, columns, frame.columns, self.uri(name)), pl.DataFrame(schema=REJECTS)
        content = self._read(name)
        if extension in DELIMITERS:
            frame, broken = _delimited(content, DELIMITERS[extension], self.uri(name))
            known: Iterable[str] = frame.columns
        elif extension in JSON_LINES:
            frame, broken, known = _json_lines(content, set(columns.values()) if columns else None)
        else:
            raise SourceError(
                f"cannot tell the format of {self.uri(name)}: name it .parquet, "
                f"{', '.join((*DELIMITERS, *JSON_LINES))}, or one of these with {', '.join(COMPRESSED)}"
            )
        rejects = pl.DataFrame([(name, line, reason) for line, reason in broken], schema=REJECTS, orient="row")
        return _wanted(frame, columns, known, self.uri(name)), rejects

    def lines(self, name: str) -> Iterator[pl.DataFrame]:
        """The lines of a text file, a bounded number at a time: see `mllmsrec_core.stage.Source`."""
        content, start, first, filled = self._read(name).removeprefix(b"\xef\xbb\xbf"), 0, 1, False
        while start < len(content):
            end = content.find(b"\n", start + PIECE) + 1 or len(content)
            text = content[start:end].removesuffix(b"\n").decode("utf-8", "replace")
            split = pl.Series("text", [text]).str.split("\n").explode().str.strip_suffix("\r")
            frame = split.to_frame().with_row_index("line", first).select("text", "line")
            start, first = end, first + frame.height
            frame = frame.filter(pl.col("text").str.strip_chars() != "")
            if frame.height:
                filled = True
                yield frame
        if not filled:
            raise SourceError(f"{self.uri(name)} is empty; export or download it again")

    def _missing(self, name: str) -> SourceError:
        known = self.names()
        if not known:
            return SourceError(f"there is no {self.uri(name)}, nor anything else in {self.url}; check the path")
        hint = nearest(name, known)
        return SourceError(f"there is no {self.uri(name)}; {hint if len(hint) < 500 else 'check the file name'}")

    def _read(self, name: str) -> bytes:
        try:
            content = _of_source(lambda: self.files.read(name))
            if packed := infer_compression(name):
                unpack: Any = compr.get(packed)  # type: ignore[call-overload]
                content = unpack(io.BytesIO(content), mode="rb").read()
        except FileNotFoundError as error:
            raise self._missing(name) from error
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise SourceError(f"cannot read {self.uri(name)}: {error}; export or download it again") from error
        if not content.removeprefix(BYTE_ORDER_MARK).strip():
            raise SourceError(f"{self.uri(name)} is empty; export or download it again")
        return content

    def _parquet(self, name: str) -> pl.DataFrame:
        """A Parquet file or a folder of them with key=value folders as columns; parts in the order of their names."""
        if not _of_source(lambda: self.files.exists(name)):
            raise self._missing(name)
        parts = [part for part in self.names(name) if part.endswith(".parquet")] if self._isdir(name) else [name]
        if not parts:
            raise SourceError(f"{self.uri(name)} holds no .parquet file; check the path")
        try:
            with self._at_hand(parts) as root:
                paths = [os.path.join(root, part) for part in parts]
                base = os.path.join(root, name)
                found = pyarrow.dataset.dataset(paths, format="parquet", partitioning="hive", partition_base_dir=base)
                table = found.to_table()
                table.validate(full=True)  # a damaged page may hold text that is no UTF-8
                frame = pl.from_arrow(table)
        except (OSError, pyarrow.ArrowException) as error:
            raise SourceError(f"cannot read {self.uri(name)} as Parquet: {error}; export it again") from error
        assert isinstance(frame, pl.DataFrame)
        return frame.with_columns(line=pl.int_range(1, pl.len() + 1, dtype=pl.UInt32))

    @contextmanager
    def _at_hand(self, names: list[str]) -> Iterator[str]:
        """A local root below which these files lie: from elsewhere they are fetched whole.

        Through fsspec, pyarrow would take a connection that fails for a file that is not there.
        """
        if self.files.local:
            yield self.files.root
            return
        with TemporaryDirectory(prefix="mllmsrec-") as root:
            for name in names:
                path = os.path.join(root, name)
                if not inside(path, root):  # a key may hold `..`
                    raise SourceError(f"{self.uri(name)} leads out of its folder; rename it")
                content = _of_source(lambda name=name: self.files.read(name))
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(content)
            yield root

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


def _wanted(frame: pl.DataFrame, columns: Mapping[str, str] | None, known: Iterable[str], where: str) -> pl.DataFrame:
    """`frame` under our names, with `line` last."""
    if columns is None:
        return frame
    known = set(known) - {"line"}
    for ours, theirs in columns.items():
        if theirs not in known:
            raise SourceError(f"{where} has no column `{theirs}` (wanted as {ours}); {nearest(theirs, known)}")
    return frame.select(*(pl.col(theirs).alias(ours) for ours, theirs in columns.items()), "line")


Broken = list[tuple[int, str]]  # line, reason


def _delimited(content: bytes, delimiter: str, where: str) -> tuple[pl.DataFrame, Broken]:
    """A delimited text file; without any quote it is split by columns, else record by record."""
    text = content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    try:
        header = [name.strip() for name in next(csv.reader(text.split("\n", 1), delimiter=delimiter))]
    except csv.Error as error:
        raise SourceError(f"the header of {where} cannot be read: {error}; export it again") from error
    if not header:
        raise SourceError(f"the first line of {where} is empty; it has to name the columns")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise SourceError(f"{where} has the column `{twice}` twice; rename one in the header")
    read = _quoted if '"' in text else _unquoted
    return read(text, header, delimiter)


def _unquoted(text: str, header: list[str], delimiter: str) -> tuple[pl.DataFrame, Broken]:
    lines = pl.DataFrame({"text": pl.Series([text]).str.split("\n").explode()}).with_row_index("line", 1).slice(1)
    n_fields = pl.col("text").str.count_matches(delimiter, literal=True) + 1
    lines = lines.with_columns(pl.col("line").cast(pl.UInt32), n=n_fields).filter(pl.col("text") != "")
    bad = lines.filter(pl.col("n") != len(header))
    good = lines.filter(pl.col("n") == len(header))
    fields = good["text"].str.split_exact(delimiter, len(header) - 1).struct.unnest()
    fields.columns = header
    frame = fields.with_columns(pl.all().replace("", None)).with_columns(good["line"])
    return frame, [(line, _count(n, len(header))) for line, n in bad.select("line", "n").iter_rows()]


def _quoted(text: str, header: list[str], delimiter: str) -> tuple[pl.DataFrame, Broken]:
    lines, broken = text.split("\n"), []
    records = _records(lines, len(header), delimiter, broken)
    frame = _frame(({**dict(zip(header, fields, strict=True)), "line": line} for line, fields in records), header)
    return frame.with_columns(pl.col(header).replace("", None)), broken


def _records(lines: list[str], width: int, delimiter: str, broken: Broken) -> Iterator[tuple[int, list[str]]]:
    """The line and fields of each record of `width` fields after the header; the rest goes to `broken`.

    A stray quote swallows the lines after it until the field limit (128 KiB) or a record of the wrong width ends it;
    only the line it stands on is broken, and reading starts again on the next.
    """
    start = 1
    while start < len(lines):
        rest = (lines[number] + "\n" for number in range(start, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, strict=True)
        begin = start
        try:
            for fields in reader:
                if len(fields) == width and fields != [""]:
                    yield begin + 1, fields
                elif fields:
                    broken.append((begin + 1, _count(len(fields), width)))
                    if start + reader.line_num > begin + 1:
                        break
                begin = start + reader.line_num
            else:
                return
        except csv.Error as error:
            broken.append((begin + 1, str(error)))
        start = begin + 1


def _count(found: int, width: int) -> str:
    return f"{found} field{'s' if found != 1 else ''} where the header has {width}"


def _json_lines(content: bytes, wanted: set[str] | None) -> tuple[pl.DataFrame, Broken, set[str]]:
    """One JSON object a line; the columns are all keys of all rows, or those of them that are wanted; and all keys."""
    broken: Broken = []
    known: set[str] = set()

    def rows() -> Iterator[dict[str, Any]]:
        for line, text in enumerate(content.removeprefix(BYTE_ORDER_MARK).split(b"\n"), 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text.decode("utf-8", errors="replace"))
            except (ValueError, RecursionError) as error:
                broken.append((line, f"no JSON: {error}"))
                continue
            if not isinstance(row, dict):
                broken.append((line, f"a JSON object was expected, not {type(row).__name__}"))
                continue
            row = {_encodable(key): value for key, value in row.items()}
            known.update(row)
            yield {**{key: _text(value) for key, value in row.items() if wanted is None or key in wanted}, "line": line}

    return _frame(rows(), []), broken, known


def _text(value: Any) -> str | None:
    """A JSON value as String: scalars as they are written, nested ones as JSON, nothing as null."""
    if value is None or value == "":
        return None
    return _encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _encodable(text: str) -> str:
    """`text` with half a surrogate pair, which JSON can hold and UTF-8 cannot, as a question mark."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _frame(rows: Iterable[dict[str, Any]], header: list[str]) -> pl.DataFrame:
    """Rows as a frame of String columns and `line`, built a chunk at a time."""
    rows, frames = iter(rows), [pl.DataFrame(schema={**dict.fromkeys(header, pl.String), "line": pl.UInt32})]
    while chunk := list(islice(rows, CHUNK)):
        names = dict.fromkeys(name for row in chunk for name in row if name != "line")
        schema = {**dict.fromkeys(names, pl.String), "line": pl.UInt32}
        frames.append(pl.DataFrame({name: [row.get(name) for row in chunk] for name in schema}, schema=schema))
    return pl.concat(frames, how="diagonal").select(pl.exclude("line"), "line")
