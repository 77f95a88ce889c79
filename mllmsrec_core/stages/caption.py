"""caption: one description per distinct image, so that a picture shared by many items is described once.

MLLM-MSR describes each cover with a multimodal model in words of its own; the prompt here is ours.
"""

from __future__ import annotations

import dataframely as dy
import polars as pl
from pydantic import Field

from mllmsrec_core.ask import Decoding, Generate, Message, Picture, key
from mllmsrec_core.stage import AskParams, Chain, Inputs, Row, Stage
from mllmsrec_core.text import clean

# The constant text first, the picture last: every prompt then shares its prefix.
PROMPT = "Describe the item in this picture: what it is, its colours, its pattern and any text on it."


class Params(AskParams):
    model: str = Field("", description="empty: the model of all stages")
    prompt: str = Field(PROMPT, description="what is asked of each picture")
    max_tokens: int = Field(200, ge=1, description="longest caption, in tokens")  # the first code base's limit
    max_pixels: int = Field(1_000_000, ge=1, description="larger pictures are scaled down to this")


class Captions(dy.Schema):
    sha256 = dy.String(primary_key=True)
    caption = dy.String(nullable=True)
    ask = dy.Binary(nullable=True)
    error = dy.String(nullable=True)
    stale_since = dy.Datetime(time_unit="us", time_zone="UTC", nullable=True)


def prompt(params: Params, sha256: str) -> tuple[Message, ...]:
    return (Message("user", (params.prompt, Picture(sha256))),)


def rows(inputs: Inputs) -> pl.DataFrame:
    return inputs["images"].filter(pl.col("status") == "ok").select("sha256").unique().sort("sha256")


def ask(inputs: Inputs, row: Row) -> Chain:
    params: Params = inputs.params["caption"]
    question = Generate(inputs.need_model(), prompt(params, row["sha256"]), Decoding(params.max_tokens))
    reply = yield question
    return [
        {"sha256": row["sha256"], "caption": clean(reply.value) or None, "ask": key(question), "error": reply.error}
    ]


def tables(inputs: Inputs, done: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {"captions": done}


STAGE = Stage(
    name="caption",
    params=Params,
    reads=("images",),
    writes={"captions": Captions},
    rows=rows,
    ask=ask,
    tables=tables,
    unit=("sha256",),
)
