"""What an environment shows, on the store that a real run has left."""

from __future__ import annotations

import json

import polars as pl
import pytest


def test_status_shows_every_stage_and_how_much_of_it_is_up_to_date(cli):
    code, events = cli("status")
    assert code == 0
    assert len(events) == 9
    assert all(event["counts"]["failed"] == 0 and event["coverage"] == 1.0 for event in events)


def test_status_has_a_column_for_what_is_not_up_to_date_only_where_something_is_not(words, shop, tmp_path):
    from storage.store import Store

    assert "up to date" not in words("status")
    stages = Store(str(shop[0])).envs.current("dev")["stages"]
    stages["caption"]["coverage"] = 0.75
    Store(str(tmp_path / "other")).envs.move("dev", stages, "by hand")
    shown = words("status", store=tmp_path / "other")
    assert "up to date" in shown and "75.0 %" in shown and "by hand" in shown


def test_errors_lists_failed_rows(cli):
    code, events = cli("errors")
    assert (code, events) == (0, [])


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_tables_are_exported(cli, tmp_path, ending):
    path = tmp_path / f"items.{ending}"
    code, (event,) = cli("export", "items", "-o", str(path))
    assert (code, event["rows"]) == (0, 24)
    read = {"parquet": pl.read_parquet, "csv": pl.read_csv, "jsonl": pl.read_ndjson}[ending]
    assert len(read(path)) == 24


def test_why_traces_an_item_to_the_literal_prompt(cli, tmp_path):
    cli("export", "items", "-o", str(tmp_path / "items.csv"))
    item = pl.read_csv(tmp_path / "items.csv")["item_id"][0]
    code, events = cli("why", "item", item, "-p", "demo")
    assert code == 0
    assert "Describe the item in this picture" in json.dumps(events)


def test_a_report_is_written_again_when_asked_for(own, tmp_path):
    page = tmp_path / "store" / "reports" / "dev" / "00000001.html"
    page.write_text("gone wrong")
    code, (event,) = own("report")
    assert (code, event["path"]) == (0, str(page))
    assert page.read_text().startswith("<!doctype html>")


def test_a_report_that_compares_has_a_name_of_its_own_and_one_section_more(own):
    own("promote", "dev", "prod")
    _, (plain,) = own("report")
    code, (event,) = own("report", "--compare", "prod")
    assert code == 0 and event["path"] != plain["path"]
    with open(event["path"]) as compared, open(plain["path"]) as alone:
        assert '<section id="compared">' in compared.read()
        assert '<section id="compared">' not in alone.read()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "item", "-o", "x.csv"], "did you mean `items`"),
        (["export", "items", "-o", "x.xlsx"], ".parquet, .csv, .jsonl"),
        (["errors", "--stage", "captoin"], "did you mean `caption`"),
        (["status", "--env", "prod"], "known: dev"),
        (["status", "--env", "../dev"], "letters, digits"),
        (["why", "itm", "1"], "why item"),
        (["report", "--compare", "prod"], "known: dev"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_right(cli, words, said):
    code, events = cli(*words)
    assert code == 2
    assert events[-1]["event"] == "error"
    assert said in events[-1]["message"]


def test_a_store_of_another_version_exits_with_1(cli, tmp_path):
    (tmp_path / "store.json").write_text('{"schema": 99}')
    code, (event,) = cli("status", store=tmp_path)
    assert (code, event["kind"]) == (1, "StoreError")


def test_an_empty_store_says_what_fills_it(cli, tmp_path):
    code, (event,) = cli("status", store=tmp_path / "new")
    assert code == 2
    assert "mllmsrec demo" in event["message"]
