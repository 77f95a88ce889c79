"""Scorers that need no model, for the same candidates: what any figure has to be read beside.

They know only training interactions (`protocol.training`): the published popularity rows of S3-Rec are reproduced only
if popularity counts the test item itself. Each function returns one score per row of `candidates`.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array

from mllmsrec_core.protocol import codes, liked_counts

Floats = NDArray[np.float64]

# Newest training likes of a user that count in item-item similarity: its cost grows with their square.
NEWEST = 200
CHUNK = 2000  # targets scored at once


def random(candidates: pl.DataFrame) -> Floats:
    """A constant: under expected ranks it scores what random orders score on average, without their noise."""
    return np.zeros(len(candidates))


def popularity(candidates: pl.DataFrame, training: pl.DataFrame) -> Floats:
    """How often the candidate is liked in training."""
    items = candidates["item_id"].unique()
    return liked_counts(items, training)[codes(candidates["item_id"], items)].astype(float)


def incidence(rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int]) -> csr_array:
    """A sparse matrix of ones; repeated pairs count once."""
    matrix = csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def similarity(training: pl.DataFrame, items: pl.Series) -> csr_array:
    """Cosine between items' sets of likers in training (items x items, zero diagonal)."""
    liked = training.filter("liked").sort("user_id", "seq").group_by("user_id", maintain_order=True).tail(NEWEST)
    users = liked["user_id"].unique()
    seen = incidence(codes(liked["user_id"], users), codes(liked["item_id"], items), (len(users), len(items)))
    likers = np.sqrt(np.maximum(seen.sum(axis=0), 1.0))
    unit = csr_array(seen @ diags_array(1.0 / likers))
    together = csr_array(unit.T @ unit)
    together.setdiag(0.0)
    return together


def itemknn(candidates: pl.DataFrame, interactions: pl.DataFrame, training: pl.DataFrame) -> Floats:
    """Summed cosine of the candidate to the user's likes before the target; every neighbour counts.

    Similarities come from training alone; the history read is the one the model reads. Cosine over all neighbours,
    because candidates are few: cutting to the nearest 50 would leave most of them tied at zero.
    """
    items = pl.concat([interactions["item_id"], candidates["item_id"]]).unique().sort()
    wanted = candidates.select("user_id", "target_seq").unique().sort("user_id", "target_seq").with_row_index("list")
    near = similarity(training.select("user_id", "seq", "item_id", "liked"), items)
    history = (
        wanted.join(interactions.filter("liked").select("user_id", "seq", "item_id"), on="user_id")
        .filter(pl.col("seq") < pl.col("target_seq"))
        .select("list", "item_id")
    )
    read = incidence(history["list"].to_numpy(), codes(history["item_id"], items), (len(wanted), len(items)))
    row = candidates.join(wanted, on=["user_id", "target_seq"], how="left", maintain_order="left")["list"].to_numpy()
    column = codes(candidates["item_id"], items)
    order = np.argsort(row, kind="stable")
    scores = np.zeros(len(candidates))
    for start in range(0, len(wanted), CHUNK):
        part = order[np.searchsorted(row[order], start) : np.searchsorted(row[order], start + CHUNK)]
        scores[part] = csr_array(read[start : start + CHUNK] @ near)[row[part] - start, column[part]]
    return np.round(scores, 9)  # equal sums in another order are ties, not ranks
