"""amazon: the reviews and metadata of one category as the collections of 2014, 2018 and 2023 publish them.

Reviews are JSON lines, the hub's Parquet or the CSV of ids and ratings; metadata is JSON lines, Python literals (2014)
or the hub's Parquet. Every record of metadata says by its own keys how it is written, so one function reads them all.
A title that is no title (a script, a tag) is none, and the item stays. Knows nothing of stages or prompts.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import polars as pl
from pydantic import Field

from mllmsrec_core import stage
from mllmsrec_core.datasets import ITEMS, REJECTS, Catalogue, generic
from mllmsrec_core.errors import SourceError, nearest
from mllmsrec_core.stage import Source

Version = Literal["2014", "2018", "2023"]
Record = Mapping[str, Any]

BEFORE_2023 = generic.InteractionColumns(user_id="reviewerID", item_id="asin", at="unixReviewTime", rating="overall")
SINCE_2023 = generic.InteractionColumns(
    user_id="user_id", item_id="parent_asin", at="timestamp", rating="rating"
)  # `asin` is the colour or size that was bought, `parent_asin` the product that metadata describes
JSON_LINES = (".json", ".jsonl", ".ndjson")
NAMED = re.compile(r"(?P<stem>.+?)(?P<end>\.jsonl?|\.ndjson|\.csv|\.parquet)(?:\.(?:gz|bz2|xz|zst))?", re.IGNORECASE)
META = re.compile(r"(?:raw_)?meta_(?P<category>.+)")
REVIEWS = re.compile(r"(?:raw_review_|reviews_)?(?P<category>.+?)(?:_5)?")  # _5: the 5-core
SAMPLE = 100  # records read to tell the version
TAG = re.compile(r"</?[A-Za-z][^<>]*>")
PRICE = re.compile(r"\$?\s*(\d[\d,]*(?:\.\d+)?)(?:\s*-\s*\$?\s*\d[\d,]*(?:\.\d+)?)?")  # of a range, where it begins
CATEGORIES = ("categories", "category", "main_category", "main_cat")  # the first that is not empty
SIZES = ("hi_res", "large", "thumb")  # of a picture, best first


class Params(stage.Params):
    version: Literal["auto", "2014", "2018", "2023"] = Field(
        default="auto", description="auto: by the first reviews' keys"
    )
    category: str | None = Field(default=None, description="which, where the folder holds several: Video_Games")
    reviews_file: str | None = Field(default=None, description="none: found by its name in the folder")
    meta_file: str | None = Field(default=None, description="none: found by its name in the folder")
    liked_from: float = Field(default=4.0, description="ratings from here on are liked")
    disliked_to: float | None = Field(default=None, description="ratings above it, below liked_from, are rejects")
    repeats: Literal["first", "all"] = Field(default="first", description="of one user's reviews of one item")


def read(source: Source | None, params: Params) -> Catalogue:
    """The catalogue of one category. Raises SourceError for a missing or ambiguous file, or a missing column."""
    assert source is not None, "the runner opens a source for every dataset that has a path"
    reviews, meta = files_of(source, params)
    items, broken = items_in(source, meta, params.version)
    columns = columns_of(source, reviews, params.version)
    unit = "s" if columns == BEFORE_2023 else "ms"
    interactions, unparsed = generic.interactions_in(source, reviews, columns, unit, params.liked_from)
    interactions, neutral = without_neutral(interactions, params.liked_from, params.disliked_to)
    repeated = pl.DataFrame(schema=REJECTS)
    if params.repeats == "first":
        interactions, repeated = first_reviews(interactions)
    return Catalogue(items, interactions, pl.concat([broken, unparsed, neutral, repeated]))


# --- reviews ----------------------------------------------------------------------------------------------------------


def columns_of(source: Source, name: str, version: str) -> generic.InteractionColumns:
    """What the columns of the reviews are called. Raises SourceError where their keys are of no version."""
    if version != "auto":
        return SINCE_2023 if version == "2023" else BEFORE_2023
    if ending(name) not in JSON_LINES:
        return SINCE_2023
    records = (record for chunk in records_in(source, name) for _, record in chunk if not isinstance(record, str))
    keys = {str(key) for record in islice(records, SAMPLE) for key in record}
    for columns in (SINCE_2023, BEFORE_2023):
        if columns.user_id in keys:
            return columns
    raise SourceError(
        f"cannot tell the version of {source.uri(name)}: its first records have neither `{SINCE_2023.user_id}` (2023) nor "
        f"`{BEFORE_2023.user_id}` (2014, 2018), but {', '.join(sorted(keys)[:20]) or 'no keys at all'}. Name the file of "
        "reviews as ingest.amazon.reviews_file, or its version as ingest.amazon.version"
    )


Split = tuple[pl.DataFrame, pl.DataFrame]  # rows that stay, and rejects


def without_neutral(reviews: pl.DataFrame, liked_from: float, disliked_to: float | None) -> Split:
    """With two thresholds, what lies between them is neither liked nor disliked: a reject."""
    if disliked_to is None:
        return reviews, pl.DataFrame(schema=REJECTS)
    between = (pl.col("rating") > disliked_to) & (pl.col("rating") < liked_from)
    said = f" is neither liked (from {liked_from:g}) nor disliked (to {disliked_to:g})"
    reason = pl.concat_str(pl.lit("a rating of "), pl.col("rating").cast(pl.String), pl.lit(said))
    return reviews.filter(~between), reviews.filter(between).select("source", "line", reason.alias("reason"))


def first_reviews(reviews: pl.DataFrame) -> Split:
    """Of a user's reviews of one item the earliest, of those the one with the highest rating, then of the first line."""
    whole = pl.col("user_id").is_not_null() & pl.col("item_id").is_not_null()
    pair = pl.struct("user_id", "item_id")
    repeated = reviews.filter(whole & pair.is_duplicated())  # a few per cent: only these are sorted
    by = ("user_id", "item_id", "at", "rating", "source", "line")
    repeated = repeated.sort(by, descending=[False, False, False, True, False, False])
    kept_in = pl.col("source").first().over(pair)
    later = repeated.select(
        "source",
        "line",
        reason=pl.concat_str(
            pl.lit("the same user reviewed the item already, in line "),
            pl.col("line").first().over(pair),
            pl.when(kept_in != pl.col("source")).then(pl.concat_str(pl.lit(" of "), kept_in)).otherwise(pl.lit("")),
        ),
        first=pl.struct("user_id", "item_id").is_first_distinct(),
    )
    later = later.filter(~pl.col("first")).drop("first")
    return reviews.join(later, on=["source", "line"], how="anti", maintain_order="left"), later


# --- items ------------------------------------------------------------------------------------------------------------


def items_in(source: Source, name: str, version: str) -> Split:
    """Items with the columns of ITEMS, `source` and `line`; lines that are neither JSON nor a literal are rejects."""
    schema = {**ITEMS, "line": pl.UInt32}
    frames, broken = [pl.DataFrame(schema=schema)], []
    key_seen, keys = False, set()
    for chunk in records_in(source, name):
        rows = []
        for line, record in chunk:
            if isinstance(record, str):
                broken.append((name, line, record))
                continue
            key_seen = key_seen or item_key(record, version) is not None
            if not key_seen:
                keys.update(map(str, record))
            try:
                rows.append((*product(record, version), line))
            except (ValueError, RecursionError) as error:
                broken.append((name, line, f"its details cannot be kept as JSON: {error}"))
        frames.append(pl.DataFrame(rows, schema=schema, orient="row"))
    if keys and not key_seen:
        wanted = "asin" if version in ("2014", "2018") else "parent_asin"
        raise SourceError(
            f"{source.uri(name)} has no column `{wanted}` (wanted as item_id); {nearest(wanted, keys)}. Name the metadata "
            "as ingest.amazon.meta_file, or its version as ingest.amazon.version"
        )
    items = pl.concat(frames).select(*ITEMS, source=pl.lit(name), line="line")
    return items, pl.DataFrame(broken, schema=REJECTS, orient="row")


def records_in(source: Source, name: str) -> Iterator[Iterator[tuple[int, Record | str]]]:
    """Chunks of line and record; instead of a record that cannot be read, the reason."""
    if ending(name) in JSON_LINES:
        for chunk in source.lines(name):
            yield ((line, record_of(text)) for text, line in chunk.select("text", "line").iter_rows())
        return
    frame, broken = source.table(name)
    yield ((row["line"], row) for row in frame.iter_rows(named=True))
    yield ((line, reason) for line, reason in broken.select("line", "reason").iter_rows())


def record_of(text: str) -> Record | str:
    """The object a line holds, as JSON or as a Python literal (the form of 2014), or the reason why there is none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        record = generic.literal(text)
        if record is None:
            return f"neither JSON nor a Python literal: {error}"
    return record if isinstance(record, dict) else f"an object was expected, not {type(record).__name__}"


def item_key(record: Record, version: str) -> str | None:
    """The key under which the record keeps its item's id: `asin` until 2018, `parent_asin` since."""
    wanted = (
        ("asin",) if version in ("2014", "2018") else ("parent_asin",) if version == "2023" else ("parent_asin", "asin")
    )
    return next((key for key in wanted if key in record), None)


def product(record: Record, version: str) -> tuple[str | None, ...]:
    """A record as the columns of ITEMS. Raises ValueError or RecursionError where its details are beyond JSON."""
    key = item_key(record, version)
    item_id = record[key] if key else None
    return (
        sound(str(item_id)) if isinstance(item_id, str | int) else None,
        title_of(record.get("title")),
        prose(record.get("description")) or prose(record.get("features") or record.get("feature")),
        path_of(next((record[key] for key in CATEGORIES if record.get(key)), None)),
        attributes_of(record),
        image_of(record),
    )


def sound(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON can write and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def title_of(value: Any) -> str | None:
    """A title without HTML entities; null for a script or a tag that was scraped in its place."""
    title = html.unescape(sound(value)).strip() if isinstance(value, str) else ""
    return None if not title or title.startswith("<") or "getTime" in title else title


def prose(value: Any) -> str | None:
    """A text, or paragraphs of it, without tags and entities."""
    parts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    text = " ".join(part for part in parts if isinstance(part, str))
    return html.unescape(TAG.sub(" ", sound(text))).strip() or None


def path_of(value: Any) -> str | None:
    """A category and those above it, from the top: `Toys & Games > Puzzles`; of several paths the first."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple):
        value = value[0]
    names = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    cleaned = (prose(name) for name in names)
    return " > ".join(name for name in cleaned if name) or None


def attributes_of(record: Record) -> str | None:
    """Brand, price in dollars and details as a JSON object; null where there are none."""
    kept = {
        "brand": prose(record.get("brand") or record.get("store")),
        "price": price_of(record.get("price")),
        "details": details_of(record.get("details")),
    }
    filled = {name: value for name, value in kept.items() if value is not None}
    if not filled:
        return None
    return sound(json.dumps(filled, ensure_ascii=False, allow_nan=False, skipkeys=True, default=str))


def price_of(value: Any) -> float | None:
    """3.17, "3.17" or "$3.17" as a number; the lower end of "$3.17 - $9"; null for whatever else stands there."""
    if isinstance(value, str):
        match = PRICE.fullmatch(value.strip())
        value = float(match[1].replace(",", "")) if match else None
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12  # dollars
    return float(value) if good else None


def details_of(value: Any) -> dict[str, Any] | None:
    """An object, or JSON text that is one; null where it is empty or neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) and value else None


def image_of(record: Record) -> str | None:
    """The URL of the main picture in its largest size; of another picture where there is no main one."""
    pictures = pictures_of(record.get("images"))
    pictures.sort(key=lambda picture: picture.get("variant") != "MAIN")
    urls = [picture.get(size) for picture in pictures for size in SIZES]
    for key in ("imageURLHighRes", "imageURL", "imUrl"):
        value = record.get(key)
        urls += value if isinstance(value, list | tuple) else [value]
    written = (sound(url).strip() for url in urls if isinstance(url, str))
    return next((url for url in written if url not in generic.NOTHING), None)


def pictures_of(value: Any) -> list[Mapping[str, Any]]:
    """One object per picture, from such a list (JSON) or from an object of parallel lists (the hub's Parquet)."""
    if not isinstance(value, dict):
        return [picture for picture in value if isinstance(picture, dict)] if isinstance(value, list | tuple) else []
    columns = {key: value.get(key) for key in (*SIZES, "variant")}
    lists = {key: column for key, column in columns.items() if isinstance(column, list | tuple)}
    longest = max(map(len, lists.values()), default=0)
    return [{key: column[n] for key, column in lists.items() if n < len(column)} for n in range(longest)]


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A file, or a folder of Parquet parts, whose name says what it holds."""

    name: str
    category: str
    meta: bool


def files_of(source: Source, params: Params) -> tuple[str, str]:
    """The names of the reviews and of the metadata, as given or found. Raises SourceError unless there is one of each."""
    if params.reviews_file and params.meta_file:
        return params.reviews_file, params.meta_file
    known = list(recognised(source.names()))
    given = params.reviews_file or params.meta_file
    categories = {found.category for found in recognised([given] if given else [])} or {
        found.category for found in known
    }
    if params.category is not None:
        categories = {params.category}
    both = [{found.category for found in known if found.meta == meta} for meta in (False, True)]
    if not given:
        categories &= both[0] & both[1]
    reviews = [params.reviews_file] if params.reviews_file else named(known, categories, meta=False)
    meta = [params.meta_file] if params.meta_file else named(known, categories, meta=True)
    if len(reviews) == 1 and len(meta) == 1:
        return reviews[0], meta[0]
    raise SourceError(ambiguous(source.uri(""), params.category, reviews, meta))


def ambiguous(where: str, category: str | None, reviews: Sequence[str], meta: Sequence[str]) -> str:
    """What to do where the files' names leave none or several to read."""
    of = f" of {category}" if category else ""
    say = "name them as ingest.amazon.reviews_file and ingest.amazon.meta_file"
    if not reviews or not meta:
        return (
            f"there are no reviews{of} with their metadata in {where}: wanted are names such as Baby.jsonl.gz and "
            f"meta_Baby.jsonl.gz, reviews_Baby_5.json.gz and meta_Baby.json.gz, or the hub's folders raw_review_Baby and "
            f"raw_meta_Baby; or {say}"
        )
    several = ", ".join([*reviews, *meta][:10])
    return f"there are several files of reviews or metadata{of} in {where} ({several}): set ingest.amazon.category, or {say}"


def named(known: Iterable[Found], categories: set[str], meta: bool) -> list[str]:
    """The files of these categories that are metadata, or that are not."""
    return [found.name for found in known if found.meta == meta and found.category in categories]


def recognised(names: Iterable[str]) -> Iterator[Found]:
    """What each file is by its name; the parts of a folder of Parquet count once."""
    folders = set()
    for path in names:
        name = path
        folder, _, last = path.rpartition("/")
        whole = folder.rpartition("/")[2]
        match = NAMED.fullmatch(last)
        if match and match["end"].lower() == ".parquet" and whole.startswith(("raw_review_", "raw_meta_")):
            if folder in folders:
                continue
            folders.add(folder)
            name, stem = folder, whole
        elif match:
            stem = match["stem"]
        elif last.startswith(("raw_review_", "raw_meta_")):
            stem = last  # a folder that was given by name
        else:
            continue
        meta = META.fullmatch(stem)
        found = meta or REVIEWS.fullmatch(stem)
        if found and not (meta and match and match["end"].lower() == ".csv"):
            yield Found(name, found["category"], meta is not None)


def ending(name: str) -> str:
    """The extension of a file without that of its compression; of a folder `.parquet`."""
    match = NAMED.fullmatch(name.rpartition("/")[2])
    return match["end"].lower() if match else ".parquet"
