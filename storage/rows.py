"""Text that holds a table, as frames of String columns: delimited text, and JSON lines.

Both are read by columns where that is sure to give what reading record by record gives, which is many times slower and
knows what is wrong with a record. One broken record never costs another. Knows neither files nor what a column means.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any

import polars as pl

from mllmsrec_core.errors import SourceError

CHUNK = 100_000  # records turned into a frame at a time, so that 10 million never stand in Python objects at once
SMALL = 1 << 16  # bytes of JSON lines that are read one by one where something is odd about one of them
# Half of a surrogate pair, which polars 2.1 reads as NUL; the second half alone is an error there.
HALF_A_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")

Broken = list[tuple[int, str]]
"""The line, from 1, and what is wrong with it."""


@dataclass(frozen=True)
class Rows:
    """What a text holds: String columns and `line` (UInt32, from 1), its broken lines, all its columns, its lines."""

    frame: pl.DataFrame
    broken: Broken
    known: Collection[str]
    n_lines: int


def n_lines(content: bytes) -> int:
    return content.count(b"\n") + (not content.endswith(b"\n") and content != b"")


# --- delimited text ---------------------------------------------------------------------------------------------------


def delimited(content: bytes, delimiter: str, where: str) -> Rows:
    """Text whose first line names its columns; empty fields are null. Raises SourceError for a header that is none."""
    text = content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    delimiter = separator(text.partition("\n")[0], delimiter)
    try:
        header = [name.strip() for name in next(csv.reader(text.split("\n", 1), delimiter=delimiter))]
    except csv.Error as error:
        raise SourceError(f"the header of {where} cannot be read: {error}; export it again") from error
    if not header:
        raise SourceError(f"the first line of {where} is empty; it has to name the columns")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise SourceError(f"{where} has the column `{twice}` twice; rename one in the header")
    read = quoted if '"' in text or "\r" in text else unquoted
    return Rows(*read(text, header, delimiter), header, n_lines(content))


def separator(header: str, delimiter: str) -> str:
    """What parts the columns: a header without a comma says so itself, as spreadsheets write `;` or tabs in many languages."""
    return next((one for one in ",;\t|" if one in header), ",") if delimiter == "," else delimiter


def unquoted(text: str, header: list[str], delimiter: str) -> tuple[pl.DataFrame, Broken]:
    """Text without any quote, split by columns."""
    lines = pl.DataFrame({"text": pl.Series([text]).str.split("\n").explode()}).with_row_index("line", 1).slice(1)
    n_fields = pl.col("text").str.count_matches(delimiter, literal=True) + 1
    lines = lines.with_columns(pl.col("line").cast(pl.UInt32), n=n_fields).filter(pl.col("text") != "")
    bad = lines.filter(pl.col("n") != len(header))
    good = lines.filter(pl.col("n") == len(header))
    fields = good["text"].str.split_exact(delimiter, len(header) - 1).struct.unnest()
    fields.columns = header
    frame = fields.with_columns(pl.all().replace("", None)).with_columns(good["line"])
    return frame, [(line, _count(n, len(header))) for line, n in bad.select("line", "n").iter_rows()]


def quoted(text: str, header: list[str], delimiter: str) -> tuple[pl.DataFrame, Broken]:
    """Any text, record by record."""
    lines, broken = text.split("\n"), []
    records = _records(lines, len(header), delimiter, broken)
    frame = _frame(({**dict(zip(header, fields, strict=True)), "line": line} for line, fields in records), header)
    return frame.with_columns(pl.exclude("line").replace("", None)), broken


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


# --- JSON lines -------------------------------------------------------------------------------------------------------


def refuse_array(piece: bytes, where: str) -> None:
    """Raises SourceError where a text that begins so is one JSON array, over one line or many, and no JSON lines."""
    first, _, rest = piece.lstrip().partition(b"\n")
    if first.startswith(b"[") and not one_by_one(rest.partition(b"\n")[0], 2, ())[0].height:
        raise SourceError(
            f"{where} holds one JSON array (line 1: a JSON object was expected, not list) where one object a line is wanted; "
            "export it as JSON lines (pandas: to_json(name, orient='records', lines=True))"
        )


def json_lines(pieces: Iterable[bytes], wanted: Collection[str] | None = None) -> Rows:
    """One JSON object a line; the columns are all keys of all objects, or those of them that are `wanted`.

    `pieces` are whole lines. Texts are as they are, other scalars as JSON writes them, numbers without exponent and
    4.0 as 4; what is nested is JSON; null and empty texts are null; of a key that stands twice the first holds. `known`
    are all keys, or `wanted` where each of them has a value somewhere.
    """
    frames, broken, known, first = [], [], set[str](), 1
    for piece in pieces:
        for frame, bad, keys in _read(piece, first, wanted):
            frames.append(frame)
            broken += bad
            known |= keys
        first += n_lines(piece)
    schema = {**dict.fromkeys(wanted or (), pl.String), "line": pl.UInt32}
    frame = pl.concat([pl.DataFrame(schema=schema), *frames], how="diagonal", rechunk=True)
    return Rows(frame.select(pl.exclude("line"), "line"), broken, known, first - 1)


Read = tuple[pl.DataFrame, Broken, set[str]]


def _read(piece: bytes, first: int, wanted: Collection[str] | None) -> Iterator[Read]:
    """The lines of a piece that begins on line `first`: all at once, or in halves where one of them is odd."""
    frame = at_once(piece, first, wanted) if wanted else None
    half = piece.find(b"\n", len(piece) // 2) + 1
    if frame is not None:
        yield frame, [], {name for name in wanted or () if frame[name].count()}
    elif not wanted or len(piece) <= SMALL or half in (0, len(piece)):
        yield one_by_one(piece, first, wanted)
    else:
        yield from _read(piece[:half], first, wanted)
        yield from _read(piece[half:], first + n_lines(piece[:half]), wanted)


def at_once(piece: bytes, first: int, wanted: Collection[str]) -> pl.DataFrame | None:
    """What `one_by_one` makes of the piece; None where a line is broken, blank, or may be read in another way there."""
    if "line" in wanted or HALF_A_PAIR.search(piece):
        return None
    try:
        frame = pl.read_ndjson(piece, schema=dict.fromkeys(wanted, pl.String))
    except pl.exceptions.PolarsError:
        return None
    nested = pl.any_horizontal(pl.all().str.contains(r"^[\[{]"))  # or a text that begins so
    if frame.height != n_lines(piece) or frame.select(nested.any()).item():
        return None
    line = pl.int_range(first, first + frame.height, dtype=pl.UInt32, eager=True)
    return frame.with_columns(pl.all().replace("", None)).with_columns(line=line)


def one_by_one(piece: bytes, first: int, wanted: Collection[str] | None) -> Read:
    """The frame, the broken lines and all keys of a piece that begins on line `first`."""
    broken: Broken = []
    known: set[str] = set()

    def rows() -> Iterator[dict[str, Any]]:
        for line, text in enumerate(piece.split(b"\n"), first):
            if not text.strip():
                continue
            try:
                row = json.loads(text.decode("utf-8", errors="replace"), object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                broken.append((line, f"no JSON: {error}"))
                continue
            if not isinstance(row, dict):
                broken.append((line, f"a JSON object was expected, not {type(row).__name__}"))
                continue
            row = {_encodable(key): value for key, value in row.items()}
            known.update(row)
            yield {**{key: _text(value) for key, value in row.items() if wanted is None or key in wanted}, "line": line}

    return _frame(rows(), list(wanted or ())), broken, known


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else made | dict(reversed(pairs))


def _text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, float) and abs(value) < float("inf"):
        return format(Decimal(repr(value)), "f").removesuffix(".0")
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
