"""Histories are in order, numbered once, and compared without their text."""

from __future__ import annotations

from datetime import UTC, datetime

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core import histories
from mllmsrec_core.datasets import INTERACTIONS

PUBLISHED = {"user_id": pl.String, "seq": pl.Int32, **{name: INTERACTIONS[name] for name in histories.PUBLISHED[2:]}}
NOTHING = pl.DataFrame(schema=PUBLISHED)


def read(rows, names=("user_id", "item_id", "at", "rating", "liked")):
    frame = pl.DataFrame(rows, schema={name: INTERACTIONS[name] for name in names}, orient="row")
    missing = [pl.lit(None, dtype).alias(name) for name, dtype in INTERACTIONS.items() if name not in frame.columns]
    return frame.with_columns(missing).with_columns(line=pl.int_range(1, pl.len() + 1, dtype=pl.UInt32))


def judged(rows, before=NOTHING, min_history=0):
    usable, unusable = histories.coded(read(rows), pl.Series(["a", "b"]), before["user_id"])
    return histories.judge(usable, before, min_history), unusable


def at(second):
    return datetime.fromtimestamp(second, UTC)


def test_where_a_source_has_no_times_its_own_order_is_kept():
    rows = [(user, item, None, None, True) for user, item in (("u", "b"), ("v", "a"), ("u", "a"), ("u", "b"))]
    told, unusable = judged(rows)
    expected = [("u", 0, "b"), ("u", 1, "a"), ("u", 2, "b"), ("v", 0, "a")]
    assert told.interactions.select("user_id", "seq", "item_id").rows() == expected
    assert told.rejects.is_empty() and unusable.is_empty()


def test_rows_without_a_time_come_after_those_that_have_one():
    told, _ = judged([("u", "b", None, None, True), ("u", "a", at(5), None, True)])
    assert told.interactions["item_id"].to_list() == ["a", "b"]


def test_of_one_moment_the_rated_the_higher_and_the_liked_row_stays():
    rows = [
        ("u", "a", at(1), rating, liked) for rating, liked in ((None, True), (2.0, True), (3.0, False), (3.0, True))
    ]
    told, _ = judged(rows)
    assert told.interactions.select("rating", "liked").rows() == [(3.0, True)]
    assert told.rejects["line"].to_list() == [3, 2, 1]


def test_users_only_the_published_histories_know_stay_in_their_place():
    before = NOTHING.clear().vstack(
        pl.DataFrame([("w", 4, "a", at(1), 1.0, True), ("t", 0, "b", at(2), 1.0, True)], schema=PUBLISHED, orient="row")
    )
    told, _ = judged([("u", "a", at(3), None, True), ("w", "b", at(0), None, True)], before)
    expected = [("t", 0, "b"), ("u", 0, "a"), ("w", 4, "a"), ("w", 5, "b")]
    assert told.interactions.select("user_id", "seq", "item_id").rows() == expected


words = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=3).filter(
    lambda text: text == text.strip()
)


@given(
    st.lists(
        st.tuples(words, st.sampled_from(["a", "b"]), st.integers(0, 3).map(at)), min_size=1, max_size=8, unique=True
    )
)
def test_histories_are_sorted_as_text_is(rows):
    told, unusable = judged([(*row, None, True) for row in rows])
    shown = told.interactions.with_columns(pl.col("user_id", "item_id").cast(pl.String))
    assert (
        shown.select("user_id", "at", "item_id").sort("user_id", "at", "item_id").rows()
        == shown.select("user_id", "at", "item_id").rows()
    )
    assert len(shown) == len(rows) and unusable.is_empty()
