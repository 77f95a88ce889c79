"""The construction of the first MLLM-MSR code base, for comparison with figures that were made with it.

There a user's history is not the latest items but the most popular ones: of everything a user touched, the six items with
the most interactions overall, the user's own and the target among them, put back in the order of time; the target is the
last of the six, and users are divided 8:1:1. A scorer that counts popularity does well on it by construction, so figures
made this way compare with those of that code base alone; `LABEL` stands in their candidate set.
"""

from __future__ import annotations

from typing import Literal

import polars as pl

Compat = Literal["none", "mllm_msr"]

LABEL = "compat.mllm_msr"
KEPT = 6  # of a user's interactions, in the notebook that prepares MicroLens
REASON = f"not among the user's {KEPT} most popular items ({LABEL})"


def unpopular(histories: pl.DataFrame) -> pl.Series:
    """Of each row, whether it is not among its user's `KEPT` most popular ones.

    `histories` has user_id, seq and item_id. Popularity is the number of rows of the item; of equal ones the earlier stay.
    """
    ranked = histories.select("user_id", "seq", popularity=pl.len().over("item_id")).with_row_index("row")
    ranked = ranked.sort("user_id", "popularity", "seq", descending=[False, True, False])
    return ranked.select("row", out=pl.int_range(pl.len()).over("user_id") >= KEPT).sort("row")["out"]
