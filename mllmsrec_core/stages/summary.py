"""summary: one text per item that holds what its words and its picture say.

Both papers keep the two sides apart until the end so that neither swamps the other: the text is summarised by one
question, the picture described by others (the caption of MLLM-MSR, or MLLM-SRec's visual questions, VQA-style), at
balanced lengths, and a last question fuses them. The published prompts are not known; the wording is ours.
An item without a picture, or without words, is a state of its own: the side that is there becomes the summary.
"""

from __future__ import annotations

from typing import Annotated, Literal

import dataframely as dy
import polars as pl
from pydantic import Field

from mllmsrec_core.ask import Decoding, Generate, Message, Picture, key
from mllmsrec_core.stage import AskParams, Chain, Inputs, Row, Stage, fields
from mllmsrec_core.text import clean, fence

TEXT = "Summarise the item in one sentence, from its text alone.\n{facts}"
QUESTIONS = ("What is shown in the picture?", "Which colour stands out?", "Which pattern does it have?")
FUSE = (
    "Write one sentence that says what the item is, from both its text and its picture.\n"
    "Text: {text}\nPicture: {picture}"
)


class Params(AskParams):
    model: str = Field("", description="empty: the model of all stages")
    picture: Literal["caption", "vqa", "both"] = Field("caption", description="what is told of the picture")
    text_prompt: Annotated[str, fields("facts")] = Field(TEXT, description="for the text alone")
    questions: tuple[str, ...] = Field(QUESTIONS, description="vqa, both: asked of each picture")
    fuse_prompt: Annotated[str, fields("text", "picture")] = Field(FUSE, description="makes one of text and picture")
    max_tokens: int = Field(120, ge=1, description="of text and picture alike, to balance their lengths")
    max_pixels: int = Field(1_000_000, ge=1, description="larger pictures are scaled down to this")


class ItemSummaries(dy.Schema):
    item_id = dy.String(primary_key=True)
    text_summary = dy.String(nullable=True)
    caption = dy.String(nullable=True)
    summary = dy.String(nullable=True)
    modality = dy.Enum(["both", "text", "image", "none"])
    ask = dy.Binary(nullable=True)
    error = dy.String(nullable=True)
    stale_since = dy.Datetime(time_unit="us", time_zone="UTC", nullable=True)


def facts(row: Row) -> str:
    """The item's own words, one labelled line for each that is there."""
    lines = ((label, clean(row.get(label.lower()))) for label in ("Title", "Category", "Description"))
    return "\n".join(f"{label}: {fence(value)}" for label, value in lines if value)


def text_prompt(params: Params, row: Row) -> tuple[Message, ...]:
    return (Message("user", (params.text_prompt.format(facts=facts(row)),)),)


def question_prompt(question: str, sha256: str) -> tuple[Message, ...]:
    return (Message("user", (question, Picture(sha256))),)


def fuse_prompt(params: Params, text: str, picture: str) -> tuple[Message, ...]:
    return (Message("user", (params.fuse_prompt.format(text=fence(text), picture=fence(picture)),)),)


def vqa_text(questions: tuple[str, ...], answers: list[str]) -> str:
    """The visual questions and their answers as one description."""
    return " ".join(f"{question} {answer}." for question, answer in zip(questions, answers, strict=True))


def rows(inputs: Inputs) -> pl.DataFrame:
    images = inputs["images"].filter(pl.col("status") == "ok").select("item_id", "sha256")
    captions = inputs["captions"].select("sha256", "caption")
    return (
        inputs["items"]
        .select("item_id", "title", "category", "description")
        .join(images, on="item_id", how="left")
        .join(captions, on="sha256", how="left")
        .sort("item_id")
    )


def ask(inputs: Inputs, row: Row) -> Chain:
    params: Params = inputs.params["summary"]
    decoding = Decoding(params.max_tokens)
    model = inputs.need_model()
    last: Generate | None = None
    error: str | None = None

    text = None
    if facts(row):
        last = Generate(model, text_prompt(params, row), decoding)
        reply = yield last
        text, error = clean(reply.value) or clean(row["title"]) or None, reply.error

    seen = [row["caption"]] if row["caption"] and params.picture != "vqa" else []
    if row["sha256"] and params.picture != "caption":
        answers = []
        for question in params.questions:
            last = Generate(model, question_prompt(question, row["sha256"]), decoding)
            reply = yield last
            answers.append(clean(reply.value).rstrip(".") or "not answered")
            error = error or reply.error
        seen.append(vqa_text(params.questions, answers))
    picture = " ".join(seen) or None

    summary = text or picture
    if text and picture:
        last = Generate(model, fuse_prompt(params, text, picture), decoding)
        reply = yield last
        summary, error = clean(reply.value) or f"{text} {picture}", error or reply.error
    return [
        {
            "item_id": row["item_id"],
            "text_summary": text,
            "caption": picture,
            "summary": summary,
            "modality": {(True, True): "both", (True, False): "text", (False, True): "image"}.get(
                (text is not None, picture is not None), "none"
            ),
            "ask": last and key(last),
            "error": error,
        }
    ]


def tables(inputs: Inputs, done: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {"item_summaries": done}


STAGE = Stage(
    name="summary",
    params=Params,
    reads=("items", "images", "captions"),
    writes={"item_summaries": ItemSummaries},
    rows=rows,
    ask=ask,
    tables=tables,
    unit=("item_id",),
)
