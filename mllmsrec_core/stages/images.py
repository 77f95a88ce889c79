"""images: the bytes behind every picture's URI, fetched once per version and named by their sha256.

A picture with more pixels than any stage shows to a model is kept as one smaller copy, made when it comes, so that it is
not read, decoded and scaled in full at every use; the table keeps the original's sha256 too. The audit's CLIP reads a few
hundred pixels a side and is content with the same copy.

An item without a picture, and a picture that cannot be had or read, are states that later stages have words for. Only
passing trouble (a timeout, a 5xx) and unknown failures count as errors of the run, and where a host gave no picture at
all, not even they end it while other hosts work. Knows nothing of how pictures are fetched.
"""

from __future__ import annotations

import dataframely as dy
import polars as pl
from pydantic import Field

from mllmsrec_core.ask import Fetch, digest, key
from mllmsrec_core.errors import TooManyErrors
from mllmsrec_core.stage import AskParams, Chain, Inputs, Row, Stage

STATUS = {"image_missing": "missing", "image_unreadable": "unreadable", "image_refused": "refused"}
SHOWING = ("caption", "summary", "score")  # stages that show pictures to a model, each up to its `max_pixels`
UNKNOWN = "unknown"  # the version of a picture nobody can list: fetched once and for ever


class Params(AskParams):
    max_error_rate: float = Field(1.0, ge=0, le=1, description="of all pictures, checked while they come; 1: never")
    max_host_error_rate: float = Field(0.1, ge=0, le=1, description="of those on hosts that answer, checked at the end")
    normalise: bool = Field(True, description="pictures larger than any stage asks for are kept scaled down")


# What a URI is on: scheme and host or bucket (of its archive, if it lies in one), without credentials; else local files.
HOST = pl.col("uri").str.split("::").list.last().str.extract(r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#]*@)?([^/?#]*)")


class Images(dy.Schema):
    item_id = dy.String(primary_key=True)
    sha256 = dy.String(nullable=True)  # of the picture as kept, which width and height are about
    original_sha256 = dy.String(nullable=True)  # of the bytes at its URI; the same for one that was small enough
    width = dy.Int32(nullable=True, min=1)
    height = dy.Int32(nullable=True, min=1)
    status = dy.Enum(["ok", "missing", "unreadable", "refused"])
    reason = dy.String(nullable=True)  # the error class, lasting or passing
    detail = dy.String(nullable=True)  # what the engine said of it
    ask = dy.Binary(nullable=True)
    error = dy.String(nullable=True)  # the class again where it counts against max_error_rate
    stale_since = dy.Datetime(time_unit="us", time_zone="UTC", nullable=True)


DONE = {
    "uri": pl.String,
    "given": pl.String,
    "sha256": pl.String,
    "original_sha256": pl.String,
    "width": pl.Int32,
    "height": pl.Int32,
    "status": pl.String,
    "reason": pl.String,
    "detail": pl.String,
    "ask": pl.Binary,
    "error": pl.String,
    "stale_since": pl.Datetime("us", "UTC"),
}


def rows(inputs: Inputs) -> pl.DataFrame:
    """One row per distinct picture: `given` is the version the dataset gave, `version` that or the one listed."""
    pictures = inputs["items"].select(uri="image_uri", given="image_version").drop_nulls("uri").unique().sort(pl.all())
    unlisted = pictures.filter(pl.col("given").is_null())["uri"].to_list()
    listed = inputs.versions(unlisted) if inputs.versions else [UNKNOWN] * len(unlisted)
    versions = pl.DataFrame({"uri": unlisted, "listed": listed}, schema={"uri": pl.String, "listed": pl.String})
    return pictures.join(versions, on="uri", how="left", maintain_order="left").select(
        "uri", "given", version=pl.coalesce("given", "listed")
    )


def outside(inputs: Inputs) -> str:
    """The listed versions of all pictures, so that one replaced at its old URI is noticed."""
    return digest(rows(inputs).rows())


def most_pixels(inputs: Inputs) -> int | None:
    """The largest picture that any stage shows to a model; None where pictures are kept as they are."""
    if not inputs.params["images"].normalise:
        return None
    return max(inputs.params[stage].max_pixels for stage in SHOWING)


def ask(inputs: Inputs, row: Row) -> Chain:
    question = Fetch(row["uri"], row["version"], most_pixels(inputs))
    reply = yield question
    found = reply.value or {}
    lasting = reply.error in STATUS
    return [
        {
            "uri": row["uri"],
            "given": row["given"],
            "sha256": found.get("sha256"),
            "original_sha256": found.get("original_sha256", found.get("sha256")),
            "width": found.get("width"),
            "height": found.get("height"),
            "status": "ok" if found else STATUS.get(reply.error or "", "missing"),
            "reason": reply.error,
            "detail": reply.detail or None,
            "ask": key(question),
            "error": None if lasting else reply.error,
        }
    ]


def tables(inputs: Inputs, done: pl.DataFrame) -> dict[str, pl.DataFrame]:
    _check_hosts(inputs.params["images"], done)
    wanted = inputs["items"].select("item_id", uri="image_uri", given="image_version")
    images = wanted.join(done, on=["uri", "given"], how="left", nulls_equal=True)
    return {"images": images.with_columns(pl.col("status").fill_null("missing"))}


def _check_hosts(params: Params, done: pl.DataFrame) -> None:
    """Raise TooManyErrors where too many pictures failed on hosts that answered for others, or no host answered."""
    hosts = done.group_by(host=HOST.fill_null("local files")).agg(pl.len(), failed=pl.col("error").count()).sort("host")
    answering = hosts.filter(pl.col("failed") < pl.col("len"))
    counted = hosts if answering.is_empty() else answering
    failed, n = int(counted["failed"].sum()), int(counted["len"].sum())
    if failed > params.max_host_error_rate * n:
        worst = counted.top_k(3, by="failed").filter(pl.col("failed") > 0)
        where = ", ".join(f"{host}: {failed} of {n}" for host, n, failed in worst.iter_rows())
        raise TooManyErrors(
            f"images: {failed} of {n} pictures could not be had for now ({where}), more than "
            f"images.max_host_error_rate = {params.max_host_error_rate}. Nothing was published; what came is kept. Run again "
            "when the hosts answer: `mllmsrec run --stage images`, or raise images.max_host_error_rate."
        )


STAGE = Stage(
    name="images",
    params=Params,
    reads=("items",),
    writes={"images": Images},
    rows=rows,
    ask=ask,
    tables=tables,
    done=DONE,
    needs=tuple(f"{stage}.max_pixels" for stage in SHOWING),
    outside=outside,
    unit=("uri", "given"),
)
