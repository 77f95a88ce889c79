"""Overrule: what a correction changes, what it leaves alone, and what is asked anew because of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from mllmsrec_core.errors import TooManyErrors, UsageError
from tasks.config import Config
from tasks.overrule import correct, reask
from tasks.report.shown import Shown
from tasks.work import Work, open_work

ITEM, WHY = "I0003", "the picture shows something else"

Runs = Callable[..., dict[str, Any]]
Run = Callable[..., dict[str, int]]


@pytest.fixture
def config(small: Callable[..., Config], ran: dict[str, Any]) -> Config:
    return small()


def opened(config: Config) -> Work:
    open_work.cache_clear()
    return open_work(config.to_json())


def table(config: Config, name: str) -> pl.DataFrame:
    frame = Shown(opened(config).store, "dev").table(name)
    assert frame is not None
    return frame


@pytest.fixture
def run(config: Config, run_all: Runs) -> Callable[..., dict[str, int]]:
    """`run()`: every stage; how many questions each that was not reused asked, where there were any."""

    def every_stage(**how: Any) -> dict[str, int]:
        before = set(opened(config).store.tables.writes())
        records = run_all(config, **how)
        fresh = {
            stage: record["counts"]["asked"]
            for stage, record in records.items()
            if not before & {(table, made["write_id"]) for table, made in record["tables"].items()}
        }
        return {stage: count for stage, count in fresh.items() if count}

    return every_stage


def picture(config: Config, item: str = ITEM) -> str:
    return table(config, "images").row(by_predicate=pl.col("item_id") == item, named=True)["sha256"]


def changed(before: pl.DataFrame, after: pl.DataFrame, key: str, column: str) -> set[str]:
    both = before.select(key, old=column).join(after.select(key, new=column), on=key, how="full", coalesce=True)
    return set(both.filter(pl.col("old").ne_missing(pl.col("new")))[key])


# --- one item ---


def test_a_replaced_caption_asks_no_caption_and_summarises_the_items_of_its_picture_alone(
    config: Config, run: Run
) -> None:
    before = {name: table(config, name) for name in ("captions", "item_summaries")}
    items = set(table(config, "images").filter(pl.col("sha256") == picture(config))["item_id"])
    said = correct(opened(config), "dev", ITEM, text="A blue mug.", why=WHY, by="Ada")
    assert said.startswith(f"the caption of item {ITEM} is now: A blue mug.")
    counts = run()
    assert "caption" not in counts and counts["summary"] == len(items), "one fusing question for each"
    assert changed(before["captions"], table(config, "captions"), "sha256", "caption") == {picture(config)}
    assert changed(before["item_summaries"], table(config, "item_summaries"), "item_id", "summary") == items
    assert run() == {}


def test_a_banned_caption_is_a_failed_row_that_no_run_asks_again(config: Config, run: Run) -> None:
    correct(opened(config), "dev", ITEM, ban=True, why=WHY, by="")
    counts = run()
    row = table(config, "captions").row(by_predicate=pl.col("sha256") == picture(config), named=True)
    assert "caption" not in counts and row["caption"] is None and row["error"] == "banned"
    assert run() == {}


def test_a_caption_opened_again_is_asked_once_and_nothing_else_of_its_stage(config: Config, run: Run) -> None:
    correct(opened(config), "dev", ITEM, reask=True, why=WHY, by="")
    assert run() == {"caption": 1}, "the scripted model says the same again, so nothing follows"
    assert run() == {}


def test_a_replaced_summary_stands_and_reaches_the_preferences_that_read_it(config: Config, run: Run) -> None:
    before = table(config, "item_summaries")
    correct(opened(config), "dev", ITEM, of="summary", text="Something quite different.", why=WHY, by="")
    counts = run()
    after = table(config, "item_summaries")
    assert changed(before, after, "item_id", "summary") == {ITEM}
    assert not {"caption", "summary"} & counts.keys()
    readers = table(config, "interactions").filter(pl.col("item_id") == ITEM, pl.col("liked"))["user_id"].n_unique()
    assert readers == 0 or counts["preference"] >= 1


def test_of_two_corrections_the_later_holds(config: Config, run: Run) -> None:
    for text in ("A blue mug.", "A red mug."):
        correct(opened(config), "dev", ITEM, text=text, why=WHY, by="")
    run()
    row = table(config, "captions").row(by_predicate=pl.col("sha256") == picture(config), named=True)
    assert row["caption"] == "A red mug."


def test_other_items_with_the_same_picture_are_named(config: Config) -> None:
    work = opened(config)
    stages = work.store.envs.current("dev")["stages"]
    images = table(config, "images")
    shared = images.with_columns(
        sha256=pl.when(pl.col("item_id") == "I0005").then(pl.lit(picture(config))).otherwise("sha256")
    )
    made = work.store.tables.publish("images", shared, {})
    stages["images"]["tables"]["images"] = {"write_id": made.write_id, "digest": made.digest, "rows": made.rows}
    work.store.envs.move("dev", stages)
    assert "also that of I0005." in correct(opened(config), "dev", ITEM, ban=True, why=WHY, by="")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({}, "exactly one"),
        ({"text": "a", "ban": True}, "exactly one"),
        ({"text": " "}, "--ban"),
        ({"ban": True, "item": "nobody"}, "no item `nobody`"),
        ({"ban": True, "why": " "}, "--why"),
    ],
)
def test_what_cannot_be_corrected_is_a_usage_error_and_writes_nothing(
    config: Config, wrong: dict[str, Any], hint: str
) -> None:
    work = opened(config)
    with pytest.raises(UsageError, match=hint):
        correct(work, "dev", **{"item": ITEM, "why": WHY, "by": "", **wrong})
    assert work.store.corrections.all().is_empty()


# --- many rows ---


def test_a_whole_stage_opened_again_is_asked_once_in_full_and_its_tables_stay(config: Config, run: Run) -> None:
    before = table(config, "captions")
    assert reask(opened(config), "dev", "caption", None, WHY, "Ada") == len(before)
    assert run() == {"caption": len(before)}
    assert table(config, "captions").drop("ask").equals(before.drop("ask"))
    assert run() == {}


def test_a_run_that_stops_in_the_midst_asks_the_rest_later_and_nothing_twice(config: Config, run: Run) -> None:
    total = reask(opened(config), "dev", "summary", None, WHY, "")
    first = run(most_asks=5)["summary"]
    second = run()["summary"]
    assert 0 < first < total and first + second == total
    assert run() == {}


def test_where_chooses_units_by_their_finished_rows(config: Config) -> None:
    work, steps = opened(config), table(config, "preferences")
    user = steps["user_id"][0]
    of_user = steps.filter(pl.col("user_id") == user)["ask"].n_unique()
    assert reask(work, "dev", "preference", f"user_id = '{user}' AND step = 1", WHY, "") == of_user, "whole chains"
    assert work.store.corrections.keys("preference") == set(steps.filter(pl.col("user_id") == user)["ask"])


@pytest.mark.parametrize("stage", ["caption", "audit", "images"])
def test_where_may_name_the_item_of_a_picture(config: Config, stage: str) -> None:
    work = opened(config)
    assert reask(work, "dev", stage, f"item_id = '{ITEM}'", WHY, "") >= 1
    if stage == "caption":
        (row,) = table(config, "captions").filter(pl.col("sha256") == picture(config)).iter_rows(named=True)
        assert work.store.corrections.keys("caption") == {row["ask"]}


def test_where_nothing_fits_nothing_is_written(config: Config) -> None:
    work = opened(config)
    assert reask(work, "dev", "summary", "item_id = 'nobody'", WHY, "") == 0
    assert work.store.files.names("corrections") == []


@pytest.mark.parametrize("where", ["itme_id = 'a'", "item_id =", "item_id", "n_unique(item_id) > 3", "item_id > 3"])
def test_a_wrong_condition_is_a_usage_error_that_lists_the_columns(config: Config, where: str) -> None:
    with pytest.raises(UsageError, match=r"columns .*item_id.*summary"):
        reask(opened(config), "dev", "summary", where, WHY, "")


@pytest.mark.parametrize(
    ("stage", "hint"), [("ingest", "not a stage that asks"), ("captoin", "`caption`"), ("sft", "--retrain")]
)
def test_a_stage_without_rows_to_ask_is_a_usage_error(config: Config, stage: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        reask(opened(config), "dev", stage, None, WHY, "")


def test_a_ban_counts_against_the_error_rate(small: Callable[..., Config], run_all: Runs) -> None:
    config = small(caption__max_error_rate=0.0)
    run_all(config)
    correct(opened(config), "dev", ITEM, ban=True, why=WHY, by="")
    with pytest.raises(TooManyErrors, match="banned 1"):
        run_all(config)
