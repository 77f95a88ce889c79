"""Histories are in order, numbered once, and compared without their text."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
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


def judged(rows, before=NOTHING, *rules):
    usable, unusable = histories.coded(read(rows), pl.Series(["a", "b"]), before["user_id"])
    return histories.judge(usable, before, rules), unusable


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


codes = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40)


def peeled(pairs, least):
    """The k-core by taking away one user or item at a time, the last first."""
    while True:
        users, items = ([pair[side] for pair in pairs] for side in (0, 1))
        thin = [(0, user) for user in users if users.count(user) < least[0]]
        thin += [(1, item) for item in items if items.count(item) < least[1]]
        if not thin:
            return pairs
        side, code = thin[-1]
        pairs = [pair for pair in pairs if pair[side] != code]


@given(codes, st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_the_core_is_what_is_left_however_it_is_peeled(pairs, least):
    user, item = (np.array([pair[side] for pair in pairs], np.uint8) for side in (0, 1))
    users, items = histories.core(user, item, least)
    assert [pair for pair in pairs if users[pair[0]] and items[pair[1]]] == peeled(pairs, least)


def test_a_rule_counts_only_what_the_rules_before_it_let_through():
    rows = [("u", "a", at(1), None, True), ("u", "a", at(2), None, True), ("v", "a", at(1), None, True)]
    rows += [("v", "b", at(2), None, True)]
    told, _ = judged(rows, NOTHING, histories.once("first"), histories.enough(2))
    assert told.interactions.select("user_id", "seq").rows() == [("v", 0), ("v", 1)]
    assert sorted(told.rejects["reason"]) == [
        "a history of 1, shorter than min_history = 2",
        "the same user and item again; repeats = first keeps one",
    ]


def test_without_times_the_first_or_last_row_of_a_pair_stays_with_its_place():
    rows = [("u", item, None, None, True) for item in "aba"]
    for keep, seqs, line in (("first", [0, 1], 3), ("last", [1, 2], 1)):
        told, _ = judged(rows, NOTHING, histories.once(keep))
        assert told.interactions["seq"].to_list() == seqs
        assert told.rejects["line"].to_list() == [line]
        assert told.waiting.height == 1
