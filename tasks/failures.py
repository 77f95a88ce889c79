"""Failed rows of an environment's tables: which row, which error class, what the engine said; and how many there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllmsrec_core.errors import UsageError, nearest
from storage.store import Store
from tasks.run_stage import failed
from tasks.stage_task import STAGE_BY_NAME


def failures(
    store: Store, stages: Mapping[str, Any], stage: str | None = None, error_class: str | None = None
) -> list[dict[str, str]]:
    """One entry per row that failed, in stage and key order."""
    if stage and stage not in stages:
        raise UsageError(f"this environment has no stage `{stage}`; {nearest(stage, stages)}")
    found = []
    for name, record in stages.items():
        for table, pointer in record["tables"].items() if stage in (None, name) else ():
            frame = store.tables.read(table, pointer["write_id"])
            found += [_entry(store, name, table, row) for row in failed(frame).iter_rows(named=True)]
    return [entry for entry in found if error_class in (None, entry["class"])]


def counts(record: Mapping[str, Any]) -> dict[str, int]:
    """Error class -> failed rows of what a stage shows; of a record by an earlier version, those it asked for."""
    return record.get("failures", record["counts"]["errors"])


def summary(record: Mapping[str, Any]) -> str:
    """`image_missing 1, image_refused 4`; empty where nothing failed."""
    return ", ".join(f"{name} {n:,}" for name, n in counts(record).items())


def _entry(store: Store, stage: str, table: str, row: dict[str, Any]) -> dict[str, str]:
    keys = STAGE_BY_NAME[stage].writes[table].primary_key()
    return {
        "stage": stage,
        "row": " ".join(f"{key}={row[key]}" for key in keys),
        "class": row["class"],
        "detail": row["detail"] or "" if "detail" in row else _said(store, row.get("ask")),
    }


def _said(store: Store, ask: bytes | None) -> str:
    """What the engine said to the question with this key."""
    reply = store.replies.find(ask) if ask else None
    return reply[1].detail if reply else ""
