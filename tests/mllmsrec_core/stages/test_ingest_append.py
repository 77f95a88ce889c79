"""ingest that goes on from what it published: `seq` is given once, nothing is lost, and the forgotten stay away."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from mllmsrec_core.datasets import INTERACTIONS, ITEMS, REJECTS, Catalogue
from mllmsrec_core.errors import SourceError
from mllmsrec_core.stage import Inputs, conform
from mllmsrec_core.stages import ingest
from storage.source import FsspecSource

Tables = dict[str, pl.DataFrame]
Click = tuple[str, str, int | None, float]  # user, item, second, rating
NAMES = ("a", "b", "c")


class Shop:
    """A dataset written as two Parquet files in memory and read by the generic reader."""

    def __init__(self, url: str = "memory://ingest-append") -> None:
        self.source = FsspecSource(url)

    def run(
        self,
        clicks: Sequence[Click],
        before: Mapping[str, pl.DataFrame] | None = None,
        items: Sequence[str] = NAMES,
        titles: str = "Mug",
        forgotten: Sequence[str] = (),
        **params: object,
    ) -> Tables:
        timed = any(click[2] is not None for click in clicks)
        columns = {"user_id": pl.String, "item_id": pl.String, "at": pl.Int64, "rating": pl.Float64}
        self.write("items", pl.DataFrame({"item_id": items, "title": titles}, schema_overrides={"item_id": pl.String}))
        self.write("interactions", pl.DataFrame(list(clicks), schema=columns, orient="row"))
        generic = {"items_file": "items.parquet", "interactions_file": "interactions.parquet"}
        generic |= {"interaction_columns": {"rating": "rating", "at": "at" if timed else None}, "liked_from": 4}
        chosen = ingest.Params.model_validate(
            {"dataset": "generic", "path": self.source.url, "generic": generic, "mode": "append", **params}
        )
        asked = (lambda users: users.is_in(list(forgotten))) if forgotten else None
        inputs = Inputs({}, {"ingest": chosen}, source=self.source, before=before or {}, forgotten=asked)
        made = ingest.STAGE.tables(inputs, ingest.STAGE.rows(inputs))
        return {name: conform(frame, ingest.STAGE.writes[name]) for name, frame in made.items()}

    def write(self, name: str, frame: pl.DataFrame) -> None:
        self.source.files.fs.pipe_file(self.source.files.path(f"{name}.parquet"), b"")
        with self.source.files.fs.open(self.source.files.path(f"{name}.parquet"), "wb") as file:
            frame.write_parquet(file)


SHOP = Shop()
run = SHOP.run


def second(n: int) -> int:
    return 1_700_000_000 + n


def told(tables: Tables, *columns: str) -> list[tuple[object, ...]]:
    return tables["interactions"].select(columns or ("user_id", "seq", "item_id")).rows()


def reasons(tables: Tables) -> list[str]:
    return tables["rejects"]["reason"].to_list()


def same(one: Tables, two: Tables, names: Sequence[str] = ("items", "interactions", "waiting", "rejects")) -> None:
    for name in names:
        assert_frame_equal(one[name], two[name])


def test_a_late_event_becomes_the_newest_and_shifts_nobody():
    first = run([("u", "a", second(1), 5), ("u", "b", second(3), 5)])
    later = run([("u", "c", second(2), 5)], first)
    assert told(later) == [("u", 0, "a"), ("u", 1, "b"), ("u", 2, "c")]


def test_what_is_known_adds_nothing_and_keeps_its_first_rating():
    first = run([("u", "a", second(1), 5)])
    later = run([("u", "a", second(1), 1), ("u", "a", second(2), 2)], first)
    assert told(later, "seq", "rating", "liked") == [(0, 5.0, True), (1, 2.0, False)]
    assert later["rejects"].is_empty()


def test_rows_and_items_a_rolling_export_lacks_stay_and_items_it_has_are_replaced():
    first = run([("u", "a", second(1), 5), ("v", "b", second(1), 5)], items=["a", "b"], titles="old")
    later = run([("v", "c", second(2), 5)], first, items=["b", "c"], titles="new")
    assert told(later) == [("u", 0, "a"), ("v", 0, "b"), ("v", 1, "c")]
    assert later["items"].select("item_id", "title").rows() == [("a", "old"), ("b", "new"), ("c", "new")]


def test_an_interaction_with_an_item_only_an_earlier_export_had_is_kept():
    first = run([("u", "a", second(1), 5)], items=["a"])
    assert told(run([("v", "a", second(2), 5)], first, items=["b"]))[-1] == ("v", 0, "a")


def test_a_snapshot_takes_no_notice_of_what_was_published():
    first = run([("u", "a", second(1), 5)])
    assert told(run([("u", "b", second(2), 5)], first, mode="snapshot")) == [("u", 0, "b")]


@pytest.mark.parametrize(("mode", "goes_on"), [("append", True), ("snapshot", False)])
def test_only_append_goes_on_from_its_own_tables(mode, goes_on):
    assert ingest.STAGE.continues is not None
    params = ingest.Params.model_validate({"mode": mode})
    assert ingest.STAGE.continues(Inputs({}, {"ingest": params})) is goes_on


def test_the_demo_shop_appended_to_itself_is_itself():
    params = ingest.Params.model_validate({"mode": "append", "demo": {"items": 30, "users": 10}})
    made: list[Tables] = [{}]
    for _ in range(2):
        frames = ingest.STAGE.tables(Inputs({}, {"ingest": params}, before=made[-1]), pl.DataFrame())
        made.append({name: conform(frame, ingest.STAGE.writes[name]) for name, frame in frames.items()})
    snapshot = ingest.Params.model_validate({"demo": {"items": 30, "users": 10}})
    frames = ingest.STAGE.tables(Inputs({}, {"ingest": snapshot}), pl.DataFrame())
    made.append({name: conform(frame, ingest.STAGE.writes[name]) for name, frame in frames.items()})
    same(made[1], made[2])
    same(made[1], made[3])


def test_without_times_the_occurrence_of_an_item_tells_what_is_new():
    first = run([("u", "b", None, 5), ("u", "a", None, 5), ("u", "b", None, 5)])
    later = run(
        [("u", "b", None, 5), ("u", "a", None, 5), ("u", "b", None, 5), ("u", "c", None, 5), ("u", "b", None, 5)], first
    )
    assert told(later) == [("u", 0, "b"), ("u", 1, "a"), ("u", 2, "b"), ("u", 3, "c"), ("u", 4, "b")]


def test_a_user_who_was_too_short_comes_in_whole_when_the_export_holds_the_rest_no_more():
    first = run([("u", "a", second(1), 5), ("v", "a", second(1), 5), ("v", "b", second(2), 5)], min_history=2)
    assert told(first) == [("v", 0, "a"), ("v", 1, "b")]
    assert reasons(first) == ["a history of 1, shorter than min_history = 2"]
    later = run([("u", "c", second(9), 5)], first, min_history=2)
    assert told(later)[:2] == [("u", 0, "a"), ("u", 1, "c")]
    assert later["waiting"].is_empty() and later["rejects"].is_empty()


def test_when_everyone_waits_append_publishes_and_a_snapshot_says_so():
    assert run([("u", "a", second(1), 5)], min_history=2)["waiting"].height == 1
    with pytest.raises(SourceError, match="a history of 1"):
        run([("u", "a", second(1), 5)], min_history=2, mode="snapshot")


def test_a_raised_min_history_makes_users_wait_and_a_lowered_one_brings_them_back_as_they_were():
    first = run([("u", "a", second(2), 5), ("v", "b", second(2), 5), ("v", "c", second(3), 5)])
    raised = run([("v", "a", second(4), 5)], first, min_history=2)
    assert {row[0] for row in told(raised)} == {"v"}
    lowered = run([("v", "a", second(4), 5)], raised)
    assert told(lowered) == [("u", 0, "a"), ("v", 0, "b"), ("v", 1, "c"), ("v", 2, "a")]


users, items, ratings = st.sampled_from("uvwx"), st.sampled_from(NAMES), st.sampled_from([1.0, 4.0, 5.0])
clicks = st.lists(st.tuples(users, items, st.integers(1, 6).map(second), ratings), min_size=1, max_size=14)
timeless = st.lists(st.tuples(users, items, st.none(), st.just(5.0)), min_size=1, max_size=14)


rules = st.fixed_dictionaries(
    {
        "min_history": st.integers(0, 3),
        "k_core": st.tuples(st.integers(0, 2), st.integers(0, 3)),
        "repeats": st.sampled_from(["all", "first", "last"]),
    }
)


def test_a_user_and_an_item_outside_the_core_come_in_once_later_clicks_let_them():
    rows = [("u", "a", second(1), 5), ("u", "b", second(2), 5), ("v", "a", second(1), 5), ("v", "b", second(2), 5)]
    first = run([*rows, ("u", "c", second(3), 5), ("w", "c", second(1), 5)], k_core=(2, 2))
    assert told(first) == [("u", 0, "a"), ("u", 1, "b"), ("v", 0, "a"), ("v", 1, "b")]
    assert first["waiting"].select("user_id", "seq", "item_id").rows() == [("u", 2, "c"), ("w", 0, "c")]
    later = run([("w", "a", second(9), 5)], first, k_core=(2, 2))
    assert set(told(later)) == {*told(first), ("u", 2, "c"), ("w", 0, "c"), ("w", 1, "a")}
    assert later["waiting"].is_empty() and later["rejects"].is_empty()


def test_the_last_of_repeated_clicks_takes_the_place_of_the_one_before_for_good():
    first = run([("u", "a", second(1), 5), ("u", "b", second(2), 5)], repeats="last")
    later = run([("u", "a", second(3), 5)], first, repeats="last")
    assert told(later) == [("u", 1, "b"), ("u", 2, "a")]
    again = run([("u", "a", second(1), 5)], later, repeats="last")  # an export that still holds the old one
    assert told(again) == told(later)


@settings(max_examples=80, deadline=None)
@given(clicks, clicks, rules)
def test_appending_the_same_once_more_changes_nothing(one, two, rules):
    first = run(one, **rules)
    once = run(two, first, **rules)
    same(once, run(two, once, **rules))


@settings(max_examples=40, deadline=None)
@given(timeless)
def test_appending_the_same_once_more_changes_nothing_without_times(rows):
    once = run(rows)
    same(once, run(rows, once))
    same(once, run(rows, mode="snapshot"))


@settings(max_examples=80, deadline=None)
@given(clicks, st.sets(st.integers(2, 6)), rules, st.randoms(use_true_random=False))
def test_slices_in_order_of_time_add_up_to_one_snapshot(rows, cuts, rules, rng):
    bounds = [0, *sorted(second(cut) for cut in cuts), second(99)]
    tables: Tables = {}
    for low, high in itertools.pairwise(bounds):
        piece = [row for row in rows if row[2] < high and (row[2] >= low or rng.random() < 0.5)]  # exports may overlap
        if piece:
            tables = run(rng.sample(piece, len(piece)), tables, **rules)
    if tables["interactions"].is_empty():
        assert tables["waiting"].height == len({row[:3] for row in rows})
    else:
        same(tables, run(rows, mode="snapshot", **rules), ("items", "interactions", "waiting"))


@settings(max_examples=60, deadline=None)
@given(clicks, clicks, st.randoms(use_true_random=False))
def test_whatever_is_appended_every_published_row_stays_and_the_order_of_the_file_means_nothing(one, two, rng):
    first = run(one)
    later = run(two, first)
    columns = first["interactions"].columns
    assert first["interactions"].join(later["interactions"], on=columns, how="anti").is_empty()
    assert (
        told(later, "user_id", "item_id", "at")
        and later["interactions"].select("user_id", "item_id", "at").is_unique().all()
    )
    assert {row[:2] for row in one} | {row[:2] for row in two} == set(told(later, "user_id", "item_id"))
    seqs = later["interactions"].group_by("user_id").agg(pl.col("seq").sort())["seq"].to_list()
    assert all(seq == list(range(len(seq))) for seq in seqs)
    same(later, run(rng.sample(two, len(two)), first), ("items", "interactions"))


def test_the_forgotten_leave_no_row_no_reject_and_no_item_that_only_they_touched():
    rows = [("u", "a", second(1), 5), ("u", "b", second(1), 5), ("u", "b", second(1), 4), ("v", "b", second(2), 5)]
    made = run([*rows, (" u", "zz", second(3), 5)], mode="snapshot", forgotten=["u"])
    assert told(made) == [("v", 0, "b")]
    assert made["rejects"].is_empty()
    assert made["items"]["item_id"].to_list() == ["b", "c"], "c was touched by nobody and stays"


def test_an_item_of_the_forgotten_is_not_named_as_a_twin_either():
    made = run([("u", "a", second(1), 5), ("v", "b", second(2), 5)], items=["a", "a", "b"], forgotten=["u"])
    assert made["items"]["item_id"].to_list() == ["b"]
    assert made["rejects"].is_empty()


def test_the_forgotten_leave_what_was_published_too():
    rows = [("u", "a", second(1), 5), ("v", "b", second(1), 5), ("v", "c", second(2), 5), ("w", "c", second(1), 5)]
    first = run(rows, min_history=2)
    assert first["waiting"]["user_id"].to_list() == ["u", "w"]
    later = run([("w", "b", second(9), 5)], first, items=["b"], min_history=2, forgotten=["u", "v"])
    assert told(later) == [("w", 0, "c"), ("w", 1, "b")]
    assert later["waiting"].is_empty()
    assert later["items"]["item_id"].to_list() == ["b", "c"]


def test_the_forgotten_do_not_count_as_short():
    made = run(
        [("u", "a", second(1), 5), ("v", "a", second(1), 5), ("v", "b", second(2), 5)], min_history=2, forgotten=["u"]
    )
    assert made["rejects"].is_empty() and made["waiting"].is_empty()


def test_every_user_is_asked_about_once_and_nobody_is_asked_about_nothing():
    seen: list[list[str]] = []

    def asked(users: pl.Series) -> pl.Series:
        seen.append(sorted(users))
        return pl.Series([False] * len(users))

    raw = pl.DataFrame({"user_id": ["u", " u", None, ""], "item_id": ["a"] * 4}, schema_overrides=INTERACTIONS)
    empty = {name: schema.create_empty() for name, schema in ingest.WRITES.items()}
    catalogue = Catalogue(pl.DataFrame(schema=ITEMS), raw, pl.DataFrame(schema=REJECTS))
    left, before = ingest.histories.forget(catalogue, empty, asked)
    assert seen == [["u"]]
    assert left is catalogue and before is empty


@settings(max_examples=60, deadline=None)
@given(clicks, clicks, st.sets(users, max_size=3), rules)
def test_forgetting_is_as_if_they_had_never_come(one, two, gone, rules):
    keep = [[row for row in rows if row[0] not in gone] for rows in (one, two)]
    if not keep[0] or not keep[1]:
        return
    later = run(two, run(one, **rules), forgotten=sorted(gone), **rules)
    never = run(keep[1], run(keep[0], **rules), **rules)
    same(later, never, ("interactions", "waiting"))
    assert reasons(later) == reasons(never)
    touched = {row[1] for row in keep[0] + keep[1]}
    theirs = {row[1] for row in one + two if row[0] in gone} - touched
    assert set(later["items"]["item_id"]) == set(NAMES) - theirs


def test_a_day_without_rows_changes_nothing():
    first = run([("u", "a", second(1), 5)])
    same(first, run([], first, items=[]), ("items", "interactions"))


def test_a_long_history_in_random_slices_is_numbered_like_the_whole():
    rng = random.Random(7)
    rows = [(f"u{rng.randrange(9)}", rng.choice(NAMES), second(n // 3), 5.0) for n in range(600)]
    tables: Tables = {}
    for start in range(0, 600, 60):
        tables = run(rows[start : start + 60], tables)
    same(tables, run(rows, mode="snapshot"), ("items", "interactions"))
    assert tables["interactions"]["at"].max() == datetime.fromtimestamp(second(199), UTC)
