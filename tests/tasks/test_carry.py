"""Carrying over changes what a run costs, never what it publishes."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.ask import key
from mllmsrec_core.errors import OutOfTime
from storage.corrections import Correction
from storage.store import Store
from tasks.carry import HASHES, KEY, STALE, hashed
from tasks.run_stage import run_stage
from tasks.runner import How

sys.path.append(str(Path(__file__).parent))
import toy

STAGE = replace(toy.stage(), unit=("name",))
PARTS = {"params": {}, "model": None, "code": "1"}


def made(
    store: Store, rows: dict[str, int], last: Any = None, parts: Any = PARTS, engine: Any = None, **how: Any
) -> Any:
    """The record of a run over `rows` (name -> number of questions)."""
    engine = engine or toy.Watched(store)
    inputs = toy.inputs(toy.frame(list(rows.items())))
    return run_stage(store, STAGE, inputs, {**parts, "inputs": rows}, lambda _: engine, How(**how), last)


def table(store: Store, record: Any) -> pl.DataFrame:
    return store.tables.read("toys", record["tables"]["toys"]["write_id"])


def counted(record: Any) -> tuple[int, int, int]:
    return tuple(record["counts"][name] for name in ("carried", "known", "asked"))


shops = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 3), max_size=8)


@settings(max_examples=25, deadline=None)
@given(st.lists(shops, min_size=2, max_size=4))
def test_a_run_that_carries_rows_over_publishes_what_a_run_on_a_new_store_does(tmp_path_factory, nights):
    store = Store(str(tmp_path_factory.mktemp("store")))
    last, before = None, {}
    for rows in nights:
        last = made(store, rows, last)
        same = {name for name, n in rows.items() if before.get(name) == n}
        assert last["counts"]["carried"] == len(same)
        alone = made(Store(f"memory://{time.time_ns()}"), rows)
        assert last["tables"]["toys"]["digest"] == alone["tables"]["toys"]["digest"]
        before = rows


def test_rows_carried_over_are_not_looked_up(tmp_path):
    store = Store(str(tmp_path))
    first = made(store, {"a": 2, "b": 1, "c": 3})
    fresh = Store(str(tmp_path))
    for name in fresh.files.names("replies"):
        fresh.files.remove(name)  # nothing but what was published is left
    engine = toy.Watched(fresh)
    second = made(fresh, {"a": 2, "b": 1, "c": 3}, first, engine=engine)
    assert (engine.started, counted(second)) == ([], (3, 9, 0))
    assert second["tables"]["toys"]["digest"] == first["tables"]["toys"]["digest"]


@pytest.mark.parametrize("part", ["params", "model", "code"])
def test_nothing_is_carried_over_when_parameters_model_or_code_have_changed(tmp_path, part):
    store = Store(str(tmp_path))
    first = made(store, {"a": 2})
    assert counted(made(store, {"a": 2}, first, {**PARTS, part: "other"})) == (0, 3, 0)


def test_a_row_that_failed_is_looked_up_again_and_a_retry_carries_nothing(tmp_path):
    store = Store(str(tmp_path))
    first = made(store, {"too long": 1, "fine": 1})
    assert counted(made(store, {"too long": 1, "fine": 1}, first)) == (1, 4, 0)
    retried = made(store, {"too long": 1, "fine": 1}, first, retry=frozenset({"all"}))
    assert (retried["counts"]["carried"], retried["counts"]["asked"]) == (0, 1)


def test_a_row_whose_answer_was_corrected_is_made_again_and_no_other(tmp_path):
    store = Store(str(tmp_path))
    first = made(store, {"a": 2, "b": 2})
    question = key(toy.say("a"))
    store.corrections.write([(question, "toy", Correction("replace", "better", "me", datetime.now(UTC), "wrong"))])
    second = made(store, {"a": 2, "b": 2}, first)
    assert second["counts"]["carried"] == 1
    assert second["counts"]["asked"] == 2  # the chain's second question and the vector of its answer
    assert table(store, second).filter(pl.col("name") == "b").equals(table(store, first).filter(pl.col("name") == "b"))


def test_tables_of_another_time_are_no_longer_there(tmp_path):
    store = Store(str(tmp_path))
    first = made(store, {"a": 2})
    store.files.remove(f"tables/done.toy/{first['carried']['done']['write_id']}")
    assert counted(made(store, {"a": 2}, first)) == (0, 3, 0)


def test_units_name_every_question_of_a_row(tmp_path):
    store = Store(str(tmp_path))
    record = made(store, {"a": 3, "b": 0})
    units = store.tables.read("units.toy", record["carried"]["units"]["write_id"])
    assert units["asks"].bin.size().to_list() == [4 * KEY, KEY]
    assert key(toy.say("a")) == units["asks"][0][:KEY]


def test_a_hash_covers_every_value_however_deep():
    row = {"name": "a", "list": [{"x": 1, "text": "one"}, {"x": 2, "text": "two"}], "none": None}
    others = [
        row,
        {**row, "name": "b"},
        {**row, "list": [{"x": 1, "text": "one"}, {"x": 2, "text": "three"}]},
        {**row, "list": [{"x": 2, "text": "two"}, {"x": 1, "text": "one"}]},
        {**row, "list": [{"x": 1, "text": "one"}]},
        {**row, "none": "some"},
    ]
    frame = hashed(pl.DataFrame(others).with_row_index("__row"), without="__row")
    assert all(frame[name].n_unique() == len(others) for name in HASHES)
    twice = hashed(pl.concat([pl.DataFrame([row])] * 2).with_row_index("__row"), without="__row")
    assert twice["hash_a"].n_unique() == 1


# --- out of time ---


def test_what_a_run_had_no_time_for_stays_as_it_was_and_is_due_next_time(tmp_path):
    store = Store(str(tmp_path))
    first = made(store, {"a": 1, "b": 1})
    late = made(store, {"a": 2, "b": 1, "c": 1}, first, deadline=time.time() - 1)
    rows = table(store, late)
    assert (late["coverage"], late["counts"]["unreached"], late["counts"]["asked"]) == (round(1 / 3, 6), 2, 0)
    assert rows["name"].to_list() == ["a", "b"]
    assert rows[STALE].is_null().to_list() == [False, True]
    assert rows.drop(STALE).equals(table(store, first).drop(STALE))
    assert store.envs.record("toy", late["fingerprint"]) is None
    later = made(store, {"a": 2, "b": 1, "c": 1}, late, deadline=time.time() - 1)
    assert table(store, later)[STALE].equals(rows[STALE]), "stale since the first time"
    whole = made(store, {"a": 2, "b": 1, "c": 1}, later)
    alone = made(Store(f"memory://{time.time_ns()}"), {"a": 2, "b": 1, "c": 1})
    assert (whole["coverage"], whole["counts"]["carried"]) == (1.0, 1)
    assert table(store, whole)[STALE].null_count() == 3
    assert whole["tables"]["toys"]["digest"] == alone["tables"]["toys"]["digest"]


def test_what_was_left_under_other_parameters_is_never_taken_for_up_to_date(tmp_path):
    store = Store(str(tmp_path))
    first = made(store, {"a": 1})
    other = {**PARTS, "params": "other"}
    late = made(store, {"a": 1}, first, other, deadline=time.time() - 1)
    assert late["coverage"] == 0.0
    assert made(store, {"a": 1}, late, other)["counts"]["carried"] == 0


def test_a_stage_that_never_published_anything_says_that_the_time_was_too_short(tmp_path):
    with pytest.raises(OutOfTime, match="--budget-minutes"):
        made(Store(str(tmp_path)), {"a": 1}, deadline=time.time() - 1)


def test_time_that_runs_out_in_the_midst_publishes_what_was_reached(tmp_path):
    store = Store(str(tmp_path))
    record = made(store, {f"user {n}": 1 for n in range(50)}, most_asks=20, window=4)
    reached = len(table(store, record))
    assert 5 <= reached < 50
    assert record["coverage"] == reached / 50
    assert record["counts"]["asked"] <= 20 + 4
    assert (
        made(store, {f"user {n}": 1 for n in range(50)}, record)["counts"]["asked"] + record["counts"]["asked"] == 100
    )
