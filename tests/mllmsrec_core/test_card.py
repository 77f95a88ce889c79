"""The data card says what a dataset looks like, and who is in it stays unsaid."""

from datetime import UTC, datetime

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.card import MOST_REASONS, card, popularity, reasons
from mllmsrec_core.stage import conform
from mllmsrec_core.stages import ingest

EMPTY = {name: schema.create_empty() for name, schema in ingest.WRITES.items() if name != "data_card"}


def clicks(*rows):
    times = [None if at is None else datetime.fromtimestamp(at, UTC) for *_, at in rows]
    told = [(*row[:3], at, None, True) for row, at in zip(rows, times, strict=True)]
    return pl.DataFrame(told, schema=EMPTY["interactions"].schema, orient="row")


def figures(**tables):
    table = conform(card(**{**EMPTY, **tables}), ingest.DataCard)
    return {(metric, detail): value for metric, detail, value in table.iter_rows()}


def test_a_small_shop_by_hand():
    items = pl.DataFrame(
        {"item_id": ["a", "b", "c"], "title": ["Mug", None, "Lamp"], "image_uri": [None, None, "x.jpg"]}
    )
    items = pl.concat([EMPTY["items"], items], how="diagonal")
    told = figures(
        items=items,
        interactions=clicks(("u", 0, "a", 0), ("u", 1, "a", 60), ("u", 2, "b", None), ("v", 0, "a", 86_400)),
        waiting=clicks(("w", 0, "a", 5), ("v", 1, "b", 5)),
    )
    assert told["users", ""] == 2
    assert (told["items", "in all"], told["items", "with interactions"]) == (3, 2)
    assert told["repeated_pairs", ""] == 1
    assert told["sparsity", ""] == 0.25
    assert (told["history_length", "0 %"], told["history_length", "mean"], told["history_length", "100 %"]) == (1, 2, 3)
    assert (told["missing", "title"], told["missing", "picture"]) == (1, 2)
    assert told["popularity_share", "top 50 %"] == 0.75
    assert (told["waiting", "users"], told["waiting", "interactions"]) == (1, 2)
    assert told["time", "last: 1970-01-02 00:00 UTC"] == 86_400
    assert told["time", "interactions without"] == 1


def test_a_dataset_of_nothing_has_a_card_too():
    told = figures()
    assert told["users", ""] == 0 and told["sparsity", ""] is None and ("popularity_gini", "") not in told


def gini(counts):
    """Half the mean difference between two items, over the mean: the definition."""
    counts = np.array(counts, float)
    return np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_gini_and_shares_follow_their_definitions(counts):
    ordered = np.array(sorted(counts, reverse=True))
    told = {(metric, detail): value for metric, detail, value in popularity(ordered)}
    assert abs((told["popularity_gini", ""] or 0) - gini(counts)) < 1e-5
    shares = [told["popularity_share", f"top {top} %"] or 0 for top in (1, 5, 10, 20, 50)]
    assert shares == sorted(shares) and shares[0] >= max(counts) / sum(counts) - 1e-5


def test_reasons_are_counted_by_kind_without_what_the_files_said():
    said = [f"there is no item `secret {n}`" for n in range(3)] + ["a history of 1, shorter than min_history = 2"]
    assert reasons(pl.Series("reason", said)) == [
        ("rejects", "there is no item …", 3),
        ("rejects", "a history of …, shorter than min_history = …", 1),
    ]


def test_many_kinds_of_reasons_are_cut_and_none_is_lost():
    said = ["".join(chr(97 + int(c)) for c in str(n)) for n in range(200)]
    told = reasons(pl.Series("reason", said))
    assert len(told) == MOST_REASONS + 1 and sum(n or 0 for *_, n in told) == 200
