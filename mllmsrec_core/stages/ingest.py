"""ingest: a dataset as items, interactions in the order of time, and every row that could not be used, with the reason.

Readers map files to raw frames; what holds for all datasets is judged here, once. Re-exporting rows in another order
changes nothing: ties in time go by item id, and of two rows for one item the fuller stays, then the smaller by content.
Text is kept as it came, cut to MAX_TEXT; making it safe inside a prompt is the prompt's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import dataframely as dy
import polars as pl
from pydantic import Field

from mllmsrec_core import stage
from mllmsrec_core.ask import digest
from mllmsrec_core.datasets import ITEMS, REJECTS, Catalogue, demo, generic, movielens
from mllmsrec_core.datasets.demo import Params as Demo
from mllmsrec_core.datasets.generic import Params as Generic
from mllmsrec_core.datasets.movielens import Params as Movielens
from mllmsrec_core.errors import SourceError
from mllmsrec_core.stage import Inputs, Stage

MAX_TEXT = 2_000  # characters of a title or description worth keeping: no prompt reads more than its first 600
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
READERS: Mapping[str, Callable[[Any, Any], Catalogue]] = {
    "demo": demo.read,
    "movielens": movielens.read,
    "generic": generic.read,
}


class Params(stage.Params):
    dataset: Literal["demo", "movielens", "generic"] = "demo"
    path: str = ""  # the dataset's root: a folder or any fsspec URL; demo has none
    demo: Demo = Demo.model_validate({})
    movielens: Movielens = Movielens()
    generic: Generic = Generic()
    min_history: int = Field(default=0, ge=0)  # users with fewer interactions are rejected; 0 keeps everyone


class Items(dy.Schema):
    item_id = dy.String(primary_key=True, min_length=1)
    title = dy.String(nullable=True, max_length=MAX_TEXT)
    description = dy.String(nullable=True, max_length=MAX_TEXT)
    category = dy.String(nullable=True, max_length=MAX_TEXT)
    attributes = dy.String(nullable=True)
    image_uri = dy.String(nullable=True)
    image_version = dy.String(nullable=True)


class Interactions(dy.Schema):
    user_id = dy.String(primary_key=True, min_length=1)
    seq = dy.Int32(primary_key=True, min=0)
    item_id = dy.String()
    at = dy.Datetime(time_unit="us", time_zone="UTC", nullable=True)
    rating = dy.Float64(nullable=True)
    liked = dy.Bool()


class Rejects(dy.Schema):
    n = dy.Int32(primary_key=True, min=1)
    source = dy.String(nullable=True)
    line = dy.UInt32(nullable=True)
    reason = dy.String()


Split = tuple[pl.DataFrame, pl.DataFrame]  # rows that stay, and rejects


def split(frame: pl.DataFrame, reason: pl.Expr) -> Split:
    """Rows for which `reason` is null, and the others as rejects."""
    judged = frame.with_columns(reason=reason)
    return judged.filter(pl.col("reason").is_null()).drop("reason"), judged.drop_nulls("reason").select(*REJECTS)


def filled(name: str) -> pl.Expr:
    """The column without white space around it; null where nothing is left."""
    stripped = pl.col(name).str.strip_chars()
    return pl.when(stripped != "").then(stripped).alias(name)


def judge_items(items: pl.DataFrame) -> Split:
    """One row per item id; rows without an id and further rows of an id are rejects."""
    if "image_version" not in items.columns:
        items = items.with_columns(image_version=pl.lit(None, pl.String))
    texts = ("title", "description", "category")
    items = items.with_columns(filled(name) for name in (*ITEMS, "image_version"))
    items = items.with_columns(pl.col(name).str.slice(0, MAX_TEXT) for name in texts)
    items, nameless = split(items, pl.when(pl.col("item_id").is_null()).then(pl.lit("item_id is empty")))

    content = [*list(ITEMS)[1:], "image_version"]
    empty = pl.sum_horizontal(pl.col(content).is_null())
    items = items.sort("item_id", empty, *content, "source", "line", nulls_last=True)
    kept = pl.col("line").first().over("item_id")
    where = pl.coalesce(pl.concat_str(pl.lit("line "), kept), pl.lit("another row"))
    reason = pl.concat_str(pl.lit("second row of item `"), "item_id", pl.lit("`; kept is "), where)
    items, twins = split(items, pl.when(pl.col("item_id") == pl.col("item_id").shift()).then(reason))
    return items, pl.concat([nameless, twins])


def judge_interactions(interactions: pl.DataFrame, items: pl.DataFrame, min_history: int) -> Split:
    """Interactions in order with their `seq`; rows without ids, of unknown items or seen before are rejects."""
    frame = interactions.with_columns(filled("user_id"), filled("item_id"))
    known = items.select("item_id", known=True)
    frame, unusable = split(
        frame.join(known, on="item_id", how="left", maintain_order="left"),
        pl.when(pl.col("user_id").is_null())
        .then(pl.lit("user_id is empty"))
        .when(pl.col("item_id").is_null())
        .then(pl.lit("item_id is empty"))
        .when(pl.col("known").is_null())
        .then(pl.concat_str(pl.lit("there is no item `"), "item_id", pl.lit("`"))),
    )
    frame, again = split(in_order(frame), pl.when(repeated()).then(pl.lit("the same user, item and time once more")))
    count = pl.len().over("user_id")
    short = pl.concat_str(pl.lit("a history of "), count, pl.lit(f", shorter than min_history = {min_history}"))
    frame, brief = split(frame, pl.when(count < min_history).then(short))
    frame = frame.with_columns(seq=pl.int_range(pl.len(), dtype=pl.Int32).over("user_id"))
    return frame, pl.concat([unusable, again, brief])


def in_order(interactions: pl.DataFrame) -> pl.DataFrame:
    """By user and time, ties by item id; where the source has no times, in its own order."""
    timeless = pl.when(pl.col("at").is_null()).then(pl.int_range(pl.len()))
    by = ["user_id", "at", timeless, "item_id", "rating", "liked", "source", "line"]
    descending = [False, False, False, False, True, True, False, False]  # of two ratings at one time the higher stays
    return interactions.sort(by, descending=descending, nulls_last=True, maintain_order=True)


def repeated() -> pl.Expr:
    """Whether an ordered row has the user, item and time of the row before."""
    return pl.all_horizontal(pl.col(name) == pl.col(name).shift() for name in ("user_id", "item_id", "at"))


def numbered(rejects: pl.DataFrame) -> pl.DataFrame:
    return rejects.sort("source", "line", "reason", nulls_last=True).with_row_index("n", 1)


def need_rows(params: Params, frame: pl.DataFrame, what: str, rejects: pl.DataFrame) -> None:
    """Raises SourceError when nothing is left, with the first reasons."""
    if frame.height:
        return
    shown = rejects.head(3).select(*REJECTS).iter_rows()
    first = "; ".join(f"{name} line {line}: {reason}" for name, line, reason in shown)
    raise SourceError(
        f"dataset {params.dataset} at `{params.path}` has no usable {what}: {rejects.height} rows were rejected"
        + (f" ({first})" if first else ", so its files hold none")
        + f". Check the files and [ingest.{params.dataset}] in the profile, then repeat the command"
    )


def outside(inputs: Inputs) -> Any:
    """Which files there are, and the versions of those that are no pictures: pictures are versioned by `images`."""
    if inputs.source is None or inputs.params["ingest"].dataset == "demo":
        return None
    names = inputs.source.names()
    read = [name for name in names if not name.lower().endswith(PICTURES)]
    return digest(names, [inputs.source.version(name) for name in read])


def rows(inputs: Inputs) -> pl.DataFrame:
    return pl.DataFrame()


def tables(inputs: Inputs, done: pl.DataFrame) -> dict[str, pl.DataFrame]:
    params: Params = inputs.params["ingest"]
    catalogue = READERS[params.dataset](inputs.source, getattr(params, params.dataset))
    items, bad_items = judge_items(catalogue.items)
    interactions, bad_interactions = judge_interactions(catalogue.interactions, items, params.min_history)
    rejects = numbered(pl.concat([catalogue.rejects, bad_items, bad_interactions]))
    need_rows(params, items, "item", rejects)
    need_rows(params, interactions, "interaction", rejects)
    return {"items": items, "interactions": interactions, "rejects": rejects}


STAGE = Stage(
    name="ingest",
    params=Params,
    reads=(),
    writes={"items": Items, "interactions": Interactions, "rejects": Rejects},
    rows=rows,
    tables=tables,
    outside=outside,
)
