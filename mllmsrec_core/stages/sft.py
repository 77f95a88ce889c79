"""sft: one adapter that learns to answer yes or no to the very prompt that scoring asks.

`score.prompt` is the only prompt object: training and scoring render the same messages for the same example. One row of
work, one Train Ask; its digest stands for every rendered example, so a new click, caption or prompt is a new question
and the same examples are never trained on twice. Loss is on the answer only: over the whole prompt it costs most of the
gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from hashlib import sha256
from typing import Literal

import dataframely as dy
import polars as pl
from pydantic import Field

from mllmsrec_core.ask import Example, Train, canonical, key
from mllmsrec_core.profile import PAIR
from mllmsrec_core.protocol import by_hash
from mllmsrec_core.recipe import TARGETS, Recipe
from mllmsrec_core.stage import AskParams, Chain, Inputs, Row, Stage
from mllmsrec_core.stages import score

# 200 pairs put the standard error of a curve's accuracy at about 0.025; more would slow every evaluation step.
VALID_TARGETS = 200


class Params(AskParams):
    model: str = Field("", description="empty: the model of all stages; it has to be that of score")
    strategy: Literal["none", "lora", "qlora"] = Field("qlora", description="none: no fine-tuning")
    rank: int = Field(32, ge=1, description="of the adapter")  # rank, alpha, lr, epochs: the embedded model's best
    alpha: int = Field(64, ge=1, description="of the adapter: its weight is alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="of the adapter, in training")
    lr: float = Field(1e-3, gt=0, description="learning rate")
    epochs: float = Field(2, gt=0, description="times that each example is seen")
    batch_size: int = Field(16, ge=1, description="examples a forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes a step")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate rises")
    seed: int = Field(0, description="of the order of examples, and of the adapter's first weights")
    max_examples: int = Field(0, ge=0, description="0: all; else that many, by hash")
    targets: str = Field(TARGETS, description="the layers that are adapted, as a regular expression")


class Adapters(dy.Schema):
    name = dy.String(primary_key=True)
    strategy = dy.String()
    sha256 = dy.String(nullable=True)
    recipe = dy.String()  # canonical JSON
    base_model = dy.String()
    train_digest = dy.String()
    n_examples = dy.Int64(min=0)
    curves = dy.String(nullable=True)  # canonical JSON
    ask = dy.Binary(nullable=True)
    error = dy.String(nullable=True)
    stale_since = dy.Datetime(time_unit="us", time_zone="UTC", nullable=True)


def recipe(params: Params) -> str:
    """All that changes the adapter besides model and examples, as canonical JSON; for a strategy that trains."""
    stated = {field.name for field in fields(Recipe)} & set(Params.model_fields)
    return Recipe(**params.model_dump(include=stated)).to_json()


def examples(inputs: Inputs) -> pl.DataFrame:
    """Train examples in hashed order, a target's positive and negative together; at most `max_examples`."""
    params: Params = inputs.params["sft"]
    train = inputs["examples"].filter(pl.col("split") == "train").sort("item_id")
    train = by_hash(train, PAIR, params.seed)
    return train.head(params.max_examples) if params.max_examples else train


def validation(inputs: Inputs) -> pl.DataFrame:
    """Up to `VALID_TARGETS` valid targets by hash, each with its first negative: 1:1 as in training."""
    params: Params = inputs.params["sft"]
    valid = inputs["examples"].filter(pl.col("split") == "valid")
    chosen = by_hash(valid.select(PAIR).unique(), PAIR, params.seed).head(VALID_TARGETS)
    first = pl.col("position") == pl.col("position").min().over(*PAIR, "label")
    return by_hash(valid.join(chosen, on=PAIR, how="semi").filter(first).sort("item_id"), PAIR, params.seed)


def rendered(inputs: Inputs, wanted: pl.DataFrame) -> list[Example]:
    """The examples as scoring would ask them, with the answer to learn, in the order of `wanted`."""
    params: score.Params = inputs.params["score"]
    order = wanted.with_row_index("order")
    read = score.contexts(inputs, order).sort("order")
    return [Example(score.prompt(params, row), "yes" if row["label"] else "no") for row in read.iter_rows(named=True)]


def digest(*parts: Sequence[Example]) -> str:
    """A sha256 over every part's examples in order; a part's end is marked."""
    running = sha256()
    for part in parts:
        for example in part:
            running.update(sha256(canonical(asdict(example)).encode()).digest())
        running.update(b"|")
    return running.hexdigest()


def rows(inputs: Inputs) -> pl.DataFrame:
    params: Params = inputs.params["sft"]
    wanted = [] if params.strategy == "none" else [{"strategy": params.strategy, "recipe": recipe(params)}]
    return pl.DataFrame(wanted, schema={"strategy": pl.String, "recipe": pl.String})


def ask(inputs: Inputs, row: Row) -> Chain:
    model = replace(inputs.need_model(), max_pixels=inputs.params["score"].max_pixels)  # pictures as scoring sees them
    train, valid = rendered(inputs, examples(inputs)), rendered(inputs, validation(inputs))
    question = Train(model, row["recipe"], digest(train, valid), train, valid)
    reply = yield question
    return [
        {
            "name": f"{row['strategy']}-{key(question).hex()[:12]}",
            "strategy": row["strategy"],
            "sha256": reply.value and reply.value["sha256"],
            "recipe": row["recipe"],
            "base_model": model.slug,
            "train_digest": question.digest,
            "n_examples": len(train),
            "curves": reply.value and canonical(reply.value["curves"]),
            "ask": key(question),
            "error": reply.error,
        }
    ]


def tables(inputs: Inputs, done: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {"adapters": done}


STAGE = Stage(
    name="sft",
    params=Params,
    reads=("examples", "interactions", "items", "images", "item_summaries", "preferences"),
    writes={"adapters": Adapters},
    rows=rows,
    ask=ask,
    tables=tables,
    needs=("score", "examples"),
    pinned=True,
)
