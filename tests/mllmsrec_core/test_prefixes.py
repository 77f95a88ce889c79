"""Beginnings are counted once, laid out once, and batched together."""

from __future__ import annotations

from itertools import pairwise

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.ask import Message, Picture
from mllmsrec_core.plan import TOKENS_PER_PICTURE
from mllmsrec_core.prefixes import Segment, Shared, cheaper, common, layouts, levels, neighbours, shared

WORDS = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)
PROMPTS = st.lists(WORDS, min_size=1, max_size=12)


def beginnings(prompts: list[tuple[int, ...]]) -> int:
    return len({prompt[:n] for prompt in prompts for n in range(1, len(prompt) + 1)})


def spelt(made: list[list[Segment]], prompts: list[tuple[int, ...]], depth: int, place: int) -> tuple[int, ...]:
    """All that is read up to the end of a segment."""
    segment = made[depth][place]
    before = () if segment.parent is None else spelt(made, prompts, depth - 1, segment.parent)
    assert len(before) == segment.start
    return before + prompts[segment.row][segment.start : segment.end]


@given(WORDS, WORDS)
def test_the_common_beginning_is_equal_and_cannot_be_longer(a, b):
    n = common(a, b)
    assert a[:n] == b[:n]
    assert a[n : n + 1] != b[n : n + 1] or n == min(len(a), len(b))


@given(PROMPTS, st.integers(1, 12))
def test_every_prompt_is_spelt_by_the_segments_up_to_the_one_it_ends_with(prompts, least):
    made = levels(prompts, least)
    ends = {
        row: (depth, n) for depth, level in enumerate(made) for n, segment in enumerate(level) for row in segment.ends
    }
    assert ends.keys() == set(range(len(prompts)))
    for row, (depth, place) in ends.items():
        assert spelt(made, prompts, depth, place) == prompts[row]
    assert all((segment.parent is None) == (depth == 0) for depth, level in enumerate(made) for segment in level)


@given(PROMPTS)
def test_where_every_saving_counts_each_beginning_is_read_once(prompts):
    read = [segment.end - segment.start for level in levels(prompts, 1) for segment in level]
    assert sum(read) == beginnings(prompts)
    assert all(read)


@given(PROMPTS)
def test_where_no_saving_is_large_enough_different_prompts_are_read_whole_in_one_pass(prompts):
    (level,) = levels(prompts, 10_000)
    assert sum(segment.end for segment in level) == sum(map(len, set(prompts)))


@given(PROMPTS, st.integers(1, 15), st.data())
def test_a_batch_holds_its_place_and_at_least_half_of_what_it_could(prompts, most, data):
    ordered = sorted(prompts)
    place = data.draw(st.integers(0, len(ordered) - 1))
    found = neighbours(ordered, place, most)
    assert found.start <= place < found.stop
    assert min(most, len(ordered)) / 2 <= found.stop - found.start <= most


def test_a_batch_ends_where_a_family_does():
    families = sorted((family, n) for family, size in ((1, 3), (2, 5), (3, 4)) for n in range(size))
    assert families[neighbours(families, 5, 8)] == families[:8] or families[neighbours(families, 5, 8)] == families[3:8]
    cut = neighbours(families, 4, 6)
    assert families[cut] == [(2, n) for n in range(5)]


def said(*parts: str | Picture) -> tuple[Message, ...]:
    return (Message("user", parts),)


@given(st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=8))
def test_sorted_texts_share_all_but_their_different_beginnings(texts):
    texts = sorted(texts)
    found = shared(said(text) for text in texts)
    again = sum(common(a, b) for a, b in pairwise(texts))
    assert found == Shared(sum(map(len, texts)) // 4, (sum(map(len, texts)) - again) // 4)


def test_a_picture_counts_as_many_tokens_and_is_shared_only_behind_an_equal_text():
    a, b = Picture("a" * 64), Picture("b" * 64)
    assert shared([said(a, "x" * 40), said(a, "y" * 40)]).unique == TOKENS_PER_PICTURE + 20
    assert shared([said(a, "x" * 40), said(b, "x" * 40)]).ratio == 0
    assert shared([said("x" * 40, a), said("y" * 40, a)]).ratio == 0
    assert shared([said("user", a), said("user", a)]).ratio == pytest.approx(0.5, abs=0.01)
    assert shared([]).ratio == 0


def test_nothing_is_shared_behind_another_speaker():
    assert shared([(Message("system", ("x" * 80,)),), said("x" * 80)]).ratio == 0


def pairs(users: int, items: int, user_chars: int, pictures: bool) -> pl.DataFrame:
    """Every user with every item."""
    return pl.DataFrame(
        [
            {
                "user_id": f"u{u}",
                "target_seq": 1,
                "item_id": f"i{i}",
                "profile": None,
                "preference": f"{u}" * user_chars,
                "last_titles": [],
                "item_text": f"{i % 10}" * 40,
                "sha256": f"{i}" if pictures else None,
            }
            for u in range(users)
            for i in range(items)
        ],
        schema_overrides={"profile": pl.String, "last_titles": pl.List(pl.String), "sha256": pl.String},
    )


def test_what_is_longer_and_more_often_repeated_belongs_first():
    talkative = layouts(pairs(4, 8, 4_000, pictures=False), "?" * 40, pictures=True)
    assert talkative["user_first"].ratio > 0.8 > talkative["image_first"].ratio
    seen = layouts(pairs(8, 4, 40, pictures=True), "?" * 40, pictures=True)
    assert seen["image_first"].ratio > 0.7
    assert seen["user_first"].ratio < 0.1
    assert seen["image_first"].total == seen["user_first"].total == 32 * (10 + 10 + 10 + TOKENS_PER_PICTURE)
    unseen = layouts(pairs(8, 4, 40, pictures=True), "?" * 40, pictures=False)
    assert unseen["image_first"].total == 32 * 30


def test_only_a_layout_that_saves_much_is_named():
    seen = pairs(8, 4, 40, pictures=True)
    assert "score.layout = image_first would leave" in cheaper(seen, "user_first", "?", True)
    assert cheaper(seen, "image_first", "?", True) == ""
    assert cheaper(pairs(4, 4, 40, pictures=False), "user_first", "?" * 40, True) == ""
    assert cheaper(seen.clear(), "user_first", "?", True) == ""


def test_layouts_of_no_rows_share_nothing():
    assert {found.ratio for found in layouts(pairs(1, 1, 4, pictures=True).clear(), "?", True).values()} == {0.0}
