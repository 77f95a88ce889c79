"""The report says of each asking stage how much its prompts share, from the questions that were really asked."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from mllmsrec_core.prefixes import common
from storage.store import Store
from tasks.report import render
from tasks.report.prefixes import prefixes
from tasks.report.shown import Shown
from tasks.spent import LOOKED_AT


@pytest.fixture
def shown(ran: dict[str, Any], small: Any) -> Shown:
    return Shown(Store(small().settings.store), "dev")


def test_each_stage_that_asks_a_language_model_has_a_line_in_order(shown: Shown) -> None:
    found = prefixes(shown)
    assert [line.stage for line in found] == ["caption", "summary", "preference", "score"]
    assert all(0 <= line.ratio < 1 and 0 < line.n <= LOOKED_AT and line.tokens for line in found)


def test_the_share_is_that_of_the_very_prompts_in_the_order_of_the_rows(shown: Shown) -> None:
    pointer = shown.stages["score"]["carried"]["units"]
    keys = shown.store.tables.read("units.score", pointer["write_id"])["asks"].to_list()
    questions = shown.store.replies.questions(keys)
    texts = [questions[key]["messages"][0]["parts"][0] for key in dict.fromkeys(keys)][:LOOKED_AT]
    assert not any(part for key in keys for part in questions[key]["messages"][0]["parts"][1:])  # texts alone
    again = sum(common(a, b) for a, b in pairwise(texts))
    [line] = [line for line in prefixes(shown) if line.stage == "score"]
    assert (line.n, line.ratio) == (len(texts), pytest.approx(again / sum(map(len, texts)), abs=1e-3))
    assert line.ratio > 0.3  # a user's candidates stand side by side


def test_the_hit_rate_of_an_engine_that_counts_stands_beside_the_share(shown: Shown) -> None:
    assert {line.hit_rate for line in prefixes(shown)} == {None}  # the scripted engine reads nothing
    del shown.stages["caption"]["engine"]  # as older versions wrote records
    shown.stages["score"] = {**shown.stages["score"], "engine": {"hit_rate": 0.4321}}
    assert {line.stage: line.hit_rate for line in prefixes(shown)} == {
        **dict.fromkeys(("caption", "summary", "preference")),
        "score": 0.4321,
    }
    assert '<td class="n">43.2 %</td></tr>' in render(shown)


def test_a_stage_whose_questions_are_gone_has_no_line(shown: Shown) -> None:
    shown.stages["score"] = {**shown.stages["score"], "carried": {"units": {"write_id": "0" * 8}}}
    del shown.stages["caption"]
    assert [line.stage for line in prefixes(shown)] == ["summary", "preference"]
