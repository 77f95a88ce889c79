"""What is asked of whom: no example knows its own target or anything later."""

from datetime import date

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mllmsrec_core.stages import score
from mllmsrec_core.stages.examples import Params


def test_valid_and_test_lists_hold_twenty_negatives_and_train_lists_one(shop):
    sizes = shop.inputs["examples"].group_by("user_id", "split", "target_seq").agg(pl.len(), pl.col("label").sum())
    assert set(sizes.filter(pl.col("split") == "train")["len"]) == {2}
    assert set(sizes.filter(pl.col("split") != "train")["len"]) == {21}
    assert set(sizes["label"]) == {1}


def test_the_candidate_set_says_protocol_size_and_sampling_rule(shop):
    named = dict(shop.inputs["examples"].group_by("split").agg(pl.col("candidate_set").unique().first()).rows())
    assert named == {
        "train": "leave-last/1+1/uniform",
        "valid": "leave-last/1+20/uniform",
        "test": "leave-last/1+20/uniform",
    }


def test_a_list_the_catalogue_cut_short_says_so(shop):
    found = shop.set("examples", n_negatives=39, negatives="popularity").run("examples")["examples"]
    some = found.filter(pl.col("split") == "test").row(0, named=True)
    touched = shop.inputs["interactions"].filter(pl.col("user_id") == some["user_id"])["item_id"].n_unique()
    assert some["candidate_set"] == f"leave-last/1+{40 - touched} of 39/popularity"


def test_an_example_reads_the_last_preference_step_that_ends_before_its_target(shop):
    found = shop.inputs["examples"]
    upto = shop.inputs["preferences"].select("user_id", "step", "upto_seq")
    for row in found.unique(["user_id", "target_seq"]).rows(named=True):
        usable = upto.filter(pl.col("user_id") == row["user_id"], pl.col("upto_seq") < row["target_seq"])["step"]
        assert row["step"] == (usable.max() if len(usable) else None)
    assert found["step"].null_count() < len(found)


def test_a_global_time_split_needs_its_two_dates_in_order(shop):
    with pytest.raises(ValidationError, match=r"examples\.valid_from"):
        Params(split="global-time")
    found = shop.set("examples", split="global-time", valid_from=date(2024, 1, 10), test_from=date(2024, 1, 16))
    held = found.run("examples")["examples"].filter(pl.col("split") == "test")
    assert held["target_seq"].min() == 5  # day 16 is the sixth interaction, three days apart


def test_it_holds_no_prompt_text(shop):
    text = shop.inputs["examples"].select(pl.selectors.string()).columns
    assert set(text) == {"user_id", "item_id", "candidate_set"}


# Whatever happens at or after a target: another item, liked or not, or nothing at all.
later = st.lists(st.tuples(st.integers(0, 39), st.booleans()), max_size=4)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_no_example_sees_its_own_target_or_later(shop, opening, data):
    example = data.draw(st.sampled_from(shop.inputs["examples"].filter("label").rows(named=True)))
    user, seq = example["user_id"], example["target_seq"]
    before = shop.inputs["interactions"].with_columns(rating=pl.lit(None, pl.Float64))
    future = [
        (user, seq + n, f"i{item}", before["at"][0], None, liked) for n, (item, liked) in enumerate(data.draw(later))
    ]
    past = before.filter((pl.col("user_id") != user) | (pl.col("seq") < seq))
    rewritten = pl.concat([past, pl.DataFrame(future, schema=before.schema, orient="row")])
    wanted = pl.DataFrame([example], schema=shop.inputs["examples"].schema)
    told, blind = (
        score.contexts(opening(known).set("score", keep_last=3).inputs, wanted).row(0, named=True)
        for known in (before, rewritten)
    )
    assert told == blind
    assert told["preference"] is not None or told["n_history"] < 3
    assert told["history_seq"] < seq
    steps = rewritten.filter("liked", pl.col("user_id") == user, pl.col("seq") < seq)
    assert (told["step"] or 0) == len(steps) // 3
