"""The corrections in force, for the report: what was overruled, by what, why, and whose picture or text it is.

Knows nothing of HTML.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import polars as pl

from tasks.report.shown import Shown

MAX_SHOWN = 50
MAX_ITEMS = 5  # named of one correction
SHORT = 12  # hex digits of a key


@dataclass(frozen=True)
class Overruled:
    """One decision: of one answer, or of `n` that were opened to be asked again for one reason at once."""

    stage: str
    action: str
    of: str  # the items it is about, or the beginning of the key
    text: str | None
    by: str
    at: datetime
    reason: str
    n: int


@dataclass(frozen=True)
class InForce:
    """The newest decisions first; `more` were left out."""

    shown: tuple[Overruled, ...]
    n: int
    more: int


def in_force(shown: Shown) -> InForce | None:
    """Of each answer the decision that holds; None where none was ever made."""
    entries = shown.store.corrections.all()
    if entries.is_empty():
        return None
    holding = entries.sort("at", maintain_order=True).unique("key", keep="last")
    alike = ["stage", "action", "text", "by", "at", "reason"]
    decisions = (
        holding.group_by(alike)
        .agg(key=pl.col("key").min(), n=pl.len())
        .sort("at", "stage", "key", descending=[True, False, False])
    )
    rows = decisions.head(MAX_SHOWN).iter_rows(named=True)
    said = tuple(Overruled(of=_about(shown, row.pop("key"), row["n"]), **row) for row in rows)
    return InForce(said, len(holding), len(decisions) - len(said))


def _about(shown: Shown, key: bytes, n: int) -> str:
    """The items whose caption or summary the one answer is; else the key's beginning, or how many there are."""
    if n > 1:
        return f"{n:,} answers"
    items = _items(shown, key)
    more = f" and {len(items) - MAX_ITEMS} more" if len(items) > MAX_ITEMS else ""
    return ", ".join(items[:MAX_ITEMS]) + more if items else key.hex()[:SHORT]


def _items(shown: Shown, key: bytes) -> list[str]:
    captions, images, summaries = (shown.table(name) for name in ("captions", "images", "item_summaries"))
    found = [] if summaries is None else summaries.filter(pl.col("ask") == key)["item_id"].to_list()
    if captions is not None and images is not None:
        pictures = captions.filter(pl.col("ask") == key).select("sha256")
        found += images.join(pictures, on="sha256", how="semi")["item_id"].to_list()
    return sorted(found)
