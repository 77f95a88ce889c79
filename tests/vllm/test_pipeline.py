"""The stages that ask a model, on a small shop, with real vLLM and with the transformers engine, each from its own texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from flows.settings import load
from tasks.runner import How
from tasks.stage_task import perform, table_records
from tasks.work import open_work

from .conftest import KV_BYTES

STAGES = ("ingest", "images", "caption", "summary", "preference", "examples", "sft", "score")
PAIR = ["user_id", "split", "target_seq", "item_id"]


def tables(store: Path, engine: str) -> dict[str, pl.DataFrame]:
    """What the demo's stages publish of 20 items and 6 users, without an adapter."""
    sets = [f'settings.store="{store}"', f'settings.engine="{engine}"', "settings.eager=true", 'settings.device="cpu"',
            f"settings.vllm={{kv_cache_memory_bytes={KV_BYTES}}}", 'sft.strategy="none"',
            "ingest.demo.items=20", "ingest.demo.users=6"]  # fmt: skip
    work = open_work(load(["demo"], sets, {}).to_json())
    made: dict[str, Any] = {}
    try:
        for name in STAGES:
            made[name], _ = perform(work, name, made, How(), {}, False)
    finally:
        work.engine_for.drop()
    return {table: work.store.tables.read(table, one["write_id"]) for table, one in table_records(made).items()}


def test_the_demo_by_vllm_has_the_texts_and_scores_of_transformers(tmp_path: Path) -> None:
    ours, theirs = (tables(tmp_path / engine, engine) for engine in ("vllm", "transformers"))
    for table, column in (("captions", "caption"), ("item_summaries", "summary"), ("preferences", "preference")):
        assert ours[table][column].to_list() == theirs[table][column].to_list()
        assert ours[table][column].null_count() == 0 and ours[table][column].n_unique() > 3
    both = ours["scores"].join(theirs["scores"], on=PAIR, suffix="_theirs")
    assert len(both) == len(ours["scores"]) == len(theirs["scores"]) > 50
    assert (both["p_yes"] - both["p_yes_theirs"]).abs().max() < 0.02  # type: ignore[operator]
    assert both["p_yes"].max() - both["p_yes"].min() > 0.2  # type: ignore[operator]
