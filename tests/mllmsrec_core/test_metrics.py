"""Every figure is honest: ties, missing answers, intervals and slices."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mllmsrec_core import metrics

SCORES = st.lists(st.one_of(st.none(), st.integers(-3, 3).map(float)), min_size=2, max_size=8)


def frame(*lists: list[float | None], positive: int = 0) -> pl.DataFrame:
    """One list per user; the candidate at `positive` is the liked one."""
    rows = [
        {"user_id": f"u{user:04}", "target_seq": 9, "item_id": f"i{n}", "label": n == positive, "model": score}
        for user, scores in enumerate(lists)
        for n, score in enumerate(scores)
    ]
    return pl.DataFrame(rows, schema_overrides={"model": pl.Float64})


def values(candidates: pl.DataFrame, **options) -> dict[tuple[str, int], float]:
    found = metrics.evaluate(candidates, ["model"], n=20, **options).filter(pl.col("slice") == "all")
    return {(metric, k): value for metric, k, value in found.select("metric", "k", "value").iter_rows()}


def test_a_tie_of_three_worked_by_hand():
    # One negative above, the positive tied with two: it ranks 2, 3 or 4, each with chance 1/3. One negative below.
    found = values(frame([0.5, 0.9, 0.5, 0.5, 0.1]))
    assert found["hr", 1] == 0
    assert found["hr", 3] == found["recall", 3] == pytest.approx(2 / 3)
    assert found["hr", 5] == pytest.approx(1)
    assert found["mrr", 3] == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert found["mrr", 10] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert found["ndcg", 3] == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / 3)
    assert found["auc", 0] == found["auc_pooled", 0] == pytest.approx((1 + 2 / 2) / 4)


@given(st.integers(1, 25), st.one_of(st.none(), st.floats(-5, 5)))
@settings(max_examples=30, deadline=None)
def test_a_constant_scorer_has_auc_one_half_and_hit_rate_k_of_n(negatives, constant):
    found = values(frame(*[[constant] * (negatives + 1)] * 3, positive=negatives // 2))
    assert found["auc", 0] == found["auc_pooled", 0] == 0.5
    for k in metrics.KS:
        assert found["hr", k] == pytest.approx(min(1, k / (negatives + 1)), abs=1e-12)


def test_at_one_in_twenty_one_random_has_the_published_figures():
    found = values(frame([0.0] * 21))
    assert (round(found["hr", 5], 3), round(found["mrr", 5], 3), round(found["ndcg", 5], 3)) == (0.238, 0.109, 0.140)


def test_missing_answers_rank_last_tied_among_themselves():
    ranks = frame([None, 0.2, -1e9, None]).select(metrics.expected_rank(pl.col("model")))["model"].to_list()
    assert ranks == [3.5, 1.0, 2.0, 3.5]
    found = values(frame([None, 0.2, -1e9, None]))
    assert found["hr", 3] == pytest.approx(0.5)
    assert found["auc", 0] == pytest.approx(0.5 / 3)
    row = metrics.evaluate(frame([float("nan"), 0.2, -1e9, None]), ["model"], n=5).row(0, named=True)
    assert (row["missing_rate"], row["tie_rate"]) == (0.5, 1.0)


@given(st.lists(SCORES, min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_rows_changes_nothing(lists, random):
    candidates = frame(*lists)
    order = random.sample(range(len(candidates)), len(candidates))
    assert metrics.evaluate(candidates, ["model"], n=20).equals(metrics.evaluate(candidates[order], ["model"], n=20))


@given(st.lists(SCORES, min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_strictly_monotone_transformation_of_scores_changes_nothing(lists):
    candidates = frame(*lists)
    moved = candidates.with_columns((pl.col("model").exp() * 7 - 100).alias("model"))
    assert metrics.evaluate(candidates, ["model"], n=20).equals(metrics.evaluate(moved, ["model"], n=20))


@given(SCORES)
@settings(max_examples=60, deadline=None)
def test_expected_values_are_means_over_all_orders_of_the_tied(scores):
    found = values(frame(scores))
    mine = -math.inf if scores[0] is None else scores[0]
    others = [-math.inf if score is None else score for score in scores[1:]]
    above, tied = sum(o > mine for o in others), sum(o == mine for o in others)
    ranks = range(above + 1, above + tied + 2)
    for k in metrics.KS:
        assert found["hr", k] == pytest.approx(sum(r <= k for r in ranks) / len(ranks))
        assert found["mrr", k] == pytest.approx(sum(1 / r for r in ranks if r <= k) / len(ranks))
        assert found["ndcg", k] == pytest.approx(sum(1 / math.log2(r + 1) for r in ranks if r <= k) / len(ranks))


def test_without_ties_the_figures_are_those_of_ranx(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # compiling takes a minute, and nothing here is large
    from ranx import Qrels, Run
    from ranx import evaluate as oracle

    random = np.random.default_rng(5)
    candidates = frame(*random.permutation(40 * 21).reshape(40, 21).astype(float).tolist(), positive=4)
    users = candidates.partition_by("user_id", as_dict=True)
    truth = Qrels({str(user): dict.fromkeys(of.filter("label")["item_id"], 1) for (user,), of in users.items()})
    run = Run({str(user): dict(of.select("item_id", "model").rows()) for (user,), of in users.items()})
    names = {"hr": "hit_rate", "recall": "recall", "ndcg": "ndcg", "mrr": "mrr"}
    wanted = {(ours, k): f"{theirs}@{k}" for ours, theirs in names.items() for k in metrics.KS}
    known = oracle(truth, run, list(wanted.values()))
    found = values(candidates)
    assert {name: found[name] for name in wanted} == pytest.approx({name: known[wanted[name]] for name in wanted})


@given(st.lists(SCORES, min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_pooled_auc_is_that_of_scikit_learn(lists):
    candidates = frame(*lists).with_columns(metrics.strength(pl.col("model")).clip(-99))
    labels, scores = candidates["label"].to_numpy(), candidates["model"].to_numpy()
    assert metrics.pooled_auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))


def skilled(users: int, skill: float, seed: int = 0) -> pl.DataFrame:
    scores = np.random.default_rng(seed).normal(size=(users, 21))
    scores[:, 0] += skill
    return frame(*scores.tolist())


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # The chance that a positive at +1 beats a negative: Phi(1 / sqrt 2).
    truth, inside = 0.5 * (1 + math.erf(0.5)), {"auc": 0, "auc_pooled": 0}
    for seed in range(60):
        rows = metrics.evaluate(skilled(60, 1.0, seed), ["model"], n=200, ks=[5]).filter(
            pl.col("metric").is_in(["auc", "auc_pooled"])
        )
        for row in rows.rows(named=True):
            inside[row["metric"]] += row["low"] <= truth <= row["high"]
    assert all(50 <= count for count in inside.values())  # of 60; 95 % would be 57


def test_the_pooled_interval_is_that_of_really_resampled_users():
    candidates = skilled(80, 0.7).sort("user_id")
    row = (
        metrics.evaluate(candidates, ["model"], n=4000, ks=[1])
        .filter(pl.col("metric") == "auc_pooled")
        .row(0, named=True)
    )
    random = np.random.default_rng(1)
    labels, scores = (candidates[c].to_numpy().reshape(80, 21) for c in ("label", "model"))
    drawn = [random.integers(0, 80, 80) for _ in range(2000)]
    real = [metrics.pooled_auc(labels[users].ravel(), scores[users].ravel()) for users in drawn]
    assert [row["low"], row["high"]] == pytest.approx(list(np.quantile(real, [0.025, 0.975])), abs=0.008)


def test_the_same_seed_gives_the_same_interval_and_more_users_a_narrower_one():
    few, many = (metrics.evaluate(skilled(n, 0.5), ["model"], n=200).row(0, named=True) for n in (30, 3000))
    assert metrics.evaluate(skilled(30, 0.5), ["model"], n=200).row(0, named=True) == few
    assert many["high"] - many["low"] < 0.3 * (few["high"] - few["low"])


def test_slices_hold_their_own_users_and_empty_ones_have_no_rows():
    candidates = frame([1.0, 0.0], [0.0, 1.0], [1.0, 0.0])
    cuts = metrics.slices(np.array([2, 7, 30]), np.array([0, 9, 9]))
    found = metrics.evaluate(candidates, ["model"], cuts, ks=[1], n=20).filter(pl.col("metric") == "hr")
    shown = {row["slice"]: (row["value"], row["n_users"]) for row in found.rows(named=True)}
    assert shown == {
        "all": (pytest.approx(2 / 3), 3),
        "cold items": (1, 1),
        "warm items": (0.5, 2),
        "cold users": (1, 1),
        "history 5-9": (0, 1),
        "history 20+": (1, 1),
    }


def test_users_are_resampled_whole_where_they_have_several_targets():
    candidates = skilled(40, 0.5)
    twice = pl.concat([candidates, candidates.with_columns(target_seq=pl.lit(10, pl.Int64))])
    once, both = (metrics.evaluate(of, ["model"], n=100).filter(pl.col("metric") == "hr") for of in (candidates, twice))
    assert both.select("value", "low", "high", "n_users").equals(once.select("value", "low", "high", "n_users"))


def test_a_paired_difference_of_a_scorer_with_itself_is_nothing():
    same = metrics.paired(skilled(20, 1.0).with_columns(other="model"), "model", "other", n=50)
    assert set(same["difference"]) == set(same["low"]) == set(same["high"]) == {0.0}
    assert same["effect"].null_count() == len(same)


def test_a_paired_difference_is_narrower_than_the_two_intervals_apart():
    candidates = skilled(300, 0.5)
    better = candidates.with_columns(better=pl.col("model") + 0.4 * pl.col("label"))
    row = metrics.paired(better, "better", "model", n=300).filter(pl.col("metric") == "auc").row(0, named=True)
    alone = metrics.evaluate(better, ["model"], n=300).filter(pl.col("metric") == "auc").row(0, named=True)
    assert 0 < row["low"] < row["difference"] < row["high"]
    assert row["high"] - row["low"] < alone["high"] - alone["low"]
    assert row["effect"] > 0.5


def test_no_candidates_give_no_figures():
    assert metrics.evaluate(frame().select([]), ["model"]).is_empty()


def test_a_list_without_negatives_has_no_auc():
    assert values(frame([0.3]))["auc", 0] is None


def test_calibration_turns_overconfident_logits_into_frequencies():
    random = np.random.default_rng(0)
    logits = random.normal(0, 4, 4000)
    labels = random.random(4000) < 1 / (1 + np.exp(-(logits / 4 - 1)))
    p = metrics.calibrated(pl.Series([4.0, None]), pl.Series(logits), pl.Series(labels))
    assert p[0] == pytest.approx(0.5, abs=0.05)
    assert p[1] is None


@pytest.mark.parametrize(("logits", "labels"), [([1.0, 2.0], [True, True]), ([1.0, 1.0], [True, False]), ([], [])])
def test_what_cannot_be_calibrated_is_null(logits, labels):
    valid = pl.Series(logits, dtype=pl.Float64), pl.Series(labels, dtype=pl.Boolean)
    assert metrics.calibrated(pl.Series([0.5]), *valid).to_list() == [None]


def test_the_best_are_in_order_of_score_and_ties_in_that_of_item():
    scored = pl.DataFrame({"user_id": "u", "item_id": ["c", "b", "a", "d"], "score": [1.0, 1.0, 0.0, None]})
    assert metrics.top(scored, 2).rows() == [("u", 1, "b", 1.0), ("u", 2, "c", 1.0)]
