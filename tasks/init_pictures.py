"""Where the pictures of an undescribed dataset lie: folders and zip archives, and the column that names them.

Of an archive only the table of contents is read. Knows neither profiles nor readers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

import polars as pl

from mllmsrec_core.datasets import generic
from mllmsrec_core.errors import SourceError
from storage.heads import Head
from storage.source import FsspecSource
from tasks.proposal import Found, Line, several

PICTURES = re.compile(r"\.(jpe?g|png|webp|gif|bmp|avif)([?#].*)?$", re.IGNORECASE)
MOST_ARCHIVES = 20  # looked into


def members(source: FsspecSource, names: Sequence[str]) -> Iterator[str]:
    """What lies in the archives among the files; of one that cannot be read nothing."""
    for archive in [name for name in names if name.lower().endswith(generic.ARCHIVE)][:MOST_ARCHIVES]:
        with suppress(SourceError):
            yield from source.names(archive)


def named_by_number(source: FsspecSource, names: Sequence[str], table: str, key: str, ends: str = "") -> list[Line]:
    """The folder or archive with most pictures that are named by a number, where there is one."""
    places = Counter[str]()
    for name in (*names, *members(source, names)):
        inside, _, archive = name.partition("::")
        folder, _, last = inside.rpartition("/")
        place = archive or folder
        if place and PICTURES.search(last) and last.lower().endswith(ends) and last.partition(".")[0].isdigit():
            places[place] += 1
    most = sorted(places, key=lambda place: (-places[place], place))
    return [Line(table, key, most[0], several(most, "for its many pictures"))] if most else []


def with_pictures(
    source: FsspecSource, names: Sequence[str], items: Head, found: dict[str, Found]
) -> tuple[dict[str, Found], list[Line]]:
    """The columns of items with the one that names pictures, and the line that says where its relative paths begin."""
    free = [name for name in items.columns if name not in {one.column for one in found.values()}]
    for name in free if "image" not in found else ():
        if picture_share(items, name) > 0.5:
            found = {**found, "image": Found(name, "its values end like names of pictures")}
            break
    if "image" not in found:
        return found, []
    column = found["image"].column
    relative = {
        place.removeprefix("./") for place in first_places(items, column) if not re.match(generic.ABSOLUTE, place)
    }
    lost = len(relative - set(names))
    if lost == 0:
        return found, []
    roots = Counter(root for name in (*names, *members(source, names)) for root in roots_of(name, relative))
    root, n = max(roots.items(), key=lambda one: (one[1], -len(one[0])), default=("", 0))
    if root == "" or len(relative) - n >= lost:
        return {**found, "image": Found(column, f"{lost:,} of the first pictures are not below the root")}, []
    unsure = f"{len(relative) - n:,} of the first pictures are not there" if n < len(relative) else ""
    return found, [Line("ingest.generic", "images", root, unsure, "where relative paths of pictures begin")]


def roots_of(name: str, relative: set[str]) -> Iterator[str]:
    """From where one of the relative paths leads to this file or member of an archive, as `ingest.generic.images`."""
    inside, _, archive = name.partition("::")
    folders = inside.removeprefix("zip://").split("/")
    for n in range(len(folders)):
        if "/".join(folders[n:]) in relative:
            above = "/".join(folders[:n])
            yield f"zip://{above}::{archive}" if archive and above else archive or above


def picture_share(head: Head, column: str) -> float:
    """The share of a column's first values, of lists the first in them, that end like the name of a picture."""
    shown = first_places(head, column)
    return sum(bool(PICTURES.search(place)) for place in shown) / max(1, len(shown))


def first_places(head: Head, column: str) -> pl.Series:
    return head.frame.select(generic.first_filled(column, head.frame.schema[column])).to_series().drop_nulls()
