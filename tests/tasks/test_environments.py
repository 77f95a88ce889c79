"""Environments are promoted, rolled back and compared by their pointers, and never come to show what is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from mllmsrec_core import metrics
from mllmsrec_core.errors import UsageError
from storage.store import Store
from tasks.environments import compare, coverage, promote, rollback


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def record(store: Store, stage: str, tables: Mapping[str, pl.DataFrame], **others: Any) -> dict[str, Any]:
    """A stage record whose tables really are in the store."""
    made = {name: asdict(store.tables.publish(name, frame, {})) for name, frame in tables.items()}
    parts = {"params": {stage: {}}, "model": None, "sample": None, **others.pop("parts", {})}
    return {"stage": stage, "tables": made, "parts": parts, "at": "2026-01-01T00:00:00+00:00", **others}


def captions(store: Store, text: str, **others: Any) -> dict[str, Any]:
    return record(store, "caption", {"captions": pl.DataFrame({"sha256": ["aa"], "caption": [text]})}, **others)


def lose(store: Store, made: Mapping[str, Any]) -> None:
    """As though somebody had deleted the files of its tables."""
    for table, pointer in made["tables"].items():
        store.files.remove(f"tables/{table}/{pointer['write_id']}")


def scored(store: Store, scores: Mapping[str, list[float]]) -> dict[str, Any]:
    """A score record of one list per user: the first candidate is the positive."""
    rows = [
        {"user_id": user, "split": "test", "target_seq": 9, "item_id": f"i{n}", "label": n == 0, "logit": logit}
        for user, logits in scores.items()
        for n, logit in enumerate(logits)
    ]
    frame = pl.DataFrame(rows)
    figures = metrics.evaluate(frame.with_columns(random=pl.lit(0.0)).rename({"logit": "model"}), ["model", "random"])
    return record(store, "score", {"scores": frame, "metrics": figures})


# --- promote ---


def test_the_target_shows_exactly_what_the_source_shows_and_says_where_it_came_from(store):
    store.envs.move("prod", {"old": captions(store, "old")})
    store.envs.move("dev", {"caption": captions(store, "one")})
    store.envs.move("dev", {"caption": captions(store, "two")})
    assert promote(store, "dev", "prod", 1.0) == 2
    assert store.envs.current("prod")["stages"] == store.envs.current("dev")["stages"]
    assert store.envs.current("prod")["note"] == "promoted from dev 2"


def test_promoting_what_is_shown_already_writes_nothing(store):
    store.envs.move("dev", {"caption": captions(store, "one")})
    assert promote(store, "dev", "prod", 1.0) == promote(store, "dev", "prod", 1.0) == 1
    assert len(store.envs.history("prod")) == 1


def test_an_empty_source_is_refused_with_the_nearest_name(store):
    store.envs.move("dev", {"caption": captions(store, "one")})
    with pytest.raises(UsageError, match=r"`dve`.*did you mean `dev`"):
        promote(store, "dve", "prod", 1.0)
    assert store.envs.names() == ["dev"]


def test_a_source_cannot_be_promoted_to_itself(store):
    store.envs.move("dev", {"caption": captions(store, "one")})
    with pytest.raises(UsageError, match="name two"):
        promote(store, "dev", "dev", 1.0)


def test_low_coverage_is_refused_with_its_numbers_and_both_ways_on(store):
    store.envs.move("dev", {"caption": captions(store, "one", coverage=0.875), "whole": captions(store, "two")})
    with pytest.raises(
        UsageError, match=r"100 %.*caption 87\.5 %.*mllmsrec run --env dev.*promote dev prod --force"
    ) as e:
        promote(store, "dev", "prod", 1.0)
    assert "whole" not in str(e.value)
    assert store.envs.current("prod")["stages"] == {}
    assert promote(store, "dev", "prod", 0.875) == 1
    assert promote(store, "dev", "staging", 1.0, force=True) == 1


def test_tables_that_are_gone_are_refused_even_by_force(store):
    made = captions(store, "one")
    store.envs.move("dev", {"caption": made})
    lose(store, made)
    with pytest.raises(UsageError, match=r"captions are gone.*mllmsrec run --env dev"):
        promote(store, "dev", "prod", 0.0, force=True)
    assert store.envs.names() == ["dev"]


def test_a_record_that_says_nothing_of_coverage_is_whole():
    assert coverage({}) == 1.0


# --- roll back ---


@pytest.fixture
def three(store: Store) -> list[dict[str, Any]]:
    """`dev` after three moves; the records it showed."""
    made = [captions(store, text) for text in ("one", "two", "three")]
    for one in made:
        store.envs.move("dev", {"caption": one})
    return made


def test_a_roll_back_shows_the_state_before_and_is_itself_a_state(store, three):
    assert rollback(store, "dev") == 4
    assert store.envs.current("dev")["stages"] == {"caption": three[1]}
    assert store.envs.current("dev")["note"] == "rolled back to 2"
    assert [state["seq"] for state in store.envs.history("dev")] == [1, 2, 3, 4]


def test_a_second_roll_back_takes_the_first_one_back(store, three):
    rollback(store, "dev")
    rollback(store, "dev")
    assert store.envs.current("dev")["stages"] == {"caption": three[2]}


def test_a_roll_back_goes_to_any_state_and_drops_stages_it_did_not_have(store, three):
    store.envs.move("dev", {"summary": captions(store, "later")})
    rollback(store, "dev", 1)
    assert store.envs.current("dev")["stages"] == {"caption": three[0]}


def test_a_state_that_never_was_or_whose_tables_are_gone_is_refused(store, three):
    with pytest.raises(UsageError, match="no state 9; the newest ones: 1, 2, 3"):
        rollback(store, "dev", 9)
    lose(store, three[0])
    with pytest.raises(UsageError, match="cannot go back to 1: files of captions are gone"):
        rollback(store, "dev", 1)
    assert store.envs.current("dev")["seq"] == 3


def test_there_is_nothing_before_the_first_state(store):
    with pytest.raises(UsageError, match="empty"):
        rollback(store, "dev")
    store.envs.move("dev", {"caption": captions(store, "one")})
    with pytest.raises(UsageError, match="one state only"):
        rollback(store, "dev")


# --- compare ---


def test_an_environment_beside_itself_differs_in_nothing(store):
    store.envs.move("dev", {"caption": captions(store, "one"), "score": scored(store, {"u1": [1, 0], "u2": [0, 1]})})
    promote(store, "dev", "prod", 1.0)
    found = compare(store, "dev", "prod")
    assert all(row.equal and row.rows[0] == row.rows[1] for row in found.tables)
    assert found.params == () and found.same_lists
    assert {row.difference for row in found.metrics} == {0.0}


def test_tables_are_told_apart_by_content_and_absence(store):
    store.envs.move("dev", {"caption": captions(store, "one"), "score": captions(store, "same")})
    store.envs.move("prod", {"caption": captions(store, "two")})
    rows = {(row.stage, row.table): row for row in compare(store, "dev", "prod").tables}
    assert not rows["caption", "captions"].equal and rows["caption", "captions"].rows == (1, 1)
    assert not rows["score", "captions"].equal and rows["score", "captions"].rows == (1, None)


def test_only_parameters_that_differ_are_listed(store):
    def parts(prompt: str, revision: str) -> dict[str, Any]:
        model = {"name": "m", "revision": revision, "dtype": "float32", "quantisation": "none"}
        return {"params": {"caption": {"prompt": prompt, "max_tokens": 9, "model": ""}}, "model": model}

    store.envs.move("dev", {"caption": captions(store, "x", parts=parts("Name it.", "1" * 40))})
    store.envs.move("prod", {"caption": captions(store, "x", parts=parts("Describe it.", "2" * 40))})
    found = {row.name: row.values for row in compare(store, "dev", "prod").params}
    assert found == {
        "caption.prompt": ("Name it.", "Describe it."),
        "caption: model": ("m@" + "1" * 12 + ", float32", "m@" + "2" * 12 + ", float32"),
    }


def test_differences_on_the_same_lists_are_second_minus_first_with_bounds(store):
    users = [f"u{n:02}" for n in range(20)]
    store.envs.move("dev", {"score": scored(store, {u: [0.0, 1.0, 2.0] for u in users})})  # always last
    store.envs.move("prod", {"score": scored(store, {u: [3.0, 1.0, 2.0] for u in users})})  # always first
    rows = {(row.scorer, row.metric, row.k): row for row in compare(store, "dev", "prod").metrics}
    auc = rows["model", "auc", 0]
    assert (auc.figures[0][0], auc.figures[1][0], auc.difference, auc.low, auc.high) == (0.0, 1.0, 1.0, 1.0, 1.0)
    assert rows["model", "recall", 1] == replace(rows["model", "hr", 1], metric="recall")
    assert (rows["random", "auc", 0].difference, rows["random", "auc", 0].low) == (0.0, None)
    back = {(row.scorer, row.metric, row.k): row for row in compare(store, "prod", "dev").metrics}
    assert back["model", "auc", 0].difference == -1.0


def test_other_candidates_give_no_bounds_and_are_said_to_be_others(store):
    store.envs.move("dev", {"score": scored(store, {"u1": [1, 0], "u2": [0, 1]})})
    store.envs.move("prod", {"score": scored(store, {"u1": [1, 0], "u3": [0, 1]})})
    found = compare(store, "dev", "prod")
    assert not found.same_lists
    assert {(row.low, row.high) for row in found.metrics} == {(None, None)}
    assert any(row.difference is not None for row in found.metrics)


def test_an_environment_without_scores_is_compared_by_the_rest(store):
    store.envs.move("dev", {"caption": captions(store, "one")})
    made = scored(store, {"u1": [1, 0]})
    store.envs.move("prod", {"score": made})
    lose(store, made)
    found = compare(store, "dev", "prod")
    assert found.metrics == () and not found.same_lists and len(found.tables) == 3
