"""Targets, candidates and samples: drawn by hash, blind to row order, moved little by what is new."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core import protocol

START = datetime(2024, 1, 1, tzinfo=UTC)
ANN, MIXED = "8d3adf6abf23f3a5", 13608149317741381227  # as first released: other values would redraw every candidate
ITEMS = pl.Series("item_id", [f"i{n}" for n in range(12)])


def interactions(histories: dict[str, list[tuple[str, bool]]]) -> pl.DataFrame:
    rows = [
        {"user_id": user, "seq": seq, "item_id": item, "liked": liked, "at": START + timedelta(days=seq)}
        for user, history in histories.items()
        for seq, (item, liked) in enumerate(history)
    ]
    schema = {"user_id": pl.String, "seq": pl.Int32, "item_id": pl.String, "liked": pl.Boolean}
    return pl.DataFrame(rows, schema=schema | {"at": pl.Datetime("us", "UTC")})


histories = st.dictionaries(
    st.sampled_from(["ann", "bob", "cid", "dot"]),
    st.lists(st.tuples(st.sampled_from(ITEMS.to_list()), st.booleans()), min_size=1, max_size=9),
    min_size=1,
)


def likes(n: int) -> list[tuple[str, bool]]:
    return [(f"i{number}", True) for number in range(n)]


def catalogue(n: int) -> pl.Series:
    return pl.Series("item_id", [f"item {number}" for number in range(n)])


def one_like_each(users: int, n_items: int) -> pl.DataFrame:
    return interactions(
        {f"u{n}": [(f"item {n % n_items}", True), (f"item {(n + 1) % n_items}", True)] for n in range(users)}
    )


def test_the_last_like_is_test_the_one_before_valid_and_earlier_ones_with_enough_history_train():
    found = protocol.targets(interactions({"ann": likes(8)}), ITEMS, train_per_user=2, min_history=3)
    assert found.sort("target_seq").select("split", "target_seq", "n_history").rows() == [
        ("train", 4, 4),
        ("train", 5, 5),
        ("valid", 6, 6),
        ("test", 7, 7),
    ]


def test_what_a_user_did_not_like_is_history_and_never_a_target():
    found = protocol.targets(interactions({"ann": [("i1", True), ("i2", False), ("i3", True), ("i4", False)]}), ITEMS)
    assert found.select("split", "item_id", "history_seq", "n_history").rows() == [("test", "i3", 1, 1)]


def test_a_global_time_split_puts_everything_liked_after_a_date_into_test():
    found = protocol.targets(
        interactions({"ann": likes(8), "bob": likes(3)}),
        ITEMS,
        protocol.Cut("global-time", date(2024, 1, 4), date(2024, 1, 6)),
        min_history=1,
    )
    by_split = {split: found.filter(pl.col("split") == split)["target_seq"].to_list() for split in protocol.SPLITS}
    assert by_split == {"train": [1, 2, 1, 2], "valid": [3, 4], "test": [5, 6, 7]}


def test_sliding_windows_hold_out_each_users_last_like_in_each_and_train_on_what_is_earlier():
    cut = protocol.Cut("sliding", date(2024, 1, 4), windows=3, window_days=2)  # of 4-5, 6-7 and 8-9 January
    found = protocol.targets(interactions({"ann": likes(12), "bob": likes(6)}), ITEMS, cut, min_history=1)
    assert found.select("user_id", "split", "target_seq").rows() == [
        ("ann", "train", 1),
        ("ann", "train", 2),
        ("ann", "valid", 4),
        ("ann", "test", 6),
        ("ann", "test", 8),
        ("bob", "train", 1),
        ("bob", "train", 2),
        ("bob", "valid", 4),
        ("bob", "test", 5),
    ]


def test_split_by_user_every_user_is_in_one_split_and_only_the_last_like_of_the_others_is_held_out():
    frame = interactions({f"u{n}": likes(6) for n in range(600)})
    found = protocol.targets(frame, ITEMS, protocol.Cut("user"), min_history=1)
    of_user = found.group_by("user_id").agg(pl.col("split").unique(), pl.col("target_seq"))
    assert set(of_user["split"].list.len()) == {1}
    for splits, seqs in of_user.select("split", "target_seq").rows():
        assert sorted(seqs) == ([1, 2, 3, 4, 5] if splits == ["train"] else [5])
    shares = of_user["split"].list.first().value_counts(normalize=True)
    for split, due in zip(protocol.SPLITS, protocol.SHARES, strict=True):
        # Three standard deviations of a share of 600 users are at most 0.05.
        assert abs(dict(shares.rows())[split] - due) < 0.05


def test_a_users_split_depends_on_nobody_else_and_not_on_the_sample_the_user_falls_into():
    users = [f"u{n}" for n in range(300)]
    cut = protocol.Cut("user")
    whole, part = (
        protocol.targets(interactions({user: likes(3) for user in known}), ITEMS, cut, min_history=1)
        for known in (users, protocol.sample(users, 60))
    )
    assert part.join(whole, on=whole.columns, how="anti").is_empty()
    assert set(part["split"]) == set(protocol.SPLITS)


def test_an_event_that_came_in_late_is_history_and_no_target():
    frame = interactions({"ann": likes(5)}).with_columns(
        at=pl.when(pl.col("seq") == 4).then(START + timedelta(hours=1)).otherwise("at")
    )
    assert protocol.targets(frame, ITEMS, min_history=1)["target_seq"].to_list() == [1, 2, 3]


cuts = st.one_of(
    st.just(protocol.Cut()),
    st.builds(protocol.Cut, st.just("user"), seed=st.integers(0, 3), shares=st.just((0.4, 0.3, 0.3))),
    st.builds(protocol.Cut, st.just("global-time"), st.just(date(2024, 1, 3)), st.just(date(2024, 1, 5))),
    st.builds(
        protocol.Cut,
        st.just("sliding"),
        st.just(date(2024, 1, 3)),
        windows=st.integers(2, 4),
        window_days=st.integers(1, 3),
    ),
)


@given(histories, cuts, st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_whatever_the_split_every_target_comes_after_its_history_and_the_order_of_rows_means_nothing(
    histories, cut, random
):
    hours = late(histories, random)
    frame = interactions(histories).with_columns(at=pl.col("at") + pl.duration(hours=hours))
    found = protocol.targets(frame, ITEMS, cut, min_history=1)
    shuffled = frame[random.sample(range(len(frame)), len(frame))]
    assert protocol.targets(shuffled, ITEMS, cut, min_history=1).equals(found)
    told = found.join(
        frame.select("user_id", "seq", "at"), left_on=["user_id", "target_seq"], right_on=["user_id", "seq"]
    )
    for row in told.rows(named=True):
        past = frame.filter(pl.col("user_id") == row["user_id"], pl.col("seq") <= row["history_seq"])
        assert past["at"].max() <= row["at"] and row["history_seq"] < row["target_seq"]
    if cut.valid_from:
        train = told.filter(pl.col("split") == "train")["at"].dt.date()
        held = told.filter(pl.col("split") != "train")["at"].dt.date()
        assert all(day < cut.valid_from for day in train) and all(day >= cut.valid_from for day in held)
        known = protocol.training(frame, found, cut.valid_from)
        assert all(day < cut.valid_from for day in known["at"].dt.date())


def late(histories, random) -> pl.Series:
    """Events up to four days late, of which some then stand out of the order of time."""
    return pl.Series([random.choice([0, 0, 0, -96, -24]) for history in histories.values() for _ in history])


@given(histories, cuts)
@settings(max_examples=60, deadline=None)
def test_targets_are_new_liked_and_have_a_like_before_them(histories, cut):
    frame = interactions(histories)
    for row in protocol.targets(frame, ITEMS, cut, min_history=2).rows(named=True):
        history = histories[row["user_id"]]
        before = history[: row["target_seq"]]
        assert history[row["target_seq"]] == (row["item_id"], True)
        assert row["item_id"] not in [item for item, _ in before]
        assert row["n_history"] == sum(liked for _, liked in before) >= (2 if row["split"] == "train" else 1)
        assert row["history_seq"] == row["target_seq"] - 1


@given(histories, cuts, st.one_of(st.integers(1, 15), st.just("all")), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_negatives_are_distinct_untouched_and_as_many_as_the_catalogue_holds(histories, cut, n, seed):
    frame = interactions(histories)
    drawn = protocol.candidates(protocol.targets(frame, ITEMS, cut), frame, ITEMS, n, seed=seed)
    n = len(ITEMS) if n == "all" else n
    for (user, _), of in drawn.group_by("user_id", "target_seq"):
        touched = {item for item, _ in histories[str(user)]}
        negatives = of.filter(~pl.col("label"))["item_id"].to_list()
        assert of["label"].sum() == 1
        assert not touched & set(negatives)
        assert len(set(negatives)) == len(negatives) == min(n, len(ITEMS) - len(touched))
        assert sorted(of["position"]) == list(range(len(of)))
        assert set(of["n_drawn"]) == {len(negatives)}


@given(histories, st.sampled_from([5, "all"]), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_row_order_changes_no_candidate(histories, n, random):
    def drawn(frame: pl.DataFrame, items: pl.Series) -> list[tuple]:
        found = protocol.candidates(protocol.targets(frame, items), frame, items, n)
        return sorted(found.select("user_id", "target_seq", "item_id", "label", "position").rows())

    frame, items = interactions(histories), ITEMS.to_list()
    shuffled = random.sample(range(len(frame)), len(frame))
    random.shuffle(items)
    assert drawn(frame, ITEMS) == drawn(frame[shuffled], pl.Series("item_id", items))


def test_one_new_item_moves_few_negatives():
    items, frame = catalogue(400), one_like_each(300, 400)
    targets = protocol.targets(frame, items)
    more = pl.concat([items, pl.Series("item_id", ["a new item"])])
    before, after = (protocol.candidates(targets, frame, known, 20) for known in (items, more))
    same = before.join(after, on=["user_id", "target_seq", "item_id"], how="semi")
    # The new item's due is 20 / 401 of each list; twice that leaves room for its ring share.
    assert len(before) - len(same) <= 2 * len(targets) * 20 / 401


def test_items_nobody_drew_may_leave_the_catalogue_and_no_candidate_changes():
    items, frame = catalogue(400), one_like_each(5, 400)
    targets = protocol.targets(frame, items)
    drawn = protocol.candidates(targets, frame, items, 20)
    kept = pl.Series("item_id", protocol.reached(frame["user_id"], frame, drawn))
    assert len(kept) < 200
    assert protocol.candidates(targets, frame, kept, 20).equals(drawn)


def test_a_test_target_keeps_its_candidates_when_a_new_click_turns_it_into_a_valid_one():
    items = catalogue(100)
    before = interactions({"ann": [(f"item {n}", True) for n in range(5)]})
    drawn = protocol.candidates(protocol.targets(before, items), before, items, 20)
    newcomer = drawn.filter(pl.col("split") == "test", ~pl.col("label"))["item_id"]
    unseen = next(item for item in items if item not in newcomer.to_list() and int(item.split()[1]) > 4)
    after = interactions({"ann": [*((f"item {n}", True) for n in range(5)), (unseen, True)]})
    redrawn = protocol.candidates(protocol.targets(after, items), after, items, 20)
    old = drawn.filter(pl.col("split") == "test")["item_id"].to_list()
    assert redrawn.filter(pl.col("split") == "valid")["item_id"].to_list() == old


def test_uniform_negatives_meet_every_item_about_as_often():
    items, frame = catalogue(50), one_like_each(2000, 50)
    drawn = protocol.candidates(protocol.targets(frame, items), frame, items, 5).filter(~pl.col("label"))
    share = drawn["item_id"].value_counts()["count"].to_numpy() / (len(drawn) / 50)
    assert share.min() > 0.4
    assert share.max() < 1.8  # 18 % is the standard deviation of a share on the ring


def test_popularity_matched_negatives_follow_the_likes_in_training():
    items = catalogue(40)
    popular = pl.DataFrame({"item_id": ["item 7"] * 200, "liked": [True] * 200})
    frame = one_like_each(300, 5)
    targets = protocol.targets(frame, items)
    drawn = protocol.candidates(targets, frame, items, 1, popular=popular).filter(~pl.col("label"))
    assert (drawn["item_id"] == "item 7").mean() > 0.7  # 201 of some 235 points


@given(histories)
@settings(max_examples=40, deadline=None)
def test_training_holds_nothing_from_a_users_first_held_out_target_on(histories):
    frame = interactions(histories)
    targets = protocol.targets(frame, ITEMS)
    held = targets.filter(pl.col("split") != "train")
    first = dict(held.group_by("user_id").agg(pl.col("target_seq").min()).rows())
    kept = protocol.training(frame, targets)
    assert all(row["seq"] < first.get(row["user_id"], 99) for row in kept.rows(named=True))
    assert len(kept) == sum(min(len(history), first.get(user, 99)) for user, history in histories.items())


@given(st.sets(st.text(max_size=4), max_size=30), st.integers(0, 30), st.integers(0, 30))
def test_a_sample_is_a_subset_of_every_larger_one(users, small, large):
    small, large = sorted((small, large))
    assert set(protocol.sample(users, small)) <= set(protocol.sample(users, large)) <= users
    assert len(protocol.sample(users, small)) == min(small, len(users))


def test_hashes_never_change():
    assert protocol.hash64(["ann"])[0] == np.uint64(int.from_bytes(bytes.fromhex(ANN), "little"))
    assert protocol.mix(1, np.array([2, 3]))[0] == MIXED
