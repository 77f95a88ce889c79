"""preference: what a user likes, in words, after each stretch of history; every step is kept, so drift is a feature.

recurrent  blocks of `block` items, each read together with the preference before it (MLLM-MSR, blocks of 3)
window     a window of items moved by `step`, with the time between items said in words (MLLM-SRec)
direct     at the end of each block the whole history so far at once (the MSR_R ablation)
none       no question; scoring then leans on the last titles

Only liked interactions are read. Blocks are cut from the oldest item and only whole ones are asked, so a new click never
changes a finished step; what is younger than the last step reaches scoring through `score.keep_last`. Steps are numbered
from a user's first item, whether or not `max_steps` drops the oldest.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated, Any, Literal

import dataframely as dy
import polars as pl
from pydantic import Field

from mllmsrec_core.ask import Decoding, Generate, Message, canonical, key
from mllmsrec_core.stage import AskParams, Chain, Inputs, Row, Stage, fields
from mllmsrec_core.text import clean, fence

RECURRENT = (
    "What is known of a user's preference: {previous}\n"
    "Items the user chose since then, oldest first:\n{items}\n"
    "State the user's preference now, in one sentence."
)
WINDOW = "Items a user chose, oldest first:\n{items}\nState the user's preference, in one sentence."
NOTHING_KNOWN = "nothing yet"


class Params(AskParams):
    model: str = Field("", description="empty: the model of all stages")
    mode: Literal["recurrent", "window", "direct", "none"] = Field("recurrent", description="how a history is read")
    block: int = Field(3, ge=1, description="recurrent: items a step adds; 3 is MLLM-MSR's best")
    window: int = Field(5, ge=1, description="window: items that a step reads")
    step: int = Field(3, ge=1, description="window: items from one step to the next")
    # 0: no limit; else the oldest steps are dropped, `max_steps` at a time, and the recurrent preference begins afresh as
    # often: were it to remember what a later run drops, that run would change steps that are finished.
    max_steps: int = Field(0, ge=0, description="most steps of a user, the newest; 0: no limit")
    recurrent_prompt: Annotated[str, fields("previous", "items")] = Field(RECURRENT, description="recurrent, direct")
    window_prompt: Annotated[str, fields("items")] = Field(WINDOW, description="window")
    max_tokens: int = Field(200, ge=1, description="longest preference, in tokens")
    # follow: a step is asked again when the text of an item it read has changed; as_first_read: it keeps what it read.
    upstream: Literal["follow", "as_first_read"] = Field("follow", description="what steps do as items' texts change")


class Preferences(dy.Schema):
    user_id = dy.String(primary_key=True)
    step = dy.Int32(primary_key=True, min=1)
    upto_seq = dy.Int32()
    n_items = dy.Int32(min=1)
    preference = dy.String(nullable=True)
    is_latest = dy.Bool()
    lineage = dy.String()  # digest of model, parameters and item ids behind the step: all but the items' texts
    ask = dy.Binary(nullable=True)
    error = dy.String(nullable=True)
    stale_since = dy.Datetime(time_unit="us", time_zone="UTC", nullable=True)


def gap(days: float) -> str:
    """The time between two interactions in words a small model can tell apart."""
    if days < 1:
        return "the same day"
    for size, unit in ((365, "year"), (30, "month"), (7, "week"), (1, "day")):
        if days >= size:
            count = int(days // size)
            return f"{count} {unit}{'s' if count > 1 else ''} later"
    raise AssertionError("days >= 1 was checked above")


def listing(items: list[dict[str, Any]], with_gaps: bool) -> str:
    """Numbered, fenced item texts; `with_gaps` says the time since the item before."""
    lines = []
    for number, item in enumerate(items, 1):
        before = items[number - 2]["at"] if with_gaps and number > 1 else None
        when = f" ({gap((item['at'] - before).total_seconds() / 86_400)})" if before and item["at"] else ""
        lines.append(f"{number}.{when} {fence(item['text'])}")
    return "\n".join(lines)


def recurrent_prompt(params: Params, previous: str | None, items: list[dict[str, Any]]) -> tuple[Message, ...]:
    known = fence(previous) if previous else NOTHING_KNOWN
    return (Message("user", (params.recurrent_prompt.format(previous=known, items=listing(items, False)),)),)


def window_prompt(params: Params, items: list[dict[str, Any]]) -> tuple[Message, ...]:
    return (Message("user", (params.window_prompt.format(items=listing(items, params.mode == "window")),)),)


def cut(params: Params, n_items: int) -> list[tuple[int, int, int]]:
    """Each step's number, from 1, and the item range [start, stop) it reads, oldest step first."""
    if params.mode == "none":
        return []
    size, stride = (params.window, params.step) if params.mode == "window" else (params.block, params.block)
    starts = range(0, n_items - size + 1, stride)
    steps = [(number, 0 if params.mode == "direct" else start, start + size) for number, start in enumerate(starts, 1)]
    if params.max_steps and len(steps) > params.max_steps:
        steps = steps[(len(steps) // params.max_steps - 1) * params.max_steps :]
    return steps


def begins_afresh(params: Params, step: int) -> bool:
    """Whether a step forgets the one before it, so that dropping older ones changes nothing."""
    return bool(params.max_steps) and (step - 1) % params.max_steps == 0


def rows(inputs: Inputs) -> pl.DataFrame:
    """One row per user with the liked history, oldest first: `history` is a list of structs (seq, at, item_id, text).

    `kept`, where steps keep what they read, holds those published before as structs (lineage, preference, ask).
    """
    params: Params = inputs.params["preference"]
    texts = (
        inputs["items"]
        .select("item_id", "title")
        .join(inputs["item_summaries"].select("item_id", "summary"), on="item_id", how="left")
        .select("item_id", text=pl.coalesce("summary", "title").fill_null("an unknown item"))
    )
    histories = (
        inputs["interactions"]
        .filter("liked")
        .join(texts, on="item_id")
        .sort("user_id", "seq")
        .group_by("user_id", maintain_order=True)
        .agg(history=pl.struct("seq", "at", "item_id", "text"), n=pl.len())
    )
    if params.upstream == "follow" or "preferences" not in inputs.before:
        return histories
    steps = inputs.before["preferences"].filter(pl.col("error").is_null(), pl.col("preference").is_not_null())
    kept = steps.group_by("user_id").agg(kept=pl.struct("lineage", "preference", "ask").sort_by("step"))
    return histories.join(kept, on="user_id", how="left", maintain_order="left")


def lineages(inputs: Inputs, history: list[dict[str, Any]], stops: list[int]) -> list[str]:
    """The lineage of each step, that is of the items before each of `stops`, which ascend."""
    params = inputs.params["preference"].model_dump(mode="json", exclude={"upstream", "max_error_rate"})
    running, found, start = sha256(canonical([params, inputs.need_model()]).encode()), [], 0
    for stop in stops:
        for item in history[start:stop]:
            running.update(item["item_id"].encode() + b"\0")
        found.append(running.hexdigest()[:32])
        start = stop
    return found


def ask(inputs: Inputs, row: Row) -> Chain:
    params: Params = inputs.params["preference"]
    done: list[Row] = []
    previous: str | None = None
    steps = cut(params, len(row["history"]))
    kept = {old["lineage"]: old for old in row.get("kept") or ()}
    for (step, start, stop), lineage in zip(
        steps, lineages(inputs, row["history"], [s[2] for s in steps]), strict=True
    ):
        items = row["history"][start:stop]
        previous = None if begins_afresh(params, step) else previous
        if old := kept.get(lineage):
            previous, name, error = old["preference"], old["ask"], None
        else:
            recurrent = params.mode == "recurrent"
            messages = recurrent_prompt(params, previous, items) if recurrent else window_prompt(params, items)
            question = Generate(inputs.need_model(), messages, Decoding(params.max_tokens))
            reply = yield question
            previous = clean(reply.value) or previous  # a failed step leaves the one before standing
            name, error = key(question), reply.error
        done.append(
            {
                "user_id": row["user_id"],
                "step": step,
                "upto_seq": items[-1]["seq"],
                "n_items": stop - start,
                "preference": previous,
                "lineage": lineage,
                "ask": name,
                "error": error,
            }
        )
    return done


def tables(inputs: Inputs, done: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {"preferences": done.with_columns(is_latest=pl.col("step") == pl.col("step").max().over("user_id"))}


STAGE = Stage(
    name="preference",
    params=Params,
    reads=("interactions", "items", "item_summaries"),
    writes={"preferences": Preferences},
    rows=rows,
    ask=ask,
    tables=tables,
    longest_first="n",
    unit=("user_id",),
    continues=lambda inputs: inputs.params["preference"].upstream == "as_first_read",
)
