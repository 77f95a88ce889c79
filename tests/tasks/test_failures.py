"""Failed rows are listed with their class and what the engine said, and counted."""

from __future__ import annotations

import polars as pl
import pytest

from mllmsrec_core.ask import Decoding, Generate, Message, Model, Reply, key
from mllmsrec_core.errors import UsageError
from storage.store import Store
from tasks.failures import counts, failures, summary
from tasks.run_stage import counted

QUESTION = Generate(Model("m", "1"), (Message("user", ("?",)),), Decoding(5))


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def stages(store):
    """Two stages, three failed rows; what was said of one of them is kept."""
    store.replies.add(QUESTION, key(QUESTION), Reply(error="context_too_long", detail="9 tokens too many"))
    store.replies.flush()
    captions = pl.DataFrame(
        {
            "sha256": ["aa", "bb", "cc"],
            "ask": [key(QUESTION), b"never answered", None],
            "error": ["context_too_long", "empty_reply", None],
        }
    )
    steps = pl.DataFrame(
        {"user_id": ["u"], "step": [2], "ask": pl.Series([None], dtype=pl.Binary), "error": ["empty_reply"]}
    )
    adapters = pl.DataFrame({"name": ["a"]})
    made = {"caption": {"captions": captions}, "preference": {"preferences": steps}, "sft": {"adapters": adapters}}
    return {
        stage: {
            "tables": {
                name: {"write_id": store.tables.publish(name, frame, {}).write_id} for name, frame in tables.items()
            }
        }
        for stage, tables in made.items()
    }


def test_every_failed_row_is_listed_once_with_its_key_class_and_detail(store, stages):
    assert failures(store, stages) == [
        {"stage": "caption", "row": "sha256=aa", "class": "context_too_long", "detail": "9 tokens too many"},
        {"stage": "caption", "row": "sha256=bb", "class": "empty_reply", "detail": ""},
        {"stage": "preference", "row": "user_id=u step=2", "class": "empty_reply", "detail": ""},
    ]


PICTURES = pl.DataFrame(
    [
        ("a", "ok", None, None, None),
        ("b", "missing", None, None, None),  # the item names no picture
        ("c", "refused", "image_refused", "too large", None),
        ("d", "unreadable", "image_unreadable", None, None),
        ("e", "missing", "image_missing", "nothing is there", None),
        ("f", "missing", "passing", "HTTP 503", "passing"),
        ("g", "refused", "image_refused", "too large", None),
    ],
    schema=dict.fromkeys(("item_id", "status", "reason", "detail", "error"), pl.String),
    orient="row",
)


def test_pictures_that_are_lost_for_good_are_listed_although_they_count_against_no_error_rate(store):
    made = store.tables.publish("images", PICTURES, {}).write_id
    found = failures(store, {"images": {"tables": {"images": {"write_id": made}}}})
    assert [(entry["row"], entry["class"], entry["detail"]) for entry in found] == [
        ("item_id=c", "image_refused", "too large"),
        ("item_id=d", "image_unreadable", ""),
        ("item_id=e", "image_missing", "nothing is there"),
        ("item_id=f", "passing", "HTTP 503"),
        ("item_id=g", "image_refused", "too large"),
    ]


def test_as_many_rows_are_counted_as_are_listed():
    rejects = pl.DataFrame({"n": [1], "reason": ["item_id is empty"]})  # of a dataset: nothing that was asked
    record = {"counts": {"errors": {}}, "failures": counted([PICTURES, rejects])}
    assert counts(record) == {"image_missing": 1, "image_refused": 2, "image_unreadable": 1, "passing": 1}
    assert summary(record) == "image_missing 1, image_refused 2, image_unreadable 1, passing 1"
    assert summary({"counts": {"errors": {}}, "failures": counted([rejects])}) == ""


def test_a_record_by_an_earlier_version_says_what_its_run_met():
    assert summary({"counts": {"errors": {"empty_reply": 1_200}}}) == "empty_reply 1,200"


def test_stage_and_class_narrow_the_list(store, stages):
    assert [f["row"] for f in failures(store, stages, stage="preference")] == ["user_id=u step=2"]
    assert [f["row"] for f in failures(store, stages, error_class="context_too_long")] == ["sha256=aa"]
    assert failures(store, stages, stage="sft") == []
    assert failures(store, {}) == []


def test_a_stage_the_environment_does_not_have_is_named(store, stages):
    with pytest.raises(UsageError, match=r"no stage `captions`; did you mean `caption`"):
        failures(store, stages, stage="captions")
