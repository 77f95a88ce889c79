"""What is asked of whom: no example knows its own target or anything later."""

from datetime import date

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flows.settings import load
from mllmsrec_core.errors import UsageError
from mllmsrec_core.stages import ingest, score
from mllmsrec_core.stages.examples import STAGE, Params


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


def test_sliding_windows_need_their_first_day_and_shares_come_to_one():
    with pytest.raises(ValidationError, match=r"examples\.valid_from"):
        Params(split="sliding")
    with pytest.raises(ValidationError, match=r"examples\.shares come to 1\.1"):
        Params(split="user", shares=(0.8, 0.1, 0.2))


@pytest.mark.parametrize("split", ["user", "sliding"])
def test_every_split_names_itself_in_the_candidate_set(shop, split):
    found = shop.set("examples", split=split, valid_from=date(2024, 1, 10)).run("examples")["examples"]
    assert {name.split("/")[0] for name in found["candidate_set"]} == {split}
    if split == "user":
        assert found.group_by("user_id").agg(pl.col("split").n_unique())["split"].max() == 1


def test_candidates_from_the_whole_catalogue_are_all_items_the_user_never_touched(shop):
    found = shop.set("examples", n_negatives="all").run("examples")["examples"].filter(pl.col("split") == "test")
    assert set(found["candidate_set"]) == {"leave-last/all of 40"}
    for (user,), of in found.filter(~pl.col("label")).group_by("user_id"):
        touched = set(shop.inputs["interactions"].filter(pl.col("user_id") == user)["item_id"])
        assert set(of["item_id"]) == set(shop.inputs["items"]["item_id"]) - touched


def test_a_catalogue_too_large_to_ask_about_says_what_it_would_cost(shop):
    held = shop.inputs["examples"].filter("label", pl.col("split") != "train").height
    with pytest.raises(UsageError, match=rf"up to {held * 40:,} candidates .*examples\.max_all={held * 40}"):
        shop.set("examples", n_negatives="all", max_all=100).run("examples")
    allowed = shop.set("examples", n_negatives="all", max_all=held * 40).run("examples")["examples"]
    assert held * 40 >= allowed.filter(pl.col("split") != "train").height > 100


def test_what_a_rule_of_ingest_holds_back_was_touched_and_is_no_negative(shop):
    before = shop.inputs["interactions"]
    waiting = pl.DataFrame(
        [("u0", 99, f"i{n}", before["at"][0], None, True) for n in range(30)], schema=before.schema, orient="row"
    )
    found = shop.having(waiting=waiting).run("examples")["examples"]
    mine = found.filter(pl.col("user_id") == "u0", ~pl.col("label"))
    assert mine.height and not set(mine["item_id"]) & set(waiting["item_id"])
    others = pl.col("user_id") != "u0"
    assert found.filter(others).equals(shop.inputs["examples"].filter(others))


def test_the_first_code_bases_construction_is_named_and_draws_from_items_with_interactions(shop):
    some = shop.inputs["interactions"].filter(pl.col("item_id").str.ends_with("5").not_())
    params = {"split": "user", "shares": (0.3, 0.3, 0.4), "compat": "mllm_msr"}
    found = shop.having(interactions=some).set("examples", **params).run("examples")["examples"]
    assert all(name.startswith("compat.mllm_msr/user/1+") for name in found["candidate_set"])
    assert set(found["item_id"]) <= set(some["item_id"])


def test_negatives_come_from_items_with_interactions_where_that_is_asked_for_and_the_set_says_so(shop):
    some = shop.inputs["interactions"].filter(pl.col("item_id").str.ends_with("5").not_())
    left = some["item_id"].n_unique()
    assert left < shop.inputs["items"].height
    for n, named in ((3, "leave-last/1+3/uniform"), ("all", f"leave-last/all of {left}")):
        found = (
            shop.having(interactions=some).set("examples", n_negatives=n, among="touched").run("examples")["examples"]
        )
        assert set(found["item_id"]) <= set(some["item_id"])
        assert set(found.filter(pl.col("split") == "test")["candidate_set"]) == {f"{named} touched"}
    whole = shop.having(interactions=some).set("examples", n_negatives="all").run("examples")["examples"]
    assert set(whole["item_id"]) > set(some["item_id"]), (
        "else an item that nobody touched is a candidate like any other"
    )


@pytest.mark.parametrize(
    ("k_core", "among", "said"),
    [
        ((0, 0), "catalogue", ""),
        ((1, 1), "catalogue", ""),  # no condition at all
        ((5, 0), "catalogue", " also outside k_core"),
        ((0, 5), "catalogue", " also outside k_core"),
        ((7, 5), "touched", " touched"),
    ],
)
def test_a_set_says_where_items_outside_the_core_can_be_negatives(shop, k_core, among, said):
    drawn_from = shop.inputs["interactions" if among == "touched" else "items"]["item_id"].n_unique()
    for n, named in ((3, "leave-last/1+3/uniform"), ("all", f"leave-last/all of {drawn_from}")):
        pruned = shop.set("examples", n_negatives=n, among=among)
        pruned.inputs.params["ingest"] = ingest.Params(k_core=k_core)
        found = pruned.run("examples")["examples"].filter(pl.col("split") == "test")
        assert set(found["candidate_set"]) == {named + said}


def test_another_core_makes_the_stage_due_as_its_sets_may_have_another_name():
    assert "ingest.k_core" in STAGE.needs


def test_the_profile_with_the_papers_protocol_draws_negatives_from_the_core_as_they_do():
    assert load(["mllm_msr"], [], {}).params.examples.among == "touched"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("histories", "label"), [("none", "mllm_msr"), ("mllm_msr", "none")])
def test_a_label_without_the_histories_it_names_is_refused_and_so_are_they_without_it(shop, histories, label):
    def run(histories, label):
        labelled = shop.set("examples", compat=label)
        labelled.inputs.params["ingest"] = ingest.Params(compat=histories)
        return labelled.run("examples")["examples"]

    with pytest.raises(UsageError, match=r"set both"):
        run(histories, label)
    assert run(label, label).height


def test_it_holds_no_prompt_text(shop):
    text = shop.inputs["examples"].select(pl.selectors.string()).columns
    assert set(text) == {"user_id", "item_id", "candidate_set"}


# Whatever happens at or after a target: another item, liked or not, or nothing at all.
later = st.lists(st.tuples(st.integers(0, 39), st.booleans()), max_size=4)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"split": "user", "shares": (0.4, 0.3, 0.3)},
        {"split": "sliding", "valid_from": date(2024, 1, 12), "windows": 2, "window_days": 6},
        {"split": "global-time", "valid_from": date(2024, 1, 12), "test_from": date(2024, 1, 16)},
    ],
    ids=lambda params: params.get("split", "leave-last"),
)
def test_whatever_the_split_nothing_an_example_reads_is_later_than_its_target(shop, params):
    found = shop.set("examples", min_history=1, **params).run("examples")["examples"]
    upto = shop.inputs["preferences"].select("user_id", "step", "upto_seq")
    read = found.join(upto, on=("user_id", "step"), how="left")
    assert (read["upto_seq"].drop_nulls() < read.drop_nulls("upto_seq")["target_seq"]).all()
    assert (found["history_seq"] < found["target_seq"]).all()
    if valid_from := params.get("valid_from"):
        seqs = shop.inputs["interactions"].select("user_id", "at", target_seq="seq")
        days = found.join(seqs, on=("user_id", "target_seq")).with_columns(pl.col("at").dt.date())
        early = pl.col("at") < valid_from
        assert set(days["split"]) == {"train", "valid", "test"}
        assert days.filter(early)["split"].unique().to_list() == ["train"]
        assert "train" not in days.filter(~early)["split"]


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
