"""The command line: one real run, and every command on what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from flows.cli import app
from tasks.work import open_work

SMALL = ["--set", "ingest.demo.items=24", "--set", "ingest.demo.users=6"]
PROFILE = ["-p", "demo", "--engine", "scripted", *SMALL]


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A store that `mllmsrec run` has filled, and the events it printed; starts Prefect once."""
    store = tmp_path_factory.mktemp("cli") / "store"
    code = "from flows.cli import main; main()"
    command = [sys.executable, "-c", code, "run", *PROFILE, "--store", str(store), "--yes", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    return store, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def cli(shop, tmp_path):
    """`cli("status")`: exit code, and the events printed."""

    def call(*words: str, store: Path | None = None) -> tuple[int, list[dict]]:
        open_work.cache_clear()
        result = CliRunner().invoke(app, [*words, "--store", str(store or shop[0]), "--json"])
        lines = [line for line in result.output.splitlines() if line.startswith("{")]
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, [json.loads(line) for line in lines]

    return call


def test_a_run_prints_its_plan_its_progress_and_its_report(shop):
    store, events = shop
    kinds = [event["event"] for event in events]
    assert kinds[0] == "plan"
    assert "progress" in kinds
    assert kinds[-1] == "report"
    assert "<html" in Path(events[-1]["path"].removeprefix("file://")).read_text("utf-8")[:2_000].lower()
    assert (store / "store.json").exists()


def test_a_plan_after_the_run_asks_for_nothing(cli):
    code, events = cli("plan", *PROFILE)
    assert code == 0
    assert [event["stage"] for event in events][:3] == ["ingest", "images", "caption"]
    assert {event["high"] for event in events} == {0}


def test_a_plan_of_an_edited_prompt_says_why(cli):
    _, events = cli("plan", *PROFILE, "--set", "caption.prompt=Name it.")
    (caption,) = [event for event in events if event["stage"] == "caption"]
    assert caption["why"] == "caption.prompt"
    assert caption["low"] == caption["high"] == caption["rows"] > 0


def test_status_shows_every_stage(cli):
    code, events = cli("status")
    assert code == 0
    assert len(events) == 9
    assert all(event["counts"]["failed"] == 0 for event in events)


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


def test_a_trial_shows_prompts_and_publishes_nothing(cli, shop):
    before = sorted((shop[0] / "envs").rglob("*"))
    code, events = cli("try", "caption", *PROFILE, "--rows", "2", "--set", "caption.prompt=Name {it}.")
    assert (code, len(events)) == (0, 2)
    assert all(event["asked"][0]["prompt"].startswith("Name {it}.") for event in events)
    assert sorted((shop[0] / "envs").rglob("*")) == before


def test_why_traces_an_item_to_the_literal_prompt(cli, shop):
    _, events = cli("export", "items", "-o", str(shop[0].parent / "items.csv"))
    item = pl.read_csv(shop[0].parent / "items.csv")["item_id"][0]
    code, events = cli("why", "item", item, *PROFILE[:2])
    assert code == 0
    assert "Describe the item in this picture" in json.dumps(events)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "-p", "dmo"], "did you mean `demo`"),
        (["plan", "--set", "caption.promt=x"], "did you mean `prompt`"),
        (["run", *PROFILE, "--stage", "captoin", "--yes"], "did you mean `caption`"),
        (["try", "ingest", *PROFILE], "not a stage that asks"),
        (["export", "item", "-o", "x.csv"], "did you mean `items`"),
        (["export", "items", "-o", "x.xlsx"], ".parquet, .csv, .jsonl"),
        (["errors", "--stage", "captoin"], "did you mean `caption`"),
        (["status", "--env", "prod"], "known: dev"),
        (["status", "--env", "../dev"], "letters, digits"),
        (["why", "itm", "1"], "why item"),
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
