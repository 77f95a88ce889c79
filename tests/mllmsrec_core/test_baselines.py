"""Baselines know training interactions only, and score the same candidates."""

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from mllmsrec_core import baselines, metrics, protocol

ITEMS = pl.Series("item_id", [f"i{n}" for n in range(30)])


def clicks(users: int = 40, seed: int = 0) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    rows = [
        (f"u{user}", seq, f"i{item}", bool(random.random() < 0.8), datetime(2024, 1, 1 + seq, tzinfo=UTC))
        for user in range(users)
        for seq, item in enumerate(random.permutation(30)[: random.integers(4, 9)].tolist())
    ]
    return pl.DataFrame(rows, schema=["user_id", "seq", "item_id", "liked", "at"], orient="row").cast({"seq": pl.Int32})


@pytest.fixture(scope="module")
def shop():
    interactions = clicks()
    targets = protocol.targets(interactions, ITEMS)
    candidates = protocol.candidates(targets.filter(pl.col("split") == "test"), interactions, ITEMS, 10)
    return interactions, protocol.training(interactions, targets), candidates


def test_random_scores_what_random_orders_score_on_average(shop):
    _, _, candidates = shop
    found = metrics.evaluate(candidates.with_columns(random=pl.Series(baselines.random(candidates))), ["random"], n=10)
    shown = {(metric, k): value for metric, k, value in found.select("metric", "k", "value").iter_rows()}
    assert shown["auc", 0] == 0.5
    assert shown["hr", 5] == pytest.approx(5 / 11)


def test_popularity_counts_training_likes_and_no_held_out_target(shop):
    interactions, training, candidates = shop
    counts = dict(training.filter("liked")["item_id"].value_counts().rows())
    assert baselines.popularity(candidates, training).tolist() == [counts.get(i, 0) for i in candidates["item_id"]]
    assert sum(counts.values()) < interactions["liked"].sum()


def test_similarity_is_the_cosine_between_sets_of_likers(shop):
    _, training, _ = shop
    liked = training.filter("liked")
    users = liked["user_id"].unique().sort()
    seen = np.zeros((len(users), len(ITEMS)))
    seen[protocol.codes(liked["user_id"], users), protocol.codes(liked["item_id"], ITEMS)] = 1
    wanted = cosine_similarity(seen.T)
    np.fill_diagonal(wanted, 0)
    assert baselines.similarity(training, ITEMS).toarray() == pytest.approx(wanted)


def test_itemknn_sums_the_similarity_of_the_candidate_to_each_like_before_the_target(shop, monkeypatch):
    interactions, training, candidates = shop
    near = baselines.similarity(training, ITEMS).toarray()
    wanted = []
    for row in candidates.rows(named=True):
        before = interactions.filter("liked", pl.col("user_id") == row["user_id"], pl.col("seq") < row["target_seq"])
        read = protocol.codes(before["item_id"], ITEMS)
        wanted.append(near[read, ITEMS.to_list().index(row["item_id"])].sum())
    assert baselines.itemknn(candidates, interactions, training) == pytest.approx(wanted, abs=1e-8)
    monkeypatch.setattr(baselines, "CHUNK", 3)  # chunks are a matter of memory only
    assert baselines.itemknn(candidates, interactions, training) == pytest.approx(wanted, abs=1e-8)


def test_itemknn_finds_the_planted_companion_and_does_not_care_for_row_order():
    pairs = [
        (f"u{n}", seq, item, True)
        for n in range(9)
        for seq, item in enumerate(("tea", "cup") if n % 2 else ("bat", "ball"))
    ]
    training = pl.DataFrame(pairs, schema=["user_id", "seq", "item_id", "liked"], orient="row")
    interactions = pl.concat([training, pl.DataFrame([("new", 0, "tea", True)], schema=training.schema, orient="row")])
    candidates = pl.DataFrame({"user_id": "new", "target_seq": 1, "item_id": ["ball", "cup", "bat"]})
    scores = baselines.itemknn(candidates, interactions, training)
    assert scores.tolist() == [0, 1, 0]
    assert baselines.itemknn(candidates, interactions.reverse(), training.reverse()).tolist() == scores.tolist()
