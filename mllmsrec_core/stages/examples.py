"""examples: what is asked of whom, a positive and its negatives for every target; the table the figures rest on.

Protocol in `mllmsrec_core.protocol`. Both papers train on 1:1 and MLLM-MSR evaluates on 1:20, hence the defaults. An
example names the preference step it may read, the last one that ends before its target, and holds no prompt text.
"""

from __future__ import annotations

from datetime import date

import dataframely as dy
import polars as pl
from pydantic import Field, model_validator

from mllmsrec_core.protocol import SPLITS, Negatives, Split, candidates, targets, training
from mllmsrec_core.stage import Inputs, Stage
from mllmsrec_core.stage import Params as Base


class Params(Base):
    split: Split = "leave-last"
    valid_from: date | None = None  # global-time only: first day of valid, and of test
    test_from: date | None = None
    n_negatives: int = Field(20, ge=1)  # valid and test
    train_negatives: int = Field(1, ge=1)
    train_per_user: int = Field(8, ge=0)
    min_history: int = Field(3, ge=1)  # liked items before a train target: one block of the recurrent preference
    negatives: Negatives = "uniform"
    seed: int = 0

    @model_validator(mode="after")
    def _dates_of_a_global_time_split(self) -> Params:
        if self.split == "global-time" and not (
            self.valid_from and self.test_from and self.valid_from < self.test_from
        ):
            raise ValueError("split = global-time needs examples.valid_from, and a later examples.test_from")
        return self


class Examples(dy.Schema):
    user_id = dy.String(primary_key=True)
    split = dy.Enum(SPLITS, primary_key=True)
    target_seq = dy.Int32(primary_key=True)
    item_id = dy.String(primary_key=True)
    label = dy.Bool()
    position = dy.Int32(min=0)  # place in the shuffled candidate list
    candidate_set = dy.String()  # protocol, size and sampling rule: "leave-last/1+20/uniform"
    history_seq = dy.Int32()  # the newest interaction the example may know of
    n_history = dy.Int32(min=1)  # liked interactions up to it
    step = dy.Int32(nullable=True)  # the preference step it reads


def with_step(examples: pl.DataFrame, preferences: pl.DataFrame) -> pl.DataFrame:
    """Adds `step`: the user's last preference step that ends before the target, else null."""
    steps = preferences.select("user_id", "step", "upto_seq").sort("upto_seq", "step")
    return (
        examples.sort("target_seq")
        .join_asof(
            steps,
            left_on="target_seq",
            right_on="upto_seq",
            by="user_id",
            allow_exact_matches=False,
            check_sortedness=False,  # both are sorted above
        )
        .drop("upto_seq")
    )


def candidate_set(params: Params, asked: int) -> pl.Expr:
    """The candidate set in words; a list the catalogue cut short says how many it was meant to have."""
    size = pl.col("n_drawn").cast(pl.String) + pl.when(pl.col("n_drawn") < asked).then(
        pl.lit(f" of {asked}")
    ).otherwise(pl.lit(""))
    return pl.format(f"{params.split}/1+{{}}/{params.negatives}", size)


def rows(inputs: Inputs) -> pl.DataFrame:
    params: Params = inputs.params["examples"]
    items, interactions = inputs["items"]["item_id"], inputs["interactions"]
    wanted = targets(
        interactions,
        items,
        params.split,
        train_per_user=params.train_per_user,
        min_history=params.min_history,
        valid_from=params.valid_from,
        test_from=params.test_from,
    )
    popular = training(interactions, wanted, params.valid_from) if params.negatives == "popularity" else None
    drawn = [
        candidates(part, interactions, items, n, seed=params.seed, popular=popular).with_columns(
            candidate_set=candidate_set(params, n)
        )
        for part, n in (
            (wanted.filter(pl.col("split") == "train"), params.train_negatives),
            (wanted.filter(pl.col("split") != "train"), params.n_negatives),
        )
    ]
    return with_step(pl.concat(drawn), inputs["preferences"])


def tables(inputs: Inputs, done: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {"examples": done}


STAGE = Stage(
    name="examples",
    params=Params,
    reads=("items", "interactions", "preferences"),
    writes={"examples": Examples},
    rows=rows,
    tables=tables,
)
