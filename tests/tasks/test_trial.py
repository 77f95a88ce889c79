"""A trial shows exact prompts and answers beside what is published, and publishes nothing."""

from __future__ import annotations

import pytest

from mllmsrec_core.ask import Decoding, Generate, Reply, key
from mllmsrec_core.errors import UsageError
from mllmsrec_core.stages import caption
from tasks.engines.scripted import MODEL
from tasks.trial import trial
from tasks.work import open_work


def test_other_answers_stand_beside_the_published_ones_and_nothing_is_published(small, ran, planned, tmp_path):
    before = sorted(
        path for folder in ("tables", "envs", "stages") for path in (tmp_path / "store" / folder).rglob("*")
    )
    edited = small(caption__prompt='"Name the {item}."')
    shown = trial(edited, "caption", 2)
    assert len(shown) == 2
    for row in shown:
        (asked,) = row["asked"]
        assert asked["prompt"].startswith("Name the {item}.\n[picture ")
        assert asked["answer"] in row["new"]
        assert row["row"].removeprefix("sha256=") in row["old"]
        assert row["old"] != row["new"]
    after = sorted(path for folder in ("tables", "envs", "stages") for path in (tmp_path / "store" / folder).rglob("*"))
    assert after == before
    due = planned(edited)["caption"].due
    assert due.high == due.rows - 2, "a full run does not ask again what the trial asked"


def test_every_question_behind_a_row_is_shown(small, ran):
    (row,) = trial(small(), "summary", 1)
    assert [asked["prompt"].split()[0] for asked in row["asked"]] == ["Summarise", "Write"]
    assert row["old"] == row["new"]


def test_each_step_shows_its_own_question(small, ran):
    steps = trial(small(), "preference", 1)
    assert len(steps) > 1
    assert all(len(step["asked"]) == 1 for step in steps)
    assert steps[0]["asked"][0]["answer"] in steps[1]["asked"][0]["prompt"]


@pytest.mark.parametrize("stage", ["images", "score", "audit", "sft"])
def test_every_stage_that_asks_can_be_tried(small, ran, stage):
    for row in trial(small(), stage, 1):
        assert row["row"]
        assert row["new"] != "nothing"


def test_a_row_that_fails_is_shown_rather_than_ending_the_trial(small, ran):
    config = small(caption__prompt='"Other."')
    store = open_work(config.to_json()).store
    captions = store.tables.read("captions", ran["caption"]["tables"]["captions"]["write_id"])
    question = Generate(MODEL, caption.prompt(config.params.caption, captions["sha256"][0]), Decoding(200))
    store.replies.add(question, key(question), Reply(error="context_too_long", detail="9 tokens too many"))
    store.replies.flush()
    first, second = trial(config, "caption", 2)
    assert first["asked"][0]["answer"] == "context_too_long: 9 tokens too many"
    assert "error=context_too_long" in first["new"]
    assert "error" not in second["new"]


def test_what_cannot_be_tried_is_named_with_what_can(small, ran):
    with pytest.raises(UsageError, match=r"`captoin`.*did you mean `caption`"):
        trial(small(), "captoin", 1)
    with pytest.raises(UsageError, match="`ingest` is not a stage that asks"):
        trial(small(), "ingest", 1)


def test_a_trial_before_the_first_run_says_what_to_run(small):
    with pytest.raises(UsageError, match="mllmsrec run --stage ingest"):
        trial(small(), "images", 1)
