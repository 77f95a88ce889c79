"""examples: what is asked of whom, a positive and its negatives for every target; the table the figures rest on.

Protocol in `mllmsrec_core.protocol`. Both papers train on 1:1 and MLLM-MSR evaluates on 1:20, hence the defaults. An
example names the preference step it may read, the last one that ends before its target, and holds no prompt text.
"""

from __future__ import annotations

from datetime import date
from math import isclose
from typing import Annotated, Literal

import dataframely as dy
import polars as pl
from pydantic import Field, model_validator

from mllmsrec_core.compat import LABEL, Compat
from mllmsrec_core.errors import UsageError
from mllmsrec_core.protocol import SHARES, SPLITS, Cut, Negatives, Split, candidates, targets, training
from mllmsrec_core.stage import Inputs, Stage
from mllmsrec_core.stage import Params as Base

Share = Annotated[float, Field(ge=0, le=1)]
Number = int | Literal["all"]  # of negatives


class Params(Base):
    split: Split = Field("leave-last", description="what is held out for valid and test")
    valid_from: date | None = Field(None, description="global-time, sliding: first day of valid")
    test_from: date | None = Field(None, description="global-time: first day of test")
    shares: tuple[Share, Share, Share] = Field(SHARES, description="user: of the users in train, valid and test")
    windows: int = Field(4, ge=2, description="sliding: the first is valid, the others are test")
    window_days: int = Field(30, ge=1, description="sliding: length of a window")
    n_negatives: Annotated[int, Field(ge=1)] | Literal["all"] = Field(20, description="or all, in valid and test")
    max_all: int = Field(1_000_000, ge=1, description="candidates, each a question of score, that `all` may come to")
    train_negatives: int = Field(1, ge=1, description="for each train target")
    train_per_user: int = Field(8, ge=0, description="most train targets of a user")
    min_history: int = Field(3, ge=1, description="liked items before a train target")  # a preference's first block
    negatives: Negatives = Field("uniform", description="popularity: drawn as often as items are chosen")
    among: Literal["catalogue", "touched"] = Field("catalogue", description="touched: negatives have interactions")
    compat: Compat = Field("none", description="mllm_msr: labelled so; ingest.compat must agree")
    seed: int = Field(0, description="of the draw of users and negatives")

    @model_validator(mode="after")
    def _what_the_split_reads_is_given(self) -> Params:
        dates = self.valid_from and self.test_from and self.valid_from < self.test_from
        if self.split == "global-time" and not dates:
            raise ValueError("split = global-time needs examples.valid_from, and a later examples.test_from")
        if self.split == "sliding" and not self.valid_from:
            raise ValueError("split = sliding needs examples.valid_from, the first day of the first window")
        if not isclose(sum(self.shares), 1):
            raise ValueError(
                f"examples.shares come to {sum(self.shares):g}; they are shares of all users and come to 1"
            )
        return self

    def cut(self) -> Cut:
        return Cut(self.split, self.valid_from, self.test_from, self.shares, self.windows, self.window_days, self.seed)


class Examples(dy.Schema):
    user_id = dy.String(primary_key=True)
    split = dy.Enum(SPLITS, primary_key=True)
    target_seq = dy.Int32(primary_key=True)
    item_id = dy.String(primary_key=True)
    label = dy.Bool()
    position = dy.Int32(min=0)  # place in the shuffled candidate list
    candidate_set = dy.String()  # protocol, size and sampling rule: "leave-last/1+20/uniform", "leave-last/all of 600"
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


def candidate_set(params: Params, asked: Number, n_items: int, k_core: tuple[int, int] = (0, 0)) -> pl.Expr:
    """The candidate set in words; a list the catalogue cut short says how many it was meant to have.

    With histories of a k-core it says, too, where an item from outside, which nobody chooses in it, can be a negative.
    """
    protocol = f"{LABEL}/{params.split}" if params.compat == "mllm_msr" else params.split
    beyond = max(k_core) > 1 and params.compat == "none"
    among = " touched" if params.among == "touched" else " also outside k_core" if beyond else ""
    if asked == "all":
        return pl.lit(f"{protocol}/all of {n_items}{among}")
    size = pl.col("n_drawn").cast(pl.String) + pl.when(pl.col("n_drawn") < asked).then(
        pl.lit(f" of {asked}")
    ).otherwise(pl.lit(""))
    return pl.format(f"{protocol}/1+{{}}/{params.negatives}{among}", size)


def catalogue(inputs: Inputs) -> pl.Series:
    """The items candidates are drawn from. Raises UsageError where histories and their label do not go together."""
    compat, ingest = inputs.params["examples"].compat, inputs.params.get("ingest")
    if ingest is not None and ingest.compat != compat:
        raise UsageError(
            f"ingest.compat = {ingest.compat} makes the histories and examples.compat = {compat} names them: set both, "
            "--set ingest.compat=mllm_msr --set examples.compat=mllm_msr, or neither"
        )
    if compat == "none" and inputs.params["examples"].among == "catalogue":
        return inputs["items"]["item_id"]
    return inputs["interactions"]["item_id"].unique().sort()


def affordable(params: Params, n_targets: int, n_items: int) -> None:
    """Raises UsageError where candidates from the whole catalogue come to more than the profile allows."""
    if params.n_negatives == "all" and (n := n_targets * n_items) > params.max_all:
        raise UsageError(
            f"examples.n_negatives = all makes up to {n:,} candidates ({n_targets:,} valid and test targets among "
            f"{n_items:,} items), each a question to the model of score; examples.max_all allows {params.max_all:,}. Give "
            f"a number of negatives, or pay for them: --set examples.max_all={n}"
        )


def rows(inputs: Inputs) -> pl.DataFrame:
    params: Params = inputs.params["examples"]
    items, interactions = catalogue(inputs), inputs["interactions"]
    told = interactions.select("user_id", "item_id")  # what users touched, waiting rows as well: no negatives
    if "waiting" in inputs.tables:  # a sample is drawn from items and interactions alone
        told = pl.concat([told, inputs["waiting"].select(told.columns)])
    wanted = targets(
        interactions, items, params.cut(), train_per_user=params.train_per_user, min_history=params.min_history
    )
    train, held = (wanted.filter((pl.col("split") == "train") == fits) for fits in (True, False))
    affordable(params, len(held), len(items))
    popular = training(interactions, wanted, params.valid_from) if params.negatives == "popularity" else None
    k_core = inputs.params["ingest"].k_core if "ingest" in inputs.params else (0, 0)
    lists: tuple[tuple[pl.DataFrame, Number], ...] = ((train, params.train_negatives), (held, params.n_negatives))
    drawn = [
        candidates(part, told, items, n, seed=params.seed, popular=popular).with_columns(
            candidate_set=candidate_set(params, n, len(items), k_core)
        )
        for part, n in lists
    ]
    return with_step(pl.concat(drawn), inputs["preferences"])


def tables(inputs: Inputs, done: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {"examples": done}


STAGE = Stage(
    name="examples",
    params=Params,
    reads=("items", "interactions", "waiting", "preferences"),
    writes={"examples": Examples},
    rows=rows,
    tables=tables,
    needs=("ingest.k_core",),
)
