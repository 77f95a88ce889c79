"""A small shop as published tables, and a way to drive a chain by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from mllmsrec_core.ask import Ask, Model, Reply
from mllmsrec_core.stage import Chain, Inputs, Row, Stage, conform
from mllmsrec_core.stages import audit, examples, score, sft

N_ITEMS = 40
COLOURS = ("red", "blue", "green", "black")
START = datetime(2024, 1, 1, tzinfo=UTC)
STAGES: dict[str, Any] = {"examples": examples, "sft": sft, "score": score, "audit": audit}


def items() -> pl.DataFrame:
    return pl.DataFrame(
        [(f"i{n}", f"Brand{n} mug", None, ("kitchen", "office")[n % 2]) for n in range(N_ITEMS)],
        schema={"item_id": pl.String, "title": pl.String, "description": pl.String, "category": pl.String},
        orient="row",
    )


def images() -> pl.DataFrame:
    """Every tenth picture is missing; items 1 and 2 share one."""
    rows = [
        (f"i{n}", f"sha{max(n, 2) if n < 3 and n else n}", "missing" if n % 10 == 9 else "ok") for n in range(N_ITEMS)
    ]
    return pl.DataFrame(rows, schema=["item_id", "sha256", "status"], orient="row").with_columns(
        sha256=pl.when(pl.col("status") == "ok").then("sha256")
    )


def interactions(n_users: int = 12, seed: int = 0) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    rows = [
        (
            f"u{user}",
            seq,
            f"i{item}",
            START + timedelta(days=3 * seq),
            float(random.integers(1, 6)),
            bool(random.random() < 0.9),
        )
        for user in range(n_users)
        for seq, item in enumerate(random.permutation(N_ITEMS)[: random.integers(4, 11)].tolist())
    ]
    schema = {"user_id": pl.String, "seq": pl.Int32, "item_id": pl.String}
    schema |= {"at": pl.Datetime("us", "UTC"), "rating": pl.Float64, "liked": pl.Boolean}
    return pl.DataFrame(rows, schema=schema, orient="row")


def preferences(interactions: pl.DataFrame) -> pl.DataFrame:
    """A step after every third like, as the preference stage cuts them."""
    liked = interactions.filter("liked").sort("user_id", "seq")
    place = (pl.int_range(pl.len(), dtype=pl.Int32).over("user_id") + 1).alias("place")
    steps = liked.with_columns(place).filter(pl.col("place") % 3 == 0)
    text = pl.format("likes things up to {}", "seq")
    return steps.select("user_id", step=pl.col("place") // 3, upto_seq="seq", preference=text)


def tables(interactions: pl.DataFrame) -> dict[str, pl.DataFrame]:
    shown = images().filter(pl.col("status") == "ok").select("sha256").unique().sort("sha256")
    colour = pl.Series([f"A {COLOURS[int(sha[3:]) % 4]} mug." for sha in shown["sha256"]])
    summaries = items().select("item_id", summary=pl.format("Brand item, {} summary", "item_id"))
    return {
        "items": items(),
        "interactions": interactions,
        "images": images(),
        "captions": shown.with_columns(caption=colour),
        "item_summaries": summaries.filter(pl.col("item_id") != "i3"),
        "preferences": preferences(interactions),
        "adapters": pl.DataFrame(schema={"name": pl.String, "sha256": pl.String}),
    }


@dataclass
class Shop:
    """Inputs for any stage, and its published tables once it has run."""

    inputs: Inputs
    asked: list[Ask] = field(default_factory=list)

    def run(self, name: str, answer: Callable[[Ask], Reply] | None = None) -> dict[str, pl.DataFrame]:
        stage: Stage = STAGES[name].STAGE
        rows, done = stage.rows(self.inputs), []
        if stage.ask is None:
            finished = rows
        else:
            assert answer is not None
            for row in rows.iter_rows(named=True):
                done += self.drive(stage.ask(self.inputs, row), answer)
            schema = stage.done or {n: c.dtype for n, c in next(iter(stage.writes.values())).columns().items()}
            finished = pl.DataFrame(done, schema=schema, orient="row")
        return {n: conform(frame, stage.writes[n]) for n, frame in stage.tables(self.inputs, finished).items()}

    def drive(self, chain: Chain, answer: Callable[[Ask], Reply]) -> list[Row]:
        reply = None
        while True:
            try:
                ask = next(chain) if reply is None else chain.send(reply)
            except StopIteration as end:
                return end.value
            self.asked.append(ask)
            reply = answer(ask)

    def having(self, **tables: pl.DataFrame) -> Shop:
        return Shop(replace(self.inputs, tables={**self.inputs.tables, **tables}))

    def set(self, stage: str, **params: Any) -> Shop:
        changed = {**self.inputs.params, stage: STAGES[stage].Params(**params)}
        return Shop(replace(self.inputs, params=changed))


def open_shop(interactions: pl.DataFrame) -> Shop:
    params = {name: module.Params() for name, module in STAGES.items()}
    shop = Shop(Inputs(tables(interactions), params, Model("tiny", "r1")))
    return shop.having(examples=shop.run("examples")["examples"])


@pytest.fixture(scope="session")
def opening() -> Callable[[pl.DataFrame], Shop]:
    return open_shop


@pytest.fixture(scope="session")
def shop() -> Shop:
    return open_shop(interactions())
