"""A dataset nobody has described yet: looks at its files and says what they seem to be, as lines of a profile.

Layouts that a reader of ours knows are told by their files; of others the generic reader's mapping is guessed from the
columns' names and from some thousand values each. What is a doubtful guess says why. Reads the head of each file alone.
Knows neither TOML nor a command line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import polars as pl

from mllmsrec_core.datasets import amazon, generic, microlens
from mllmsrec_core.errors import SourceError
from storage.formats import TABLES, extension_of, keys_of
from storage.heads import Head, heads
from storage.source import FsspecSource
from tasks.init_pictures import named_by_number, with_pictures
from tasks.proposal import Found, Line, Proposal, several

# Columns by what they are called, the most telling first; letters and digits alone, in lower case.
NAMES: dict[str, tuple[str, ...]] = {
    "user_id": (
        "userid", "user", "uid", "customerid", "customer", "reviewerid", "clientid", "client", "visitorid", "visitor",
        "memberid", "member", "accountid", "account", "buyerid", "buyer", "shopperid", "shopper", "sessionid",
    ),
    "item_id": (
        "itemid", "item", "iid", "sku", "productid", "product", "parentasin", "asin", "articleid", "article", "movieid",
        "movie", "videoid", "video", "trackid", "track", "songid", "bookid", "book", "isbn", "gameid", "recipeid", "newsid",
        "listingid", "contentid", "id",
    ),
    "at": (
        "timestamp", "time", "datetime", "eventtime", "createdat", "orderedat", "purchasedat", "clickedat", "date", "ts",
        "at", "unixreviewtime", "eventtimestamp", "orderdate", "tdat", "when", "day",
    ),
    "rating": ("rating", "stars", "score", "overall", "rate", "grade", "preference"),
    "title": ("title", "name", "productname", "itemname", "prodname", "itemtitle", "producttitle", "headline", "label"),
    "description": ("description", "desc", "detaildesc", "longdescription", "text", "summary", "overview", "abstract"),
    "category": (
        "category", "categories", "genres", "genre", "department", "producttypename", "maincategory", "producttype", "type",
    ),
    "image": (
        "image", "imageurl", "imageuri", "imagepath", "picture", "pictureurl", "photo", "poster", "cover", "thumbnail",
        "img", "imgurl", "imurl", "imagefile", "filename", "images",
    ),
    "image_version": ("imageversion", "imageetag", "pictureetag", "etag"),
}  # fmt: skip
ATTRIBUTES = (
    "brand", "size", "color", "colour", "price", "store", "material", "manufacturer", "author", "artist", "year",
)  # fmt: skip
VAGUE = ("id", "sessionid", "product", "when", "day", "text", "summary", "label", "type", "filename")
OF_ITEMS = ("item_id", "title", "description", "category", "image", "image_version")
OF_INTERACTIONS = ("user_id", "item_id", "at", "rating")
LIKED = ((1, 1.0), (5, 4.0), (10, 8.0), (100, 80.0))  # the end of a scale of ratings, and where liking begins on it


def propose(path: str) -> Proposal:
    """What the files below `path`, a folder on any fsspec URL, seem to be.

    Raises SourceError where there is none, or where nothing in them looks like items or interactions.
    """
    source = FsspecSource(path)
    names = [name for name in source.names() if name]  # a file has none below it but itself
    if not names:
        raise SourceError(
            f"there is no file below {source.uri('') or path}: init wants the folder that holds items and interactions"
        )
    for recognise in (movielens, of_microlens, of_amazon):
        if found := recognise(source, names):
            return found
    return of_generic(source, names)


# --- layouts our readers know -----------------------------------------------------------------------------------------


def movielens(source: FsspecSource, names: Sequence[str]) -> Proposal | None:
    """ratings.csv beside movies.csv, by their headers too."""
    for ratings in (name for name in names if name.rpartition("/")[2] == "ratings.csv"):
        folder = ratings.removesuffix("ratings.csv")
        pair = {head.name: set(head.frame.columns) for head in heads(source, [ratings, f"{folder}movies.csv"])}
        if {"userId", "movieId", "rating"} <= pair.get(ratings, set()) and "movieId" in pair.get(
            f"{folder}movies.csv", set()
        ):
            lines = [
                Line("ingest.movielens", "ratings_file", ratings),
                Line("ingest.movielens", "movies_file", f"{folder}movies.csv"),
                Line("ingest.movielens", "liked_from", 4.0, note="ratings from here on are liked"),
            ]
            return Proposal(
                "movielens", (*lines, *named_by_number(source, names, "ingest.movielens", "posters", ".jpg"))
            )
    return None


def of_microlens(source: FsspecSource, names: Sequence[str]) -> Proposal | None:
    """Pairs and titles by the ends of their names; of several releases the first, which is then unsure."""
    found = {
        "pairs_file": ending(names, microlens.PAIRS_TIMED) or ending(names, microlens.PAIRS),
        "titles_file": ending(names, microlens.TITLES),
        "views_file": ending(names, microlens.VIEWS),
    }
    if not found["pairs_file"] or not found["titles_file"]:
        return None
    lines = [
        Line("ingest.microlens", key, files[0], several(files, "by its name")) for key, files in found.items() if files
    ]
    return Proposal("microlens", (*lines, *named_by_number(source, names, "ingest.microlens", "covers")))


def of_amazon(source: FsspecSource, names: Sequence[str]) -> Proposal | None:
    """Reviews and metadata of one category by their names; of several categories the first, which is then unsure."""
    known = list(amazon.recognised(names))
    kinds = [{found.category for found in known if found.meta == meta} for meta in (False, True)]
    both = sorted(kinds[0] & kinds[1])
    if not both:
        return None
    why = f"the folder also holds {', '.join(both[1:6])}" if len(both) > 1 else ""
    lines = [Line("ingest.amazon", "category", both[0], why)]
    for key, meta in (("reviews_file", False), ("meta_file", True)):
        files = amazon.named(known, {both[0]}, meta)
        lines += [Line("ingest.amazon", key, files[0], several(files, "by its name"))] if len(files) > 1 else []
    liked = Line("ingest.amazon", "liked_from", 4.0, note="ratings from here on are liked")
    version = Line("ingest.amazon", "version", "auto", note="2014, 2018 or 2023: told by the keys of the reviews")
    return Proposal("amazon", (*lines, version, liked))


def ending(names: Iterable[str], pattern: str) -> list[str]:
    whole = re.compile(rf"(?:.*/)?[^/]*{pattern}{microlens.COMPRESSED}", re.IGNORECASE)
    return [name for name in names if whole.fullmatch(name)]


# --- any other files --------------------------------------------------------------------------------------------------


def of_generic(source: FsspecSource, names: Sequence[str]) -> Proposal:
    """The generic reader's mapping of the two files that look most like items and interactions."""
    looked = list(tables(source, names))
    clicks = best(looked, lambda head: fit(head, "interactions"))
    items = None
    if clicks:
        others = [head for head in looked if head is not clicks]
        items = best(others, lambda head: fit(head, "items", clicks)) or best([clicks], lambda head: fit(head, "items"))
    if clicks is None or items is None:
        what = "interactions (a user, an item and a time)" if clicks is None else "items (an id and a title)"
        shown = "; ".join(f"{head.name} ({head.trouble or ', '.join(head.columns[:8])})" for head in looked[:5])
        raise SourceError(
            f"no file below {source.uri('')} looks like {what}. Looked at: {shown or ', '.join(names[:5])}. Copy the profile "
            "`generic` and name the files and their columns there"
        )
    of_items, of_clicks = mapped(items, OF_ITEMS), mapped(clicks, OF_INTERACTIONS)
    of_clicks["item_id"] = joined(of_clicks["item_id"], clicks, values(items, of_items["item_id"].column), items.whole)
    of_items, images = with_pictures(source, names, items, of_items)
    rest = [head.name for head in looked if head not in (clicks, items)]
    unread = f"the file that looks most like it; not used: {', '.join(rest[:5])}" if rest else ""
    lines = [
        Line(
            "ingest.generic",
            "items_file",
            items.name,
            "the same file as the interactions" if items is clicks else unread,
        ),
        Line("ingest.generic", "interactions_file", clicks.name, unread),
        *unit_of(clicks, of_clicks),
        *threshold(clicks, of_clicks),
        *images,
        *columns("ingest.generic.item_columns", of_items, "title"),
        *attributes(items, of_items),
        *columns("ingest.generic.interaction_columns", of_clicks, "at"),
    ]
    return Proposal("generic", tuple(lines))


def tables(source: FsspecSource, names: Sequence[str]) -> Iterable[Head]:
    """The head of every table; one that is cut into parts goes by its folder, and its head is that of the first part."""
    cut: dict[str, list[str]] = {}
    for name in names:
        if folder := cut_from(name):
            cut.setdefault(folder, []).append(name)
    first = {parts[0]: folder for folder, parts in cut.items()}
    for head in heads(source, [name for name in names if name in first or not cut_from(name)]):
        folder = first.get(head.name)
        if folder is None:
            yield head
            continue
        keys = {key: pl.lit(value) for key, value in keys_of(head.name.removeprefix(folder)).items()}
        n, frame = len(cut[folder]), head.frame if head.trouble else head.frame.with_columns(**keys)
        yield replace(head, name=folder, size=n * head.size, frame=frame, whole=head.whole and n == 1)


def cut_from(name: str) -> str:
    """The folder a part was cut from: the one above its key=value folders, or that of `part-0001.csv`; else empty."""
    if extension_of(name) not in TABLES:
        return ""
    folder, _, last = name.rpartition("/")
    above = re.sub(r"(/[^/=]+=[^/]*)+$", "", folder)
    numbered = re.match(r"part[-_.]?\d", last) and not last.endswith(".parquet")
    return above if above != folder or numbered else ""


def best(looked: Iterable[Head], fits: Callable[[Head], int]) -> Head | None:
    """The file that fits best; of equal ones the larger, then the first by name. None where none fits."""
    fitting = [(-points, -head.size, head.name, head) for head in looked if (points := fits(head))]
    return min(fitting, key=lambda one: one[:3])[3] if fitting else None


def fit(head: Head, role: Literal["items", "interactions"], clicks: Head | None = None) -> int:
    """How much a file looks like interactions or, beside these, like the items in them; 0: not at all."""
    if role == "interactions":
        found = mapped(head, OF_INTERACTIONS)
        return (2 + 2 * ("at" in found) + ("rating" in found)) * ({"user_id", "item_id"} <= set(found))
    found = mapped(head, OF_ITEMS)
    texts = set(found) & {"title", "image", "description"}
    if "item_id" not in found or not texts:
        return 0
    ids = values(head, found["item_id"].column)
    user = mapped(clicks, OF_INTERACTIONS)["user_id"].column if clicks else None
    shared = clicks is not None and any(ids & values(clicks, name) for name in clicks.columns if name != user)
    return 1 + 2 * ("title" in found) + len(found) + 10 * shared


def mapped(head: Head, wanted: Sequence[str]) -> dict[str, Found]:
    """Which column of the file seems to be which of `wanted`; a column is taken once."""
    found: dict[str, Found] = {}
    for ours in wanted:
        taken = {one.column for one in found.values()}
        free = [name for name in head.columns if name not in taken]
        if column := called(free, ours) or (by_values(head, free) if ours == "at" else None):
            found[ours] = column
    return found


def called(free: Sequence[str], ours: str) -> Found | None:
    """The column by its name: one of the known names, else one that holds such a name."""
    by_name = {plainly(name): name for name in reversed(free)}
    for known in NAMES[ours]:
        if known in by_name:
            return Found(by_name[known], "the name may mean something else" if known in VAGUE else "")
    for known in NAMES[ours]:
        for name in free:
            if len(known) > 3 and known in plainly(name):  # shorter ones are in every other word
                return Found(name, f"the name only resembles `{known}`")
    return None


def plainly(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def by_values(head: Head, free: Sequence[str]) -> Found | None:
    """A column of typed times."""
    typed = [name for name in free if head.frame.schema[name].is_temporal()]
    return Found(typed[0], "chosen because it holds times") if typed else None


def values(head: Head, column: str) -> set[str]:
    """The values of a column in the head, as text."""
    return set(head.frame.select(generic.text(column, head.frame.schema[column])).to_series().drop_nulls())


def joined(named: Found, clicks: Head, ids: set[str], whole: bool) -> Found:
    """The column of the interactions that holds ids of items: the one so named, unless another does and it does not."""
    shares = {name: len(values(clicks, name) & ids) / (len(values(clicks, name)) or 1) for name in clicks.columns}
    share = shares[named.column]
    other = max(shares, key=lambda name: shares[name])
    if not share and shares[other]:
        return Found(other, f"its values are ids of items, those of `{named.column}` are not")
    if share < 0.5 and whole:
        return Found(named.column, f"{100 * share:.0f} % of its first values are ids of items")
    if not share:
        return Found(named.column, "none of its first values is among the first ids of items")
    return named


def unit_of(clicks: Head, found: dict[str, Found]) -> list[Line]:
    """The unit in which most of the first times lie between 1990 and 2100."""
    if "at" not in found:
        return []
    column = found["at"].column
    dtype = clicks.frame.schema[column]
    if dtype.is_temporal():
        return []
    written = clicks.frame.drop_nulls(column)
    parsed = {
        unit: written.select(generic.moment(column, dtype, unit)).to_series().count() for unit in get_args(generic.Unit)
    }
    unit = max(parsed, key=lambda name: parsed[name])
    n, left = parsed[unit], written.height - parsed[unit]
    why = f"{left:,} of the first {written.height:,} values of `{column}` are no such time" if left or not n else ""
    return [Line("ingest.generic", "at_unit", unit, why, "what times are written in: s, ms, us, ns or iso")]


def threshold(clicks: Head, found: dict[str, Found]) -> list[Line]:
    """From which rating on an interaction is liked, by the scale that the first ratings seem to be on."""
    if "rating" not in found:
        return []
    column = found["rating"].column
    rated = clicks.frame.select(generic.number(column, clicks.frame.schema[column])).to_series().drop_nulls()
    top = rated.max()
    key, note = ("ingest.generic", "liked_from"), "ratings from here on are liked; without it every interaction is"
    fitting = [(end, liked) for end, liked in LIKED if isinstance(top, float) and top <= end]
    if not fitting or rated.n_unique() < 2:
        return [Line(*key, 4.0, f"the first ratings in `{column}` tell no scale", note, off=True)]
    end, liked = fitting[0]
    stars = end == 5 and top == 5 and float(rated.min() or 0) > 0  # type: ignore[arg-type]
    return [Line(*key, liked, "" if stars else f"ratings seem to end at {end}", note)]


def attributes(items: Head, found: dict[str, Found]) -> list[Line]:
    taken = {one.column for one in found.values()}
    kept = [name for name in items.columns if name not in taken and plainly(name) in ATTRIBUTES]
    note = "kept together as one JSON object"
    return [Line("ingest.generic.item_columns", "attributes", kept, note=note)] if kept else []


def columns(table: str, found: dict[str, Found], needed: str) -> list[Line]:
    """One line per column; `needed`, which the reader otherwise expects under its own name, as none where it is not."""
    lines = [Line(table, ours, one.column, one.unsure) for ours, one in found.items()]
    return lines if needed in found else [*lines, Line(table, needed, "", "no column looks like it")]
