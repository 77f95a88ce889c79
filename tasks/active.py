"""Who goes first where time is short: the users who clicked last, and the items that are used most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import polars as pl

from tasks.work import Work


def active_first(work: Work, stages: Mapping[str, Any]) -> Callable[[pl.DataFrame], pl.DataFrame] | None:
    """An order of rows by their user's newest interaction, by their item's number of interactions, or as they are.

    Within a user or an item the stage's own order stays. None before ingest has run.
    """
    pointer = stages.get("ingest", {}).get("tables", {}).get("interactions")
    if pointer is None:
        return None
    clicks = work.store.tables.read("interactions", pointer["write_id"], columns=["user_id", "item_id", "at"])
    ranks = {
        "user_id": clicks.group_by("user_id").agg(__rank=pl.col("at").max().to_physical()),
        "item_id": clicks.group_by("item_id").agg(__rank=pl.len().cast(pl.Int64)),
    }

    def order(rows: pl.DataFrame) -> pl.DataFrame:
        named = next((name for name in ranks if name in rows.columns), None)
        if named is None:
            return rows
        ranked = rows.join(ranks[named], on=named, how="left", maintain_order="left")
        return ranked.sort("__rank", descending=True, nulls_last=True, maintain_order=True).drop("__rank")

    return order
