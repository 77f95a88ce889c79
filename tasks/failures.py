"""Failed rows of an environment's tables: which row, which error class, what the engine said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from mllmsrec_core.errors import UsageError, nearest
from storage.store import Store
from tasks.stage_task import STAGE_BY_NAME


def failures(
    store: Store, stages: Mapping[str, Any], stage: str | None = None, error_class: str | None = None
) -> list[dict[str, str]]:
    """One entry per row whose `error` is set, in stage and key order."""
    if stage and stage not in stages:
        raise UsageError(f"this environment has no stage `{stage}`; {nearest(stage, stages)}")
    found = []
    for name, record in stages.items():
        for table, pointer in record["tables"].items() if stage in (None, name) else ():
            frame = store.tables.read(table, pointer["write_id"])
            if "error" in frame.columns:
                failed = frame.filter(pl.col("error").is_not_null())
                found += [_entry(store, name, table, row) for row in failed.iter_rows(named=True)]
    return [entry for entry in found if error_class in (None, entry["class"])]


def _entry(store: Store, stage: str, table: str, row: dict[str, Any]) -> dict[str, str]:
    keys = STAGE_BY_NAME[stage].writes[table].primary_key()
    reply = store.replies.find(row["ask"]) if row.get("ask") else None
    return {
        "stage": stage,
        "row": " ".join(f"{key}={row[key]}" for key in keys),
        "class": row["error"],
        "detail": reply[1].detail if reply else "",
    }
