"""One answer is corrected on the command line and the next run follows it through; nothing ambiguous is accepted."""

from __future__ import annotations

import polars as pl
import pytest


@pytest.fixture
def item(own, tmp_path) -> str:
    own("export", "items", "-o", str(tmp_path / "items.csv"))
    return pl.read_csv(tmp_path / "items.csv")["item_id"][0]


def exported(own, table: str, path) -> pl.DataFrame:
    own("export", table, "-o", str(path / f"{table}.parquet"))
    return pl.read_parquet(path / f"{table}.parquet")


def test_a_corrected_summary_is_in_the_tables_after_the_next_run_and_asks_nothing(own, profile, item, tmp_path):
    words = ["--summary", "A red [mug].", "--why", "it is a mug", "--by", "the shop"]
    code, (event,) = own("correct", "item", item, *words)
    assert code == 0 and item in event["said"] and event["how"] == "summary"
    code, events = own("run", *profile, "--stage", "summary", "--yes")
    assert code == 0
    assert sum(event["asked"] for event in events if event["event"] == "progress") == 0
    summaries = exported(own, "item_summaries", tmp_path)
    assert summaries.filter(pl.col("item_id") == item)["summary"].to_list() == ["A red [mug]."]
    own("report")
    page = (tmp_path / "store" / "reports" / "dev" / "00000002.html").read_text()
    listed = page.split('<section id="corrections">')[1].split("</section>")[0]
    assert "A red [mug]." in listed and "it is a mug" in listed and "the shop" in listed and item in listed


def test_a_caption_opened_again_is_asked_once(own, profile, item):
    assert own("correct", "item", item, "--reask", "--why", "too short")[0] == 0
    code, events = own("run", *profile, "--stage", "caption", "--yes")
    assert code == 0
    assert [event for event in events if event["event"] == "progress"][-1]["asked"] == 1


def test_a_banned_summary_stands_as_a_failed_row(own, profile, item):
    assert own("correct", "item", item, "--ban", "--of", "summary", "--why", "rude")[0] == 0
    assert own("run", *profile, "--stage", "summary", "--yes")[0] == 0
    _, failed = own("errors", "--stage", "summary")
    assert [(event["class"], item in event["row"]) for event in failed] == [("banned", True)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "you said none"),
        (["--caption", "x", "--ban"], "--caption and --ban"),
        (["--caption", "x", "--summary", "y"], "--caption and --summary"),
        (["--caption", "x", "--of", "summary"], "leave --of out"),
        (["--caption", "  "], "empty"),
    ],
)
def test_exactly_one_way_to_correct_is_asked_for(cli, words, said):
    code, events = cli("correct", "item", "B01", *words, "--why", "so")
    assert code == 2
    assert said in events[-1]["message"]


def test_an_unknown_item_or_word_is_refused(cli):
    assert "no-such-item" in cli("correct", "item", "no-such-item", "--ban", "--why", "so")[1][-1]["message"]
    assert "correct item" in cli("correct", "itm", "B01", "--ban", "--why", "so")[1][-1]["message"]
    assert cli("correct", "item", "B01", "--ban")[0] == 2  # no reason given
