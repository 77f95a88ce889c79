"""ingest: a dataset as items, interactions in the order of time, and every row that could not be used, with the reason.

Readers map files to raw frames; what holds for all datasets is judged here, once. Re-exporting rows in another order
changes nothing: ties in time go by item id, and of two rows for one item the fuller stays, then the smaller by content.
A `snapshot` is the dataset as it stands; `append` goes on from what was published, so that `seq` is given once and kept.
Text is kept as it came, cut to MAX_TEXT; making it safe inside a prompt is the prompt's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import dataframely as dy
import polars as pl
from pydantic import Field

from mllmsrec_core import histories, stage
from mllmsrec_core.ask import digest
from mllmsrec_core.card import DataCard, card
from mllmsrec_core.compat import REASON, Compat, unpopular
from mllmsrec_core.datasets import ITEMS, REJECTS, Catalogue, amazon, demo, generic, microlens, movielens
from mllmsrec_core.datasets.amazon import Params as Amazon
from mllmsrec_core.datasets.demo import Params as Demo
from mllmsrec_core.datasets.generic import Params as Generic
from mllmsrec_core.datasets.microlens import Params as Microlens
from mllmsrec_core.datasets.movielens import Params as Movielens
from mllmsrec_core.errors import SourceError
from mllmsrec_core.histories import Split, filled, split
from mllmsrec_core.stage import Inputs, Stage

MAX_TEXT = 2_000  # characters of a title or description worth keeping: no prompt reads more than its first 600
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
READERS: Mapping[str, Callable[[Any, Any], Catalogue]] = {
    "demo": demo.read,
    "movielens": movielens.read,
    "generic": generic.read,
    "amazon": amazon.read,
    "microlens": microlens.read,
}


Least = Annotated[int, Field(ge=0)]


class Params(stage.Params):
    dataset: Literal["demo", "movielens", "generic", "amazon", "microlens"] = Field("demo", description="its layout")
    path: str = Field("", description="the dataset's root: a folder or any fsspec URL; demo has none")
    mode: Literal["snapshot", "append"] = Field("snapshot", description="append: rows that an export lacks now, stay")
    demo: Demo = Demo.model_validate({})
    movielens: Movielens = Movielens()
    generic: Generic = Generic()
    amazon: Amazon = Amazon()
    microlens: Microlens = Microlens()
    repeats: Literal["all", "first", "last"] = Field("all", description="of a user's interactions with an item")
    min_history: int = Field(default=0, ge=0, description="users with fewer interactions wait; 0 keeps everyone")
    k_core: tuple[Least, Least] = Field((0, 0), description="least interactions of a user, and of an item; 0: off")
    compat: Compat = Field("none", description="mllm_msr: of each user the most popular items alone")

    def rules(self) -> list[histories.Rule]:
        """What holds interactions back, in the order in which it is judged.

        A core takes interactions from users who had enough of them, so that it has to ask for `min_history` as well.
        """
        found = [] if self.repeats == "all" else [histories.once(self.repeats)]
        found += [histories.enough(self.min_history)] if self.min_history > 1 else []
        core = (max(self.k_core[0], self.min_history), self.k_core[1])
        found += [histories.within_core(core)] if max(self.k_core) > 1 else []
        if self.compat == "mllm_msr":
            found.append(lambda whole: histories.parted(whole, unpopular(whole), pl.lit(REASON)))
        return found


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


def judge_items(items: pl.DataFrame) -> Split:
    """One row per item id; rows without an id and further rows of an id are rejects."""
    if "image_version" not in items.columns:
        items = items.with_columns(image_version=pl.lit(None, pl.String))
    texts = ("title", "description", "category")
    items = items.with_columns(filled(name) for name in (*ITEMS, "image_version"))
    items = items.with_columns(pl.col(name).str.slice(0, MAX_TEXT) for name in texts)
    items, nameless = split(items, pl.col("item_id").is_null(), pl.lit("item_id is empty"))

    content = [*list(ITEMS)[1:], "image_version"]
    empty = pl.sum_horizontal(pl.col(content).is_null())
    items = items.sort("item_id", empty, *content, "source", "line", nulls_last=True)
    first = {f"kept_{name}": pl.col(name).first().over("item_id") for name in ("source", "line")}
    items = items.with_columns(**first)
    elsewhere = pl.when(pl.col("kept_source") != pl.col("source")).then(pl.format(" of {}", "kept_source"))
    line = pl.concat_str(pl.lit("line "), "kept_line", elsewhere.otherwise(pl.lit("")))
    where = pl.coalesce(line, pl.lit("another row"))
    reason = pl.concat_str(pl.lit("second row of item `"), "item_id", pl.lit("`; kept is "), where)
    items, twins = split(items, pl.col("item_id") == pl.col("item_id").shift(), reason)
    return items, pl.concat([nameless, twins])


def all_items(items: pl.DataFrame, before: pl.DataFrame) -> pl.DataFrame:
    """`items`, and those of `before` that it lacks, sorted by id."""
    items = items.select(*Items.columns())
    return pl.concat([items, before.join(items, on="item_id", how="anti")]).sort("item_id")


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


def continues(inputs: Inputs) -> bool:
    return inputs.params["ingest"].mode == "append"


def tables(inputs: Inputs, done: pl.DataFrame) -> dict[str, pl.DataFrame]:
    params: Params = inputs.params["ingest"]
    raw = READERS[params.dataset](inputs.source, getattr(params, params.dataset))
    published = inputs.before if continues(inputs) else {}
    before = {name: published.get(name, WRITES[name].create_empty()) for name in ("items", "interactions", "waiting")}
    if inputs.forgotten:
        raw, before = histories.forget(raw, before, inputs.forgotten)
    items, bad_items = judge_items(raw.items)
    items = all_items(items, before["items"])
    told = pl.concat([before["interactions"], before["waiting"]])
    usable, unusable = histories.coded(raw.interactions, items["item_id"], told["user_id"])
    broken = raw.rejects
    del raw  # as text, ten million interactions take a gigabyte
    judged = histories.judge(usable, told, params.rules())
    rejects = numbered(pl.concat([broken, bad_items, unusable, judged.rejects]))
    need_rows(params, items, "item", rejects)
    shown = judged.waiting if continues(inputs) and judged.interactions.is_empty() else judged.interactions
    need_rows(params, shown, "interaction", rejects)
    made = {"items": items, "interactions": judged.interactions, "waiting": judged.waiting, "rejects": rejects}
    return {**made, "data_card": card(**made)}


WRITES = {
    "items": Items,
    "interactions": Interactions,
    "waiting": Interactions,
    "rejects": Rejects,
    "data_card": DataCard,
}
STAGE = Stage(
    name="ingest",
    params=Params,
    reads=(),
    writes=WRITES,
    rows=rows,
    tables=tables,
    outside=outside,
    continues=continues,
)
