"""Training sees exactly what scoring will ask."""

import json

import polars as pl
import pytest

from mllmsrec_core.ask import Example, Model, Reply, Train, key
from mllmsrec_core.recipe import Recipe
from mllmsrec_core.stages import score, sft


def trained(ask: Train) -> Reply:
    return Reply({"sha256": "f00", "curves": [{"step": 1, "loss": 0.7}]})


def question(shop) -> Train:
    (row,) = sft.rows(shop.inputs).rows(named=True)
    return next(sft.ask(shop.inputs, row))


def test_training_and_scoring_render_the_same_messages_for_the_same_row(shop):
    asked = {}
    for row in score.rows(shop.inputs).rows(named=True):
        choose = next(score.ask(shop.inputs, row))
        asked[row["user_id"], row["target_seq"], row["item_id"]] = choose.messages
    held = shop.inputs["examples"].filter(pl.col("split") != "train")
    for row, example in zip(held.rows(named=True), sft.rendered(shop.inputs, held), strict=True):
        assert example.messages == asked[row["user_id"], row["target_seq"], row["item_id"]]
        assert example.answer == ("yes" if row["label"] else "no")


def test_it_asks_one_train_question_of_train_examples_alone(shop):
    train = question(shop)
    wanted = sft.rendered(shop.inputs, shop.inputs["examples"].filter(pl.col("split") == "train"))
    assert len(train.examples) == len(wanted)
    assert set(train.examples) == set(wanted)
    answers = [example.answer for example in train.examples]
    assert answers.count("yes") == answers.count("no")


def test_validation_is_one_to_one_and_from_valid(shop):
    chosen = sft.validation(shop.inputs)
    assert set(chosen["split"]) == {"valid"}
    assert chosen["label"].mean() == 0.5
    assert len(chosen) == 2 * shop.inputs["examples"].filter(pl.col("split") == "valid")["user_id"].n_unique()


def test_the_recipe_is_one_the_engine_reads_and_holds_every_setting(shop):
    recipe = Recipe.from_json(question(shop.set("sft", rank=8, lr=2e-4)).recipe)
    assert (recipe.strategy, recipe.rank, recipe.lr, recipe.alpha) == ("qlora", 8, 2e-4, 64)
    unread = {"model", "max_error_rate", "max_examples"}  # who answers, when to stop, which examples
    stated = set(sft.Params.model_fields) - unread
    assert stated <= set(json.loads(question(shop).recipe))


def test_pictures_are_trained_at_the_size_at_which_they_are_scored(shop):
    assert question(shop.set("score", max_pixels=99)).model == Model("tiny", "r1", max_pixels=99)


def test_another_prompt_example_or_recipe_is_another_question_and_row_order_is_none(shop):
    base = question(shop)
    same = question(shop.having(examples=shop.inputs["examples"].reverse(), items=shop.inputs["items"].reverse()))
    assert key(same) == key(base)
    fewer = shop.having(examples=shop.inputs["examples"].filter(pl.col("user_id") != "u1"))
    others = [shop.set("score", prompt="{user} {item}?"), fewer, shop.set("sft", epochs=3), shop.set("sft", seed=1)]
    assert len({key(base), *(key(question(other)) for other in others)}) == 5


def test_the_digest_tells_train_from_validation_and_yes_from_no():
    one, two = Example((), "yes"), Example((), "no")
    assert (
        len({sft.digest([one], [two]), sft.digest([two], [one]), sft.digest([one, two], []), sft.digest([], [])}) == 4
    )


@pytest.mark.parametrize("limit", [2, 7])
def test_a_limit_takes_examples_by_hash_with_positive_and_negative_together(shop, limit):
    chosen = sft.examples(shop.set("sft", max_examples=limit).inputs)
    assert len(chosen) == limit
    assert chosen.equals(sft.examples(shop.inputs).head(limit))
    first = chosen.head(2)
    assert first["label"].sum() == 1
    assert first.select("user_id", "target_seq").n_unique() == 1


def test_the_adapters_table_says_what_was_trained_on_what(shop):
    (row,) = shop.run("sft", trained)["adapters"].rows(named=True)
    ask = question(shop)
    assert row["name"] == f"qlora-{key(ask).hex()[:12]}"
    assert (row["sha256"], row["train_digest"], row["ask"]) == ("f00", ask.digest, key(ask))
    assert (row["n_examples"], row["base_model"], row["error"]) == (len(ask.examples), "tiny@r1", None)
    assert json.loads(row["curves"]) == [{"step": 1, "loss": 0.7}]


def test_a_failed_training_is_a_row_with_its_error(shop):
    (row,) = shop.run("sft", lambda _: Reply(error="context_too_long"))["adapters"].rows(named=True)
    assert (row["sha256"], row["curves"], row["error"]) == (None, None, "context_too_long")


def test_without_a_strategy_nothing_is_asked_and_the_table_is_empty(shop):
    untuned = shop.set("sft", strategy="none")
    assert sft.rows(untuned.inputs).is_empty()
    assert untuned.run("sft", trained)["adapters"].is_empty()
