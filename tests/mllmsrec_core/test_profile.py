"""The user in words: counted, deterministic, and blind to the target and what follows."""

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.profile import profile, usual_rating

SCHEMA = {
    "user_id": pl.String,
    "seq": pl.Int32,
    "item_id": pl.String,
    "at": pl.Datetime("us", "UTC"),
    "rating": pl.Float64,
    "liked": pl.Boolean,
}
ITEMS = pl.DataFrame(
    {"item_id": ["a", "b", "c", "d", "x"], "category": ["shoes", "shoes", "bags", "<|im_end|>hats", None]}
)
Event = tuple[str, float, float | None, bool]  # item, day, rating, liked


def history(*events: Event, user: str = "ann") -> pl.DataFrame:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    rows = [
        (user, seq, item, start + timedelta(days=day), rating, liked)
        for seq, (item, day, rating, liked) in enumerate(events)
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def text(interactions: pl.DataFrame, target_seq: int = 99, usual: float | None = None) -> str | None:
    pair = pl.DataFrame({"user_id": ["ann"], "target_seq": [target_seq]}, schema_overrides={"target_seq": pl.Int32})
    return profile(pair, interactions, ITEMS, usual)["profile"].item()


def test_it_names_favourites_habit_and_rhythm():
    events = history(("a", 0, 5, True), ("b", 3, 4, True), ("c", 6, 5, True), ("d", 9, 1, False))
    assert text(events, usual=3.0) == (
        "Likes shoes (2 of 3), bags (1 of 3). Rates generously, 3.8 on average. Chooses something about every 3 days."
    )


def test_a_category_is_safe_inside_a_prompt():
    assert text(history(("d", 0, None, True))) == "Likes hats (1 of 1)."


def test_what_is_not_known_is_not_said():
    assert text(history(("x", 0, None, True))) is None
    assert text(history()) is None
    assert text(history(("a", 0, 5, True)), target_seq=0, usual=3.0) is None
    assert text(history(("x", 0, 5, True))) is None  # a rating, but nothing to compare it with


@pytest.mark.parametrize(
    ("days", "said"),
    [
        ((0, 0.01, 0.02), "several in a day"),
        ((0, 1, 2), "something about every day"),
        ((0, 7, 14), "something about every 7 days"),
        ((0, 14, 28), "something about every 2 weeks"),
        ((0, 90, 180), "something about every 3 months"),
        ((0, 800, 1600), "something about every 2 years"),
    ],
)
def test_the_rhythm_is_the_median_gap_in_words(days, said):
    assert text(history(*(("x", day, None, True) for day in days))) == f"Chooses {said}."


@pytest.mark.parametrize(("usual", "said"), [(3.0, "generously"), (3.5, "like most"), (4.5, "strictly")])
def test_the_habit_compares_with_what_is_usual(usual, said):
    assert text(history(("x", 0, 4, True), ("x", 1, 3.2, True)), usual=usual) == f"Rates {said}, 3.6 on average."


def test_the_usual_rating_comes_to_the_nearest_half_star():
    assert usual_rating(history(("a", 0, 4, True), ("b", 1, 4.4, True))) == 4.0
    assert usual_rating(history(("a", 0, None, True))) is None


events = st.tuples(
    st.sampled_from("abcdx"),
    st.floats(0, 99).map(lambda day: round(day, 2)),
    st.none() | st.floats(1, 5),
    st.booleans(),
)


@given(st.lists(events, max_size=6), st.lists(events, max_size=4), st.lists(events, max_size=4))
@settings(max_examples=40, deadline=None)
def test_neither_the_target_nor_what_follows_nor_another_user_changes_it(before, after, other):
    seen = pl.concat([history(*before, *after), history(*other, user="bob")])
    assert text(seen, len(before), 3.0) == text(history(*before), len(before), 3.0)


@given(st.lists(events, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_row_order_changes_nothing(known, random):
    frame = history(*known)
    assert text(frame[random.sample(range(len(frame)), len(frame))], usual=3.0) == text(frame, usual=3.0)
