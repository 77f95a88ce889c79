"""generic: items and interactions in Parquet, CSV, TSV or JSONL files of your own, under your own column names.

Also the parsing every reader of files shares: which number and which time a piece of text is, and the reject when it is
none. Text never fails a run: what cannot be parsed is handed back with file, line and reason.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal

import polars as pl
from pydantic import Field

from mllmsrec_core import stage
from mllmsrec_core.datasets import INTERACTIONS, ITEMS, REJECTS, Catalogue
from mllmsrec_core.stage import Source

Unit = Literal["s", "ms", "us", "ns", "iso"]
TICKS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}  # a second in each unit
EARLIEST, LATEST = datetime(1990, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)  # a time outside is a wrong unit
NAIVE = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M")  # many times faster than one pattern of all that may stand there
NOTHING = ("", "None", "null", "nan", "NaN")  # how exports write that there is no picture
ABSOLUTE = r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)"
ARCHIVE = ".zip"
PLACES = ("url", "uri", "src", "href", "path")  # how an object calls the place of its picture
SIDE_BY_SIDE = re.compile(r"""(?<=['"])\s+(?=['"])""")  # numpy puts no comma between texts, which Python would join
LONGEST = 1_000_000  # characters of a Python literal: its syntax tree takes a hundred times as much memory
QUOTED = 80  # characters of a bad value shown in its reject


class ItemColumns(stage.Params):
    item_id: str = Field(default="item_id", description="column of items")
    title: str | None = Field(default="title", description="column; none: there is none")
    description: str | None = Field(default=None, description="column; none: there is none")
    category: str | None = Field(default=None, description="column; none: there is none")
    attributes: tuple[str, ...] = Field(default=(), description="columns, kept together as one JSON object")
    image: str | None = Field(
        default=None,
        description="column of paths below the root or URIs, or of lists or objects of them (the first wins)",
    )
    image_version: str | None = Field(default=None, description="column that changes when the picture does")


class InteractionColumns(stage.Params):
    user_id: str = Field(default="user_id", description="column of interactions")
    item_id: str = Field(default="item_id", description="column of interactions")
    at: str | None = Field(default="at", description="column of times; none: rows are in order")
    rating: str | None = Field(default=None, description="column; none: there is none")


class Params(stage.Params):
    items_file: str = Field(default="items.csv", description="below the root")
    interactions_file: str = Field(default="interactions.csv", description="below the root")
    at_unit: Unit = Field(default="s", description="what times count in")
    liked_from: float | None = Field(
        default=None, description="ratings from here on are liked; none: every interaction is"
    )
    images: str | None = Field(
        default=None, description="a folder or zip archive that relative places of pictures begin in; none: the root"
    )
    item_columns: ItemColumns = ItemColumns()
    interaction_columns: InteractionColumns = InteractionColumns()


def read(source: Source | None, params: Params) -> Catalogue:
    """The catalogue of files laid out as `params` says. Raises SourceError for a missing file or column."""
    assert source is not None, "the runner opens a source for every dataset that has a path"
    items, broken_items = items_in(source, params.items_file, params.item_columns, params.images)
    interactions, rejects = interactions_in(
        source, params.interactions_file, params.interaction_columns, params.at_unit, params.liked_from
    )
    return Catalogue(items, interactions, pl.concat([broken_items, rejects]))


def items_in(
    source: Source, name: str, columns: ItemColumns, images: str | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Items with the columns of ITEMS, `image_version`, `source` and `line`; and the broken rows of their file."""
    mapped = {ours: theirs for ours, theirs in columns.model_dump(exclude={"attributes"}).items() if theirs}
    frame, broken = source.table(name, mapped | {f"attribute:{theirs}": theirs for theirs in columns.attributes})
    missing = {ours: pl.lit(None, pl.String) for ours in ("title", "description", "category", "image", "image_version")}
    frame = frame.with_columns(**{ours: value for ours, value in missing.items() if ours not in mapped})
    named = {theirs: f"attribute:{theirs}" for theirs in columns.attributes}
    attributes = [_encodable(name, frame.schema[name]).alias(theirs) for theirs, name in named.items()]
    return frame.select(
        *(text(ours, frame.schema[ours]) for ours in ("item_id", "title", "description", "category", "image_version")),
        attributes=pl.struct(attributes).struct.json_encode() if attributes else pl.lit(None, pl.String),
        image_uri=absolute(below(first_filled("image", frame.schema["image"]), images), source.uri("")),
        source="source",
        line="line",
    ).select(*ITEMS, "image_version", "source", "line"), broken


def interactions_in(
    source: Source, name: str, columns: InteractionColumns, unit: Unit, liked_from: float | None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Interactions with the columns of INTERACTIONS; rows whose time or rating is none are rejects."""
    frame, broken = source.table(name, {ours: theirs for ours, theirs in columns.model_dump().items() if theirs})
    at, rating = pl.lit(None, INTERACTIONS["at"]), pl.lit(None, pl.Float64)
    if columns.rating:
        rating = number("rating", frame.schema["rating"])
    if columns.at:
        at = moment("at", frame.schema["at"], unit)
    frame = frame.with_columns(parsed_at=at, parsed_rating=rating)
    bad = _unparsed(frame, columns, unit, liked_from)
    good = frame.join(bad, on=["source", "line"], how="anti", maintain_order="left") if len(bad) else frame
    return good.select(
        *(text(ours, frame.schema[ours]) for ours in ("user_id", "item_id")),
        at="parsed_at",
        rating="parsed_rating",
        liked=pl.lit(True) if liked_from is None else pl.col("parsed_rating") >= liked_from,
        source="source",
        line="line",
    ), pl.concat([broken, bad])


def _unparsed(frame: pl.DataFrame, columns: InteractionColumns, unit: Unit, liked_from: float | None) -> pl.DataFrame:
    """Rejects of the rows that lack a time or rating they need, or say something else there."""
    nothing = pl.lit(None, pl.String)
    reasons = {"at": nothing, "rating": nothing}
    if columns.at:
        allowed = f"a time between {EARLIEST.year} and {LATEST.year} in at_unit `{unit}`"
        reasons["at"] = unless(pl.col("parsed_at").is_not_null(), columns.at, allowed, ours="at", required=True)
    if columns.rating:
        is_number = pl.col("parsed_rating").is_not_null()
        reasons["rating"] = unless(is_number, columns.rating, "a number", required=liked_from is not None)
    written = [ours for ours in reasons if ours in frame.columns]
    doubtful = frame.filter(pl.any_horizontal(pl.lit(False), *(pl.col(f"parsed_{ours}").is_null() for ours in written)))
    doubtful = doubtful.with_columns(_quotable(ours, frame.schema[ours]) for ours in written)
    judged = doubtful.with_columns(reason=pl.coalesce(*reasons.values()))
    return judged.drop_nulls("reason").select(*REJECTS)


def text(name: str, dtype: pl.DataType) -> pl.Expr:
    """A column as String; of a list, its values side by side.

    A float that is whole is written as JSON lines and CSV have it: pandas makes 1.0 of an id 1 where others are missing.
    """
    column = pl.col(name)
    if dtype.is_float():
        whole = pl.when(column == column.floor()).then(column.cast(pl.Int64, strict=False))
        return pl.coalesce(whole.cast(pl.String), column.cast(pl.String))
    if _is_list(dtype):
        return column.cast(pl.List(pl.String)).list.join(", ", ignore_nulls=True)
    if isinstance(dtype, pl.List | pl.Array | pl.Binary | pl.Duration):
        return column.map_elements(_said, return_dtype=pl.String)
    return column.struct.json_encode() if isinstance(dtype, pl.Struct) else column.cast(pl.String)


def _encodable(name: str, dtype: pl.DataType) -> pl.Expr:
    """A column as JSON can hold it: bytes and durations as text."""
    return text(name, dtype) if isinstance(dtype, pl.Binary | pl.Duration) else pl.col(name)


def _is_list(dtype: pl.DataType) -> bool:
    """Whether this is a list of what polars can cast to text."""
    inner = dtype.inner if isinstance(dtype, pl.List | pl.Array) else None
    return inner is not None and not (inner.is_nested() or inner in (pl.Binary, pl.Duration))


def _said(value: Any) -> str:
    """Bytes as the text they most likely are, anything else as Python shows it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return str(value.to_list() if isinstance(value, pl.Series) else value)


def _quotable(name: str, dtype: pl.DataType) -> pl.Expr:
    """A column as text for a reason. A time beyond what can be written is shown as the number it is stored as."""
    return pl.col(name).to_physical().cast(pl.String) if dtype.is_temporal() else text(name, dtype)


def number(name: str, dtype: pl.DataType) -> pl.Expr:
    """A finite Float64, or null."""
    plain = dtype.is_integer() or dtype == pl.Float64  # 0.1 in 32 bits is 0.1 only as text
    parsed = (pl.col(name) if plain else text(name, dtype).str.strip_chars()).cast(pl.Float64, strict=False)
    return pl.when(parsed.is_finite()).then(parsed)


def moment(name: str, dtype: pl.DataType, unit: Unit) -> pl.Expr:
    """A UTC time between 1990 and 2100, or null. A typed time ignores `unit`; without an offset it is taken as UTC."""
    column = pl.col(name)
    if isinstance(dtype, pl.Date | pl.Datetime):
        naive = dtype == pl.Date or getattr(dtype, "time_zone", None) is None
        time = column.cast(pl.Datetime("us", getattr(dtype, "time_zone", None)), strict=False)
        at = time.dt.replace_time_zone("UTC") if naive else time.dt.convert_time_zone("UTC")
    elif unit == "iso":
        at = _iso(text(name, dtype).str.strip_chars())
    else:
        at = _since_1970(name, dtype, TICKS[unit]).cast(INTERACTIONS["at"])
    return pl.when(at.is_between(EARLIEST, LATEST)).then(at)


def _since_1970(name: str, dtype: pl.DataType, second: int) -> pl.Expr:
    """Microseconds of a number that counts `second` a second; null for what is none and for what is outside the years.

    Whole numbers are exact. A fraction is kept, rounded to the microsecond, which a Float64 of seconds still tells.
    """
    plain = dtype.is_integer() or dtype == pl.Float64
    written = pl.col(name) if plain else text(name, dtype).str.strip_chars()
    first, last = int(EARLIEST.timestamp()) * second, int(LATEST.timestamp()) * second
    whole, real = (written.cast(kind, strict=False) for kind in (pl.Int64, pl.Float64))
    # judged before they are multiplied: the product of what is far outside wraps around, or fits no integer
    exact = pl.when(whole.is_between(first, last)).then(_micros(whole, second))
    near = pl.when(real.is_between(first, last)).then(
        (real * (1_000_000 / second)).round().cast(pl.Int64, strict=False)
    )
    if dtype.is_integer():
        return exact
    return near if dtype == pl.Float64 else pl.coalesce(exact, near)


def _micros(ticks: pl.Expr, second: int) -> pl.Expr:
    return ticks // (second // 1_000_000) if second > 1_000_000 else ticks * (1_000_000 // second)


def _iso(text: pl.Expr) -> pl.Expr:
    """ISO 8601 text as UTC; so is a date alone, a time without seconds, and how Postgres (`+00`), BigQuery (` UTC`) and
    spreadsheets (`2024/02/29`) write a time."""
    text = text.str.strip_suffix(" UTC").str.replace("/", "-", literal=True, n=2).str.replace(" ", "T", literal=True)
    found = [
        text.str.to_datetime(form, time_unit="us", strict=False) for form in (*NAIVE, *(f"{one}%#z" for one in NAIVE))
    ]
    naive, aware = found[: len(NAIVE)], found[len(NAIVE) :]
    day = text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))
    return pl.coalesce(*aware, *(one.dt.replace_time_zone("UTC") for one in (*naive, day)))


def unless(good: pl.Expr, column: str, what: str, ours: str = "rating", *, required: bool) -> pl.Expr:
    """The reject's reason where `good` does not hold; an empty value is one only where it is `required`."""
    written = pl.col(ours).cast(pl.String).str.strip_chars()
    empty = written.is_null() | (written == "")
    said = pl.concat_str(pl.lit(f"{column} `"), written.str.slice(0, QUOTED), pl.lit(f"` is not {what}"))
    return pl.when(empty).then(pl.lit(f"{column} is empty") if required else None).when(~good).then(said)


def first_filled(name: str, dtype: pl.DataType) -> pl.Expr:
    """The first place of a picture in a list or object, or in JSON or Python text that is one; a plain value as it is."""
    if _is_list(dtype):
        return pl.col(name).cast(pl.List(pl.String)).list.eval(_filled(pl.element()).drop_nulls()).list.first()
    if dtype.is_nested():
        return pl.col(name).map_elements(_nested, return_dtype=pl.String).str.strip_chars()
    return _filled(text(name, dtype).map_elements(_written, return_dtype=pl.String))


def _filled(text: pl.Expr) -> pl.Expr:
    stripped = text.str.strip_chars()
    return pl.when(~stripped.is_in(NOTHING)).then(stripped)


def _nested(value: Any) -> str | None:
    return _place(value.to_list() if isinstance(value, pl.Series) else value)


def _written(text: str) -> str | None:
    """The first place in text that is a list or object: JSON, or as pandas and numpy write one into a CSV file."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    with suppress(ValueError, RecursionError):
        return _place(json.loads(text))
    with suppress(RecursionError):
        value = literal(SIDE_BY_SIDE.sub(", ", text))
        return text if value is None else _place(value)
    return text


def literal(text: str) -> Any:
    """The value of a Python literal, some 16,000 lines a second of one core; None where it is none."""
    if len(text) > LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `\\d` and the like in a title
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _place(value: Any) -> str | None:
    """The first text of a list that is not empty; of an object its URL or path by name, else the first URL in it."""
    if isinstance(value, dict):
        others = [one for one in value.values() if not isinstance(one, str) or "://" in one]
        value = [*(value.get(key) for key in PLACES), *others]
    if isinstance(value, list | tuple):
        return next((found for one in value if (found := _place(one))), None)
    return value if isinstance(value, str) and value.strip() not in NOTHING else None


def below(place: pl.Expr, images: str | None) -> pl.Expr:
    """A relative path as one below a folder, a zip archive, or a folder in one (`zip://covers::shop.zip`)."""
    if images is None:
        return place
    inner, chained, archive = images.partition("::")
    inner, archive = (f"{inner.rstrip('/')}/", archive) if chained else ("zip://", images)
    if archive.lower().endswith(ARCHIVE):
        member = pl.concat_str(pl.lit(inner), place.str.strip_prefix("./"), pl.lit(f"::{archive}"))
    else:
        member = pl.concat_str(pl.lit(f"{images.rstrip('/')}/"), place)
    return pl.when(place.str.contains(ABSOLUTE)).then(place).otherwise(member)


def absolute(place: pl.Expr, root: str) -> pl.Expr:
    """A path below the dataset's root, or that of an archive (`zip://7.jpg::covers.zip`), as a URI; absolute ones stay."""
    member = place.str.extract(r"^(zip://.*?::)").fill_null("")
    file = place.str.replace(r"^zip://.*?::", "")
    below = pl.concat_str(pl.lit(f"{root}/"), file)
    absolute = file.str.contains(ABSOLUTE)
    return pl.concat_str(member, pl.when(absolute).then(file).otherwise(below))


def by_item(source: Source, names: Iterable[str], folder: str, ends: tuple[str, ...]) -> pl.DataFrame:
    """item_id and image_uri of the pictures called `<item>.jpg`: those in `folder`, and members of an archive wherever
    in it they are. Of two of one item the first by name."""
    found: dict[str, str] = {}
    for name in names:
        place, _, archive = name.partition("::")
        above, _, last = place.rpartition("/")
        if (archive or above == folder.rstrip("/")) and last.lower().endswith(ends):
            found.setdefault(last.rpartition(".")[0], name)
    frame = pl.DataFrame(
        {"item_id": list(found), "name": list(found.values())},
        schema_overrides=dict.fromkeys(("item_id", "name"), pl.String),
    )
    return frame.select("item_id", image_uri=absolute(pl.col("name"), source.uri("")))
