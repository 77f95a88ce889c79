"""One file per dataset. Each has `Params` and `read(source, params) -> Catalogue`, and is listed in ingest's `READERS`.

A reader maps its files to the three raw frames below and judges nothing that ingest judges for all datasets
(duplicates, unknown items, short users); what it cannot parse goes to `rejects` with file, line and reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

ITEMS = {
    "item_id": pl.String,
    "title": pl.String,
    "description": pl.String,
    "category": pl.String,
    "attributes": pl.String,  # JSON object
    "image_uri": pl.String,
}
INTERACTIONS = {
    "user_id": pl.String,
    "item_id": pl.String,
    "at": pl.Datetime("us", "UTC"),
    "rating": pl.Float64,
    "liked": pl.Boolean,
    "source": pl.String,  # file and line for later rejects; null where there is no file
    "line": pl.UInt32,
}
REJECTS = {"source": pl.String, "line": pl.UInt32, "reason": pl.String}


@dataclass(frozen=True)
class Catalogue:
    """What a reader makes of a dataset: raw frames with the columns of ITEMS (plus source, line), INTERACTIONS, REJECTS."""

    items: pl.DataFrame
    interactions: pl.DataFrame
    rejects: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=REJECTS))
