"""microlens: pairs, titles, covers, likes and views as MicroLens publishes them (50k, 100k and 1M).

Pairs are clicks with their times (`_pairs.csv`, with or without a header) or whole histories without (`_pairs.tsv`).
Titles are machine translations, with or without a header, quoted or not. Whoever commented on a video is taken to like
it: there are no ratings. Knows nothing of stages or prompts.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import polars as pl
from pydantic import Field

from mllmsrec_core import stage
from mllmsrec_core.datasets import INTERACTIONS, ITEMS, REJECTS, Catalogue, generic
from mllmsrec_core.datasets.amazon import Split
from mllmsrec_core.errors import SourceError, nearest
from mllmsrec_core.stage import Source

COMPRESSED = r"(\.(gz|bz2|xz|zst))?"
PAIRS_TIMED, PAIRS = r"_pairs\.csv", r"_pairs\.tsv"
TITLES = r"_titles?(_en)?\.(csv|tsv)"
VIEWS = r"_likes_and_views\.(txt|tsv)"
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
HEADER = {"user_id": ("user", "user_id"), "item_id": ("item", "item_id"), "at": ("timestamp", "time", "at")}
NUMBER = r"^\d+$"  # users and items are numbers in every release; a first line without one is a header
TITLED = r'(?s)^\s*"?(?P<item_id>\d+)"?\s*[,\t](?P<title>.*)$'


class Params(stage.Params):
    pairs_file: str | None = Field(
        default=None, description="none: found by its name, with times where both forms lie there"
    )
    titles_file: str | None = Field(default=None, description="none: found by its name")
    views_file: str | None = Field(default=None, description="likes and views; there may be none")
    covers: str | None = Field(default=None, description="folder or zip archive of <item>.jpg; none: found by its name")


def read(source: Source | None, params: Params) -> Catalogue:
    """The catalogue of one release. Raises SourceError for a missing or ambiguous file, or a missing column."""
    assert source is not None, "the runner opens a source for every dataset that has a path"
    names = source.names()
    timed = params.pairs_file or found(source, names, "pairs_file", PAIRS_TIMED)
    pairs = timed or found(source, names, "pairs_file", PAIRS)
    titles = params.titles_file or found(source, names, "titles_file", TITLES)
    views = params.views_file or found(source, names, "views_file", VIEWS)
    if not pairs or not titles:
        missing = "pairs" if not pairs else "titles"
        wanted = "MicroLens-50k_pairs.csv or MicroLens-50k_pairs.tsv" if not pairs else "MicroLens-50k_titles.csv"
        raise SourceError(
            f"there is no file of {missing} in {source.uri('')}: wanted is a name such as {wanted}; or name it as "
            f"ingest.microlens.{missing}_file"
        )
    interactions, bad_pairs = interactions_in(source, pairs)
    titled, bad_titles = titles_in(source, titles)
    counts, bad_counts = views_in(source, views) if views else (NO_COUNTS, pl.DataFrame(schema=REJECTS))
    items, unknown = with_views(with_covers(titled, covers_in(source, names, params.covers)), counts)
    return Catalogue(items, interactions, pl.concat([bad_pairs, bad_titles, bad_counts, unknown]))


def found(source: Source, names: Sequence[str], param: str, pattern: str) -> str | None:
    """The one file whose name ends so; None where there is none. Raises SourceError where there are several."""
    ending = re.compile(rf"(?:.*/)?[^/]*{pattern}{COMPRESSED}", re.IGNORECASE)
    fitting = [name for name in names if ending.fullmatch(name)]
    if len(fitting) > 1:
        raise SourceError(
            f"there are several such files in {source.uri('')} ({', '.join(fitting[:10])}): name one as "
            f"ingest.microlens.{param}"
        )
    return fitting[0] if fitting else None


# --- pairs ------------------------------------------------------------------------------------------------------------


def interactions_in(source: Source, name: str) -> Split:
    """Clicks of either form, all liked; lines without a user, item or time that is one are rejects."""
    good, bad = [pl.DataFrame(schema=INTERACTIONS)], [pl.DataFrame(schema=REJECTS)]
    delimiter = "\t" if re.search(rf"\.tsv{COMPRESSED}$", name, re.IGNORECASE) else ","
    names: list[str] = []
    for chunk in source.lines(name):
        lines = chunk
        if not names:
            names, lines = header(source.uri(name), chunk, delimiter)
        kept, rejects = clicks(lines, names, delimiter) if "at" in names else histories(lines, delimiter)
        good.append(kept.select(*list(INTERACTIONS)[:5], source=pl.lit(name), line="line"))
        bad.append(rejects.select(source=pl.lit(name), line="line", reason="reason"))
    return pl.concat(good), pl.concat(bad)


def header(where: str, lines: pl.DataFrame, delimiter: str) -> tuple[list[str], pl.DataFrame]:
    """Our names of the columns ("" for one that is not read), and the lines below a header.

    Raises SourceError where a header lacks a column. Two columns are a user and the items of a whole history.
    """
    first = [field.strip(' "').lower() for field in lines["text"][0].split(delimiter)]
    if first[0].isdigit():
        return (list(HEADER) if len(first) > 2 else list(HEADER)[:2]), lines
    if delimiter == "\t" and len(first) == 2:
        return list(HEADER)[:2], lines.slice(1)
    known = {theirs: ours for ours, names in HEADER.items() for theirs in names}
    names = [known.get(field, "") for field in first]
    for ours, (theirs, *_) in HEADER.items():
        if names.count(ours) != 1:
            raise SourceError(
                f"{where} has no column `{theirs}`, or has it twice (wanted as {ours}); {nearest(theirs, first)}. Write "
                "`user,item,timestamp` as its first line"
            )
    return names, lines.slice(1)


def clicks(lines: pl.DataFrame, names: list[str], delimiter: str) -> Split:
    """One click a line; times are in milliseconds."""
    fields = pl.col("text").str.split(delimiter)
    frame = lines.with_columns(fields=fields).with_columns(n=pl.col("fields").list.len())
    frame = frame.with_columns(
        pl.col("fields").list.get(n, null_on_oob=True).str.strip_chars(' "').alias(name)
        for n, name in enumerate(names)
        if name
    )
    at = generic.moment("at", pl.String(), "ms")
    count = pl.concat_str("n", pl.lit(" fields where "), pl.lit(len(names)), pl.lit(" are wanted"))
    reason = pl.coalesce(
        pl.when(pl.col("n") != len(names)).then(count),
        numbers(),
        generic.unless(at.is_not_null(), "timestamp", "a time between 1990 and 2100 in ms", ours="at", required=True),
    )
    frame = frame.with_columns(reason=reason, at=at, rating=pl.lit(None, pl.Float64), liked=pl.lit(True))
    return frame.filter(pl.col("reason").is_null()), frame.drop_nulls("reason")


def histories(lines: pl.DataFrame, delimiter: str) -> Split:
    """A user's items a line, from first to last, without times."""
    fields = pl.col("text").str.split(delimiter)
    frame = lines.with_columns(
        n=fields.list.len(),
        user_id=fields.list.get(0).str.strip_chars(),
        item_id=fields.list.get(1, null_on_oob=True).str.extract_all(r"\S+"),
    )
    count = pl.concat_str("n", pl.lit(" fields where a user and the items of a history are wanted"))
    empty = pl.col("item_id").list.len() == 0
    frame = frame.with_columns(
        reason=pl.when(pl.col("n") != 2).then(count).when(empty).then(pl.lit("a history of no items")),
        at=pl.lit(None, INTERACTIONS["at"]),
        rating=pl.lit(None, pl.Float64),
        liked=pl.lit(True),
    )
    whole = frame.filter(pl.col("reason").is_null()).explode("item_id").with_columns(reason=numbers())
    broken = pl.concat([frame.drop("item_id"), whole.drop("item_id")]).drop_nulls("reason")
    return whole.filter(pl.col("reason").is_null()), broken


def numbers() -> pl.Expr:
    """The reject's reason where user or item is no number; a user is never named in a reason."""
    item = pl.concat_str(pl.lit("item `"), pl.col("item_id").str.slice(0, generic.QUOTED), pl.lit("` is no number"))
    no_user = ~pl.col("user_id").str.contains(NUMBER)
    no_item = ~pl.col("item_id").str.contains(NUMBER)
    return pl.when(no_user).then(pl.lit("the user is no number")).when(no_item).then(item)


# --- titles, covers, likes and views ----------------------------------------------------------------------------------


def titles_in(source: Source, name: str) -> Split:
    """item_id, title, source and line. A quoted title may go on over several lines; commas need no quotes."""
    lines = pl.concat(list(source.lines(name)))
    begins = pl.col("text").str.contains(TITLED)
    if re.match(r"\W*item", lines["text"][0], re.IGNORECASE):
        lines = lines.slice(1)  # a header
    lines = lines.with_columns(begins=begins)
    lines = lines.with_columns(open=unclosed(pl.col("text")), record=pl.col("begins").cum_sum())
    opened = pl.col("open").first().over("record")
    lost = lines.filter((pl.col("record") == 0) | (~pl.col("begins") & ~opened))
    records = lines.filter(pl.col("record") > 0, pl.col("begins") | opened)
    records = records.group_by("record", maintain_order=True).agg(pl.col("text").str.join("\n"), pl.col("line").first())
    part = pl.col("text").str.extract_groups(TITLED).struct
    rows = records.select(item_id=part.field("item_id"), title=unquoted(part.field("title")), line="line")
    rejects = lost.select(
        source=pl.lit(name), line="line", reason=pl.lit("the line does not begin with an item's number")
    )
    return rows.select("item_id", "title", source=pl.lit(name), line="line"), rejects


def unclosed(text: pl.Expr) -> pl.Expr:
    """Whether a line's title begins with a quote that does not end on it."""
    title = text.str.extract(TITLED, 2).str.strip_chars()
    odd = title.str.count_matches('"', literal=True) % 2 == 1
    return (title.str.starts_with('"') & odd).fill_null(False)


def unquoted(title: pl.Expr) -> pl.Expr:
    """A title without the quotes around it and HTML entities; null where it is empty."""
    stripped = title.str.strip_chars()
    quoted = stripped.str.contains(r'(?s)^".*"$') & (stripped.str.len_chars() > 1)
    inner = stripped.str.head(-1).str.slice(1).str.replace_all('""', '"', literal=True)
    text = pl.when(quoted).then(inner).otherwise(stripped)
    plain = (
        pl.when(text.str.contains("&", literal=True)).then(text.map_elements(html.unescape, pl.String)).otherwise(text)
    )
    return pl.when(plain.str.strip_chars() != "").then(plain.str.strip_chars())


def covers_in(source: Source, names: Sequence[str], place: str | None) -> pl.DataFrame:
    """item_id and image_uri of every cover, from the listing of a folder or of a zip archive, which a folder goes before.

    Raises SourceError where several are covers.
    """
    if place is None:
        folders = {name.rpartition("/")[0] for name in names if name.lower().endswith(PICTURES)}
        places = sorted(under for under in folders if under.lower().endswith("covers"))
        places = places or [name for name in names if name.lower().endswith(f"covers{generic.ARCHIVE}")]
        if len(places) > 1:
            raise SourceError(
                f"there are several folders of covers in {source.uri('')} ({', '.join(places[:10])}): name one as "
                "ingest.microlens.covers"
            )
        place = places[0] if places else None
    listed = source.names(place) if place and place.lower().endswith(generic.ARCHIVE) else names
    covers = generic.by_item(source, listed if place else (), place or "", PICTURES)
    return covers.filter(pl.col("item_id").str.contains(NUMBER))


def with_covers(titled: pl.DataFrame, covers: pl.DataFrame) -> pl.DataFrame:
    """Items with their covers; an item that has a cover alone is one too."""
    alone = covers.join(titled, on="item_id", how="anti")
    items = titled.join(covers, on="item_id", how="left", maintain_order="left")
    return pl.concat([items, alone.with_columns(source=pl.lit(None, pl.String))], how="diagonal")


NO_COUNTS = pl.DataFrame(schema={"item_id": pl.String, "attributes": pl.String, "source": pl.String, "line": pl.UInt32})


def views_in(source: Source, name: str) -> Split:
    """item_id and, as attributes, its likes and views; of two lines of one item the first."""
    three = r"^\s*(?P<item_id>\d+)\t\s*(?P<likes>\d{1,18})\s*\t\s*(?P<views>\d{1,18})\s*$"  # 18 digits fit an Int64
    lines = pl.concat(list(source.lines(name)))
    part = pl.col("text").str.extract_groups(three).struct
    frame = lines.select(
        *(part.field(field).alias(field) for field in ("item_id", "likes", "views")), source=pl.lit(name), line="line"
    )
    second = pl.col("item_id").is_first_distinct().not_()
    frame = frame.with_columns(
        reason=pl.when(pl.col("item_id").is_null())
        .then(pl.lit("an item, its likes and its views are wanted, with tabs between them"))
        .when(second)
        .then(pl.concat_str(pl.lit("second line of item `"), "item_id", pl.lit("`"))),
        attributes=pl.struct(pl.col("likes", "views").cast(pl.Int64)).struct.json_encode(),
    )
    return frame.filter(pl.col("reason").is_null()).select(*NO_COUNTS.columns), frame.drop_nulls("reason").select(
        *REJECTS
    )


def with_views(items: pl.DataFrame, counts: pl.DataFrame) -> Split:
    """Items as ITEMS, `source` and `line`; counts of an item that has neither title nor cover are rejects."""
    unknown = counts.join(items, on="item_id", how="anti", maintain_order="left")
    said = pl.concat_str(pl.lit("likes and views of item `"), "item_id", pl.lit("`, which has neither title nor cover"))
    joined = items.join(counts.select("item_id", "attributes"), on="item_id", how="left", maintain_order="left")
    missing = {name: pl.lit(None, dtype) for name, dtype in ITEMS.items() if name not in joined.columns}
    whole = joined.with_columns(**missing).select(*ITEMS, "source", "line")
    return whole, unknown.select("source", "line", reason=said)
