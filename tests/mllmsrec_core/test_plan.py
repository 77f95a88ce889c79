"""Due questions are found by walking chains with placeholders, and counted as what they are: certain or possible."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.ask import Choose, Decoding, Embed, Fetch, Generate, Message, Model, Picture, Reply, Train, key
from mllmsrec_core.plan import PENDING, cause, placeholder, price, walk
from mllmsrec_core.stage import AskParams, Inputs, Stage

MODEL = Model("scripted", "1")


def say(*words: object) -> Generate:
    return Generate(MODEL, (Message("user", (" ".join(map(str, words)),)),), Decoding(5))


def chains(lengths: list[int], same: bool) -> tuple[Stage, pl.DataFrame]:
    def ask(inputs, row):
        said = row["name"]
        for _ in range(row["n"]):
            reply = yield say(said)
            said = reply.value
        return [{"said": said}]

    rows = pl.DataFrame({"name": [str(0 if same else n) for n in range(len(lengths))], "n": lengths})
    stage = Stage("toy", AskParams, (), {}, lambda inputs: rows, lambda inputs, done: {}, ask)
    return stage, rows


@given(st.lists(st.integers(0, 4), max_size=8), st.integers(0, 12), st.booleans())
def test_questions_still_open_lie_between_low_and_high(lengths, n_known, same):
    """The first `n_known` questions of a full run are answered already; `same` makes all chains start alike."""
    stage, rows = chains(lengths, same)
    answers: dict[bytes, Reply] = {}

    def answered(ask, name):
        return answers.setdefault(name, Reply(f"said {name.hex()}"))

    walk(stage, Inputs({}, {}), rows, answered, True)
    known = dict(list(answers.items())[:n_known])
    finished, due = walk(stage, Inputs({}, {}), rows, lambda ask, name: known.get(name), True)
    assert due.low <= len(answers) - len(known) <= due.high
    assert (due.high == 0) == (len(answers) == len(known))
    assert len(finished) == due.rows == len(rows)


def test_a_stage_behind_one_that_is_due_may_find_nothing_to_ask():
    stage, rows = chains([1, 2], False)
    _, due = walk(stage, Inputs({}, {}), rows, lambda ask, name: None, False)
    assert (due.low, due.high) == (0, 3)


def test_placeholders_have_the_shape_of_answers_and_are_never_taken_for_one_another():
    choose = Choose(MODEL, (), (("yes", ("yes",)), ("no", ("no",))))
    assert PENDING in placeholder(say("a")).value
    assert placeholder(say("a")) != placeholder(say("b"))
    assert set(placeholder(choose).value["logprobs"]) == {"yes", "no"}
    assert sum(x * x for x in placeholder(Embed(MODEL, "x"), 16).value) == pytest.approx(1)
    assert placeholder(Fetch("u", "1")).value["sha256"] != placeholder(Fetch("u", "2")).value["sha256"]
    assert len(placeholder(Train(MODEL, "{}", "d")).value["sha256"]) == 64


def test_prices_count_text_pictures_and_the_longest_answer():
    assert price(say("x" * 400)) == (100, 5)
    seen = Generate(MODEL, (Message("user", ("x" * 40, Picture("ab"))),), Decoding(7))
    assert price(seen) == (310, 7)
    assert price(Choose(MODEL, seen.messages, ())) == (310, 1)
    assert price(Fetch("u", "v")) == (0, 0)
    assert key(seen) != key(say("x" * 40))


def parts(**changed):
    base = {
        "params": {"toy": {"prompt": "p"}},
        "model": None,
        "inputs": {"t": "1"},
        "source": 1,
        "sample": None,
        "code": "c",
    }
    return {**base, **changed}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"params": {"toy": {"prompt": "q"}}}, "toy.prompt"),
        ({"model": {"name": "m"}}, "model"),
        ({"inputs": {"t": "2"}}, "upstream t"),
        ({"inputs": {"t": "1", "u": "1"}}, "upstream u"),
        ({"source": 2}, "data"),
        ({"sample": 5}, "sample"),
        ({"code": "d"}, "code"),
    ],
)
def test_why_a_stage_is_due_is_said_in_words(changed, said):
    assert said in cause(parts(**changed), parts())


def test_a_stage_due_for_no_difference_says_what_else_it_may_be():
    assert cause(parts(), None) == "never run"
    assert "failed for now" in cause(parts(), parts())
