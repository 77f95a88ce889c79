"""A plan says what a run will ask and why, exactly where it can and within bounds where answers are still to come."""

from __future__ import annotations

import subprocess
import sys

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.ask import Choose, Decoding, Embed, Fetch, Generate, Message, Model, Picture, Reply, Train, key
from mllmsrec_core.plan import PENDING, cause, placeholder, price, walk
from mllmsrec_core.stage import AskParams, Inputs, Stage
from mllmsrec_core.stages import STAGES
from tasks.config import Settings

EDITED = '"Name the item."'
MODEL = Model("scripted", "1")


def asked(records: dict) -> dict[str, int]:
    return {name: record["counts"]["asked"] for name, record in records.items()}


def test_what_is_asked_lies_within_the_first_plan_and_a_second_plan_is_empty(small, run_all, planned):
    plan = planned(small())
    records = run_all(small())
    for name, count in asked(records).items():
        assert plan[name].due.low <= count <= plan[name].due.high, name
        assert plan[name].why == "never run"
    after = planned(small())
    assert [line.due.high for line in after.values()] == [0] * len(STAGES)
    assert not any(line.why for line in after.values())
    assert [line.due.rows for line in after.values()] == [record["counts"]["rows"] for record in records.values()]


def test_an_edited_prompt_is_priced_exactly_with_its_cause_and_a_reverted_one_costs_nothing(
    small, ran, run_all, planned
):
    edited = small(caption__prompt=EDITED)
    plan = planned(edited)
    pictures = ran["caption"]["tables"]["captions"]["rows"]
    due = plan["caption"].due
    assert (due.rows, due.low, due.high, plan["caption"].why) == (pictures, pictures, pictures, "caption.prompt")
    assert plan["summary"].due.low == 0 < plan["summary"].due.high
    assert "upstream captions" in plan["summary"].why
    after = run_all(edited)
    for name, count in asked({name: record for name, record in after.items() if record != ran[name]}).items():
        assert plan[name].due.low <= count <= plan[name].due.high, name
    assert after["caption"]["counts"]["asked"] == pictures
    reverted = planned(small())
    assert [(line.due.high, line.why) for line in reverted.values()] == [(0, "")] * len(STAGES)
    assert run_all(small()) == ran


def test_a_chain_whose_later_questions_need_answers_has_an_interval(small, ran, planned):
    due = planned(small(preference__recurrent_prompt="'{previous} {items}'"))["preference"].due
    assert due.low == ran["preference"]["counts"]["rows"]
    assert due.high == ran["preference"]["tables"]["preferences"]["rows"]


def test_a_plan_changes_nothing_in_the_store(small, ran, planned, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    planned(small(caption__prompt=EDITED))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


OTHER = {
    "env": '"other"',
    "device": '"cpu"',
    "batch_size": 1,
    "window": 2,
    "flush_rows": 3,
    "flush_seconds": 0.5,
    "allow_hosts": '["example.org"]',
    "scratch": '"/nowhere"',
}
ONE_OF_A_KIND = {"engine"}  # the only choice there is


def test_no_setting_ever_reaches_a_question(small, ran, run_all, planned):
    assert {"store", *OTHER, *ONE_OF_A_KIND} == set(Settings.model_fields), "give the new setting another value here"
    for name, value in OTHER.items():
        plan = planned(small(**{f"settings__{name}": value}))
        assert [line.due.high for line in plan.values()] == [0] * len(STAGES), name
    every = run_all(small(**{f"settings__{name}": value for name, value in OTHER.items()}))
    assert every == ran


def test_another_store_and_window_publish_equal_tables(small, ran, run_all, tmp_path):
    other = run_all(small(store=tmp_path / "other", settings__window=1))
    digests = [{t: p["digest"] for r in run.values() for t, p in r["tables"].items()} for run in (ran, other)]
    assert digests[0] == digests[1]


PLAN = """
import sys
from flows.settings import load
from tasks.planning import make_plan
from tasks.work import open_work
sets = ["settings.store=" + sys.argv[1], "ingest.demo.items=24", "ingest.demo.users=6"] + sys.argv[2:]
lines = make_plan(open_work(load(["demo"], sets, {}).to_json()), "dev")
assert sum(line.due.high for line in lines) > 100
print(sorted({"torch", "transformers", "open_clip", "peft", "trl", "prefect"} & set(sys.modules)))
"""


@pytest.mark.parametrize("model", ["scripted", "embedded"])
def test_a_plan_loads_no_model(tmp_path, model):
    sets = ["model=scripted", "audit.model=scripted"] if model == "scripted" else []
    command = [sys.executable, "-c", PLAN, str(tmp_path / "store"), *sets]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The walk itself.


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
    assert cause(parts(), parts())
