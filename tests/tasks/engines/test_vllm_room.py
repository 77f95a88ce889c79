"""What vLLM is started with follows from the questions that wait."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.ask import Model
from tasks.engines.vllm_room import LEAST, MARGIN, RECENT, Needs, Shown, room, together

ONE, OTHER = Model("one", "1"), Model("other", "2")
needs = st.builds(
    Needs, st.sampled_from([ONE, OTHER]), st.integers(0, 9), st.integers(1, 3), st.integers(1, 9999), st.booleans()
)


@given(needs, needs)
def test_grown_needs_cover_both_and_no_more(one, other):
    other = replace(other, weights=one.weights)
    both = one.grown(other)
    assert both.covers(one) and both.covers(other)
    assert both == other.grown(one) and both.grown(one) == both
    for name in ("rank", "pictures", "tokens", "cache"):
        assert getattr(both, name) in (getattr(one, name), getattr(other, name))


@given(needs, needs)
def test_needs_are_covered_by_equal_or_larger_ones_of_the_same_weights_alone(one, other):
    larger = all(getattr(one, name) >= getattr(other, name) for name in ("rank", "pictures", "tokens", "cache"))
    assert one.covers(other) == (larger and one.weights == other.weights)


@given(needs, st.lists(needs))
def test_one_start_serves_all_that_wait_for_the_same_weights(first, waiting):
    start = together(first, waiting)
    assert start.weights == first.weights
    assert all(start.covers(each) == (each.weights == first.weights) for each in (first, *waiting))


@given(st.integers(1, 10**6), st.one_of(st.none(), st.integers(1, 10**6)))
def test_room_is_a_power_of_two_with_a_margin_and_never_beyond_the_most(tokens, most):
    made = room(tokens, most)
    if most is None:
        assert made == 0
        return
    assert made <= most
    if made < most:
        assert made >= max(LEAST, int(tokens * MARGIN)) and made.bit_count() == 1
        assert made == LEAST or made < 2 * MARGIN * tokens


@given(st.integers(1, 10**5))
def test_a_row_that_has_outgrown_its_room_gets_a_larger_one(tokens):
    before = room(tokens, 10**6)
    assert room(before + 1, 10**6) > before


@pytest.mark.parametrize(("times", "again"), [((1, 1, 1), 0), ((2, 1, 1), 1), ((3, 2, 1), 3)])
def test_pictures_count_as_coming_again_from_the_second_time_on(times, again):
    shown = Shown()
    for turn in range(max(times)):
        for number, count in enumerate(times):
            if turn < count:
                shown.add([sha256(bytes([number])).hexdigest()])
    assert shown.again == again


def test_pictures_shown_in_turn_over_a_long_list_do_not_come_again_while_a_cache_would_hold_them():
    shown = Shown()
    for _ in range(2):
        for number in range(RECENT + 1):
            shown.add([str(number)])
    assert shown.again == 0
    shown.add([str(RECENT)])
    assert shown.again == 1
