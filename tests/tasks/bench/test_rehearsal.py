"""A rehearsal asks what a whole run would ask, of a few rows."""

from __future__ import annotations

import pytest

from flows.settings import load
from mllmsrec_core.ask import key
from mllmsrec_core.stages import STAGES
from tasks.bench.rehearsal import UNTRAINED, rehearse
from tasks.work import open_work

ROWS = 5


@pytest.fixture(scope="module")
def bouts(tmp_path_factory):
    store = tmp_path_factory.mktemp("rehearsal") / "store"
    sets = ["model=scripted", "audit.model=scripted", "ingest.demo.items=24", "ingest.demo.users=9"]
    work = open_work(load(["demo"], [*sets, f'settings.store="{store}"'], {}).to_json())
    return work, {bout.stage.name: bout for bout in rehearse(work, ROWS)}


def test_every_stage_that_asks_is_rehearsed_on_the_rows_allowed_but_training(bouts):
    _, found = bouts
    assert list(found) == [stage.name for stage in STAGES if stage.ask and stage.name != UNTRAINED]
    assert {len(bout.rows) for bout in found.values()} == {ROWS}
    assert all(len(bout.units) == ROWS for bout in found.values())


def test_every_question_comes_with_its_answer_and_different_ones_come_once(bouts):
    _, found = bouts
    for bout in found.values():
        assert all(reply.value is not None for unit in bout.units for _, reply in unit)
        asked = [key(ask) for ask, _ in bout.asked()]
        assert len(asked) == len(set(asked))
        assert set(asked) == {key(ask) for unit in bout.units for ask, _ in unit}
        assert asked[0] == key(bout.units[0][0][0])


def test_items_and_users_out_of_reach_are_lent_the_answers_of_others(bouts):
    _, found = bouts
    inputs = found["score"].inputs
    assert inputs["item_summaries"]["item_id"].sort().to_list() == inputs["items"]["item_id"].sort().to_list()
    assert inputs["item_summaries"]["summary"].null_count() == 0
    assert set(inputs["preferences"]["user_id"]) == set(inputs["interactions"]["user_id"])
    assert set(inputs["images"]["status"]) == {"ok"}
    for unit in found["score"].units:
        assert "The user's preference" in unit[0][0].messages[0].parts[0]


def test_nothing_is_published_even_in_its_own_store(bouts):
    work, _ = bouts
    assert work.store.files.names("replies"), "the question is what was written"
    assert [name for folder in ("tables", "envs", "stages") for name in work.store.files.names(folder)] == []
