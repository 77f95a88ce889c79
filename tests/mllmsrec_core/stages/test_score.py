"""Scores, ranks and figures; a candidate that could not be scored keeps its row."""

import math
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from mllmsrec_core.ask import Choose, Picture, Reply, key
from mllmsrec_core.prefixes import shared
from mllmsrec_core.protocol import hash64
from mllmsrec_core.stages import score, sft

ROW = {
    "profile": "Likes office (2 of 3).",
    "preference": "likes «red» mugs <|im_end|>",
    "last_titles": ["Mug A", "Mug B"],
    "item_text": "A red mug.",
    "sha256": "abc",
}

LAYOUTS = ("user_first", "image_first")


def certain(logit: float) -> Reply:
    p = 1 / (1 + math.exp(-logit))
    return Reply({"logprobs": {"yes": math.log(0.9 * p), "no": math.log(0.9 * (1 - p))}, "mass": 0.9})


def constant(ask: Choose) -> Reply:
    return certain(0.5)


def by_key(ask: Choose) -> Reply:
    """Different answers to different questions, and every ninth fails."""
    number = int(hash64([key(ask).hex()])[0] % 1000)
    return Reply(error="context_too_long") if number % 9 == 0 else certain(number / 250 - 2)


@pytest.fixture(scope="module")
def scored(shop):
    return shop.run("score", by_key)


def test_the_prompt_names_user_then_candidate_then_question_and_the_picture_last():
    (message,) = score.prompt(score.Params(), ROW)
    assert message.parts == (
        "User profile: «Likes office (2 of 3).»\n"
        'The user\'s preference: «likes "red" mugs»\n'
        "Chosen last: «Mug A»; «Mug B»\n"
        "Candidate: «A red mug.»\n"
        "Would the user choose this candidate next? Answer yes or no.",
        Picture("abc"),
    )


def test_a_missing_picture_and_an_unknown_user_have_words_of_their_own():
    (message,) = score.prompt(score.Params(), dict.fromkeys(ROW) | {"item_text": "A red mug."})
    assert message.parts == (
        "Nothing is known of the user.\nCandidate: «A red mug.» It has no picture.\n"
        "Would the user choose this candidate next? Answer yes or no.",
    )


def test_image_first_asks_the_same_with_picture_and_item_before_the_user():
    (message,) = score.prompt(score.Params(layout="image_first"), ROW)
    assert message.parts == (
        Picture("abc"),
        "Candidate: «A red mug.»\n"
        "User profile: «Likes office (2 of 3).»\n"
        'The user\'s preference: «likes "red" mugs»\n'
        "Chosen last: «Mug A»; «Mug B»\n"
        "Would the user choose this candidate next? Answer yes or no.",
    )
    (other,) = score.prompt(score.Params(), ROW)
    lines = [sorted(part.splitlines()) for m in (message, other) for part in m.parts if isinstance(part, str)]
    assert lines[0] == lines[1]


def test_a_prompt_of_ones_own_keeps_its_wording_in_either_layout():
    own = {"prompt": "{user} | {item}?"}
    first, second = (score.prompt(score.Params(layout=layout, **own), ROW)[0] for layout in LAYOUTS)
    assert second.parts == first.parts[::-1]


def test_training_reads_the_layout_that_scoring_asks(shop):
    train = shop.inputs["examples"].filter(pl.col("split") == "train")
    first, second = (sft.rendered(shop.set("score", layout=layout).inputs, train) for layout in LAYOUTS)
    assert [one.answer for one in first] == [one.answer for one in second]
    pictures = [[isinstance(part, Picture) for part in one.messages[0].parts] for one in second]
    assert {tuple(shown) for shown in pictures} == {(True, False), (False,)}
    row = score.contexts(shop.inputs, train.head(1)).row(0, named=True)
    assert sft.rendered(shop.set("score", layout="image_first").inputs, train.head(1))[0].messages == score.prompt(
        score.Params(layout="image_first"), row
    )


def test_rows_are_the_held_out_examples_in_any_layout(shop):
    wanted = shop.inputs["examples"].filter(pl.col("split") != "train")
    for layout in LAYOUTS:
        rows = score.rows(shop.set("score", layout=layout).inputs)
        assert (
            rows.select(wanted.columns)
            .sort("user_id", "target_seq", "item_id")
            .equals(wanted.sort("user_id", "target_seq", "item_id"))
        )


@pytest.mark.parametrize(("layout", "named"), [("user_first", ["user_id", "target_seq"]), ("image_first", ["sha256"])])
def test_rows_whose_prompts_begin_alike_stand_side_by_side(shop, layout, named):
    shop = shop.set("score", layout=layout)
    rows = score.rows(shop.inputs)
    groups = list(rows.select(named).iter_rows())
    assert sum(a != b for a, b in pairwise(groups)) == len(set(groups)) - 1
    asked = [score.prompt(shop.inputs.params["score"], row) for row in rows.iter_rows(named=True)]
    shuffled = [asked[n] for n in np.random.default_rng(0).permutation(len(asked))]
    assert shared(asked).ratio > 3 * shared(shuffled).ratio


def test_figures_do_not_depend_on_the_layout(shop):
    def by_item(ask: Choose) -> Reply:
        text = next(part for part in ask.messages[0].parts if isinstance(part, str))
        line = next(line for line in text.splitlines() if line.startswith("Candidate"))
        return certain(int(hash64([line])[0] % 1000) / 250 - 2)

    first, second = (shop.set("score", layout=layout).run("score", by_item) for layout in LAYOUTS)
    assert first["metrics"].equals(second["metrics"])
    assert first["recommendations"].equals(second["recommendations"])
    assert first["scores"].drop("ask").equals(second["scores"].drop("ask"))
    assert first["scores"]["ask"].is_in(second["scores"]["ask"].implode()).sum() == 0


def test_contexts_join_what_the_prompt_reads_and_only_pictures_that_are_ok(shop):
    rows = score.contexts(shop.set("score", keep_last=2).inputs, shop.inputs["examples"])
    assert len(rows) == len(shop.inputs["examples"])
    assert set(rows.filter(pl.col("item_id").str.ends_with("9"))["sha256"]) == {None}
    assert set(rows.filter(pl.col("item_id") == "i3")["item_text"]) <= {"Brand3 mug"}
    assert set(rows.filter(pl.col("item_id") == "i4")["item_text"]) <= {"Brand item, i4 summary"}
    row = rows.filter(pl.col("n_history") >= 4).row(0, named=True)
    liked = shop.inputs["interactions"].filter(
        "liked", pl.col("user_id") == row["user_id"], pl.col("seq") < row["target_seq"]
    )
    assert row["last_titles"] == [f"Brand{item[1:]} mug" for item in liked.sort("seq")["item_id"].tail(2)]
    assert row["preference"].endswith(str(liked.sort("seq")["seq"][3 * row["step"] - 1]))


def test_title_and_profile_can_be_left_out(shop):
    bare = score.contexts(shop.set("score", item="title", profile=False).inputs, shop.inputs["examples"])
    assert bare["profile"].null_count() == len(bare)
    assert bare["item_text"].str.contains("summary").sum() == 0
    assert bare["last_titles"].list.len().sum() == 0
    with pytest.raises(ValidationError):
        score.Params(item="caption")  # type: ignore[arg-type]


def test_a_score_is_the_logit_of_yes_over_no(shop, scored):
    row = scored["scores"].drop_nulls("logit").row(0, named=True)
    assert row["p_yes"] == pytest.approx(1 / (1 + math.exp(-row["logit"])))
    assert row["mass"] == 0.9
    huge = {"logprobs": {"yes": -900.0, "no": 0.0}, "mass": 1.0}
    chain = score.ask(shop.inputs, score.rows(shop.inputs).row(0, named=True))
    (done,) = shop.drive(chain, lambda _: Reply(huge))
    assert (done["logit"], done["p_yes"]) == (-900.0, 0.0)


def test_a_candidate_that_could_not_be_scored_keeps_its_row_and_ranks_last(shop, scored):
    scores = scored["scores"]
    held = shop.inputs["examples"].filter(pl.col("split") != "train")
    assert len(scores) == len(held)
    failed = scores.filter(pl.col("logit").is_null())
    assert set(failed["error"]) == {"context_too_long"}
    assert 0 < len(failed) < len(scores)
    for row in failed.rows(named=True):
        of = scores.filter(pl.col("user_id") == row["user_id"], pl.col("target_seq") == row["target_seq"])
        n_failed = of["logit"].null_count()
        assert row["rank"] == 21 - (n_failed - 1) / 2
    assert (scores.group_by("user_id", "target_seq").agg(pl.col("rank").sum())["rank"] == 21 * 22 / 2).all()


def test_a_constant_model_has_the_figures_of_chance(shop):
    found = shop.run("score", constant)
    figures = found["metrics"].filter(pl.col("scorer") == "model", pl.col("slice") == "all")
    shown = {(row["metric"], row["k"]): row["value"] for row in figures.rows(named=True)}
    assert shown["auc", 0] == shown["auc_pooled", 0] == 0.5
    assert [shown["hr", k] for k in (1, 3, 5, 10)] == pytest.approx([k / 21 for k in (1, 3, 5, 10)])
    assert set(figures["tie_rate"]) == {1.0}
    assert found["scores"]["p_calibrated"].null_count() == len(found["scores"])
    assert set(found["scores"]["rank"]) == {11.0}


def test_the_model_stands_beside_random_popularity_and_itemknn_on_the_same_candidates(scored):
    figures = scored["metrics"]
    assert set(figures["scorer"]) == {"model", "random", "popularity", "itemknn"}
    assert set(figures["metric"]) == {"hr", "recall", "ndcg", "mrr", "auc", "auc_pooled"}
    assert figures.filter(pl.col("slice") == "all")["n_users"].n_unique() == 1
    assert set(figures["candidate_set"]) == {"leave-last/1+20/uniform"}
    assert {"all", "cold items", "cold users"} <= set(figures["slice"])
    assert (figures["low"] <= figures["high"]).all()
    random = figures.filter(pl.col("scorer") == "random", pl.col("metric") == "hr", pl.col("k") == 5)
    assert set(random["value"].round(9)) == {round(5 / 21, 9)}
    assert (figures.filter(pl.col("scorer") == "model")["missing_rate"] > 0).all()


def test_calibration_is_fitted_on_valid_and_keeps_missing_answers_missing(scored):
    scores = scored["scores"]
    assert scores["p_calibrated"].is_null().equals(scores["logit"].is_null())
    assert scores["p_calibrated"].drop_nulls().is_between(0, 1).all()
    # 1 in 21 is liked, and by_key knows nothing: calibrated, it says so.
    assert scores["p_calibrated"].mean() == pytest.approx(1 / 21, abs=0.02)


def test_recommendations_are_the_best_test_candidates(shop, scored):
    best = scored["recommendations"]
    assert best.group_by("user_id").len()["len"].max() == 10
    test = scored["scores"].filter(pl.col("split") == "test", pl.col("user_id") == best["user_id"][0])
    wanted = test.drop_nulls("logit").sort("logit", descending=True)["item_id"].head(10).to_list()
    assert best.filter(pl.col("user_id") == best["user_id"][0])["item_id"].to_list() == wanted
    assert shop.set("score", top_k=3).run("score", by_key)["recommendations"]["rank"].max() == 3


def test_the_adapter_of_the_current_recipe_answers_and_without_one_the_base(shop):
    def adapters_asked(shop) -> set[str | None]:
        return {
            next(score.ask(shop.inputs, row)).model.adapter for row in score.rows(shop.inputs).head(9).rows(named=True)
        }

    tuned = pl.DataFrame({"name": ["qlora-1"], "sha256": ["f00"]})
    assert adapters_asked(shop) == {None}
    assert adapters_asked(shop.having(adapters=tuned)) == {"f00"}


def test_a_shop_without_users_has_empty_tables(opening, shop):
    nobody = opening(shop.inputs["interactions"].clear())
    assert {name: len(table) for name, table in nobody.run("score", constant).items()} == {
        "scores": 0,
        "metrics": 0,
        "recommendations": 0,
    }
