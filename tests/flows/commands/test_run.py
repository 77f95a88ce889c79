"""One real run, and the commands that plan, repeat, sample and measure it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.commands.run import duration, interval, total
from storage.store import Store
from tests.tasks.shop import N_ITEMS, a_shop, sets


def of(events: list[dict], kind: str) -> list[dict]:
    return [event for event in events if event["event"] == kind]


def test_a_run_prints_its_plan_its_progress_and_its_report(shop):
    store, events = shop
    kinds = [event["event"] for event in events]
    assert kinds[0] == "plan"
    assert "progress" in kinds and "left" not in kinds
    assert kinds[-1] == "report"
    assert "<html" in Path(events[-1]["path"].removeprefix("file://")).read_text("utf-8")[:2_000].lower()
    assert (store / "store.json").exists()


def test_a_plan_after_the_run_asks_for_nothing(cli, profile):
    code, events = cli("plan", *profile)
    assert code == 0
    assert [event["stage"] for event in events][:3] == ["ingest", "images", "caption"]
    assert {event["high"] for event in events} == {0}


def test_a_plan_of_an_edited_prompt_says_why(cli, profile):
    _, events = cli("plan", *profile, "--set", "caption.prompt=Name it.")
    (caption,) = [event for event in events if event["stage"] == "caption"]
    assert "caption.prompt" in caption["why"]
    assert caption["low"] == caption["high"] == caption["rows"] > 0


def test_a_plan_with_prices_says_what_it_costs_and_without_has_no_such_column(cli, words, profile):
    edited = ["plan", *profile, "--set", "caption.prompt=Name it."]
    prices = ["--price-in", "2", "--price-out", "10"]
    _, events = cli(*edited, *prices)
    (caption,) = [event for event in events if event["stage"] == "caption"]
    at_most = (caption["tokens_in"] * 2 + caption["tokens_out"] * 10) / 1_000_000
    assert caption["money"][1] == pytest.approx(at_most) and at_most > 0
    assert "money EUR" in words(*edited, *prices, "--set", "settings.currency=EUR")
    assert "money" not in words(*edited)
    assert "In all: " in words(*edited) and "In all: " not in words("plan", *profile)


def test_a_plan_that_measures_asks_a_few_and_then_knows_the_time(own, profile, tmp_path):
    edited = [*profile, "--set", "caption.prompt=Name it."]
    _, before = own("plan", *edited)
    code, events = own("plan", *edited, "--measure", "3")
    assert code == 0
    due = {event["stage"]: event for event in of(events, "plan")}
    first = {event["stage"]: event for event in before}
    assert 0 < first["caption"]["high"] - due["caption"]["high"] <= 3
    assert due["caption"]["seconds"] is not None
    assert [event["stage"] for event in of(events, "measured")] == ["caption"]
    assert (tmp_path / "store" / "envs" / "dev" / "00000001.json").exists()
    assert not (tmp_path / "store" / "envs" / "dev" / "00000002.json").exists()


def test_one_stage_shows_its_own_line_of_the_plan_and_publishes(own, profile):
    code, events = own("run", *profile, "--stage", "caption", "--set", "caption.prompt=Name it.", "--yes")
    assert code == 0
    assert [event["stage"] for event in of(events, "plan")] == ["caption"]
    assert [event["table"] for event in of(events, "published")] == ["captions"]
    _, shown = own("history")
    assert [event["changed"] for event in shown][-1] == ["caption"]


def test_a_run_with_nothing_due_writes_no_report_and_no_state(own, profile, tmp_path):
    store = tmp_path / "store"
    (page,) = (store / "reports" / "dev").iterdir()
    before = page.stat().st_mtime_ns
    code, events = own("run", *profile, "--yes")
    assert code == 0 and events[-1]["path"].endswith("00000001.html")
    assert list((store / "reports" / "dev").iterdir()) == [page] and page.stat().st_mtime_ns == before
    assert len(list((store / "envs" / "dev").iterdir())) == 1


def test_answers_opened_again_are_asked_once_and_the_reason_is_kept(own, profile, tmp_path):
    code, events = own("run", *profile, "--stage", "caption", "--reask", "--why", "all too short", "--yes")
    assert code == 0
    (opened,) = of(events, "reask")
    progress = [event for event in of(events, "progress") if event["stage"] == "caption"][-1]
    assert opened["answers"] == progress["asked"] == 24
    assert set(Store(str(tmp_path / "store")).corrections.all()["reason"]) == {"all too short"}
    _, events = own("run", *profile, "--stage", "caption", "--yes")
    assert sum(event["asked"] for event in of(events, "progress")) == 0


def test_only_the_answers_that_where_names_are_opened(own, profile, tmp_path):
    own("export", "items", "-o", str(tmp_path / "items.csv"))
    item = pl.read_csv(tmp_path / "items.csv")["item_id"][0]
    code, events = own("run", *profile, "--stage", "caption", "--reask", "--where", f"item_id = '{item}'", "--yes")
    assert code == 0 and of(events, "reask")[0]["answers"] == of(events, "progress")[-1]["asked"] == 1
    code, events = own("run", *profile, "--stage", "caption", "--reask", "--where", "no_column = 1", "--yes")
    assert code == 2 and "no_column" in events[-1]["message"]


def on_a_terminal(answer: str, *words: str) -> tuple[int, str]:
    """The command as a person runs it who types `answer`; its exit code and what the person saw."""
    ours, theirs = os.openpty()
    code = "from flows.cli import main; main()"
    how: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": {**os.environ, "COLUMNS": "200"}}
    with subprocess.Popen([sys.executable, "-c", code, *words], **how) as running:
        os.close(theirs)
        os.write(ours, f"{answer}\n".encode())
        seen = b""
        with suppress(OSError):  # what a terminal's other end says once nobody is there any more
            while piece := os.read(ours, 4096):
                seen += piece
    os.close(ours)
    return running.returncode, seen.decode()


def test_a_terminal_is_shown_the_plan_and_asked_and_a_no_publishes_nothing(shop, profile, tmp_path):
    shutil.copytree(shop[0], tmp_path / "store")
    words = [*profile, "--store", str(tmp_path / "store"), "--set", "caption.prompt=Name it."]
    code, seen = on_a_terminal("n", "run", *words, "--stage", "caption")
    assert code == 0 and "Run it?" in seen and seen.index("prompt caption.prompt") < seen.index("Run it?")
    code, seen = on_a_terminal("n", "run", *words, "--stage", "caption", "--reask")
    assert code == 0 and "Ask answers of stage caption again?" in seen
    code, seen = on_a_terminal("n", "forget", "--user", "U1", "--store", str(tmp_path / "store"))
    assert code == 1 and "for good?" in seen
    store = Store(str(tmp_path / "store"))
    assert store.envs.current("dev")["seq"] == 1 and store.corrections.all().is_empty()
    assert store.files.names("forgotten") == []


def test_a_budget_leaves_rows_and_says_so_and_the_next_run_goes_on(own, profile):
    slow = [*profile, "--set", "settings.scripted_seconds=0.25", "--set", "settings.window=1"]
    slow += ["--set", "caption.prompt=Name it."]  # 24 answers one after the other: 6 seconds
    code, events = own("run", *slow, "--stage", "caption", "--budget-minutes", "0.04", "--yes")
    assert code == 0
    (left,) = of(events, "left")
    assert left["stage"] == "caption" and 0 <= left["coverage"] < 1
    assert own("promote", "dev", "prod")[0] == 2
    assert own("promote", "dev", "prod", "--min-coverage", str(left["coverage"]))[0] == 0
    code, events = own("run", *profile, "--set", "caption.prompt=Name it.", "--stage", "caption", "--yes")
    assert code == 0 and not of(events, "left")
    assert own("promote", "dev", "prod")[0] == 0


def test_stages_a_budget_did_not_reach_are_named(cli, profile, tmp_path):
    code, events = cli("run", *profile, "--budget-minutes", "0.001", "--yes", store=tmp_path / "new")
    assert code == 0 and events[-1]["event"] == "report"
    left = {event["stage"]: event["coverage"] for event in of(events, "left")}
    assert left["caption"] == left["score"] == 0.0 and "ingest" not in left


def test_pictures_that_are_lost_for_good_are_told_by_the_run_the_status_and_the_list_of_errors(cli, words, tmp_path):
    root, store = tmp_path / "shop", tmp_path / "new"
    a_shop().write(root)
    (root / "pictures").rename(tmp_path / "pictures")
    (root / "items.csv").write_text((root / "items.csv").read_text().replace("pictures/i0", f"{tmp_path}/pictures/i0"))
    told = [word for value in sets(root, store) for word in ("--set", value)]
    assert cli("run", *told, "--stage", "ingest", "--yes", store=store)[0] == 0
    code, events = cli("run", *told, "--stage", "images", "--yes", store=store)
    lost = {"image_missing": N_ITEMS - 10, "image_refused": 10}
    assert (code, of(events, "failures")) == (0, [{"event": "failures", "stage": "images", "classes": lost}])
    assert {event["stage"]: event["failures"] for event in cli("status", store=store)[1]} == {
        "ingest": {},
        "images": lost,
    }
    _, refused = cli("errors", "--stage", "images", "--class", "image_refused", store=store)
    assert [event["row"] for event in refused] == [f"item_id=i0{n}" for n in range(10)]
    assert all("settings.image_roots" in event["detail"] for event in refused)
    admitted = [*told, "--set", f'settings.image_roots=["{tmp_path}/pictures"]']
    code, events = cli("retry", *admitted, "--stage", "images", "--class", "image_refused", store=store)
    assert (code, of(events, "failures")[0]["classes"]) == (0, {"image_missing": N_ITEMS - 10})


def test_a_trial_shows_prompts_and_publishes_nothing(cli, shop, profile):
    before = sorted((shop[0] / "envs").rglob("*"))
    code, events = cli("try", "caption", *profile, "--rows", "2", "--set", "caption.prompt=Name {it}.")
    assert (code, len(events)) == (0, 2)
    assert all(event["asked"][0]["prompt"].startswith("Name {it}.") for event in events)
    assert sorted((shop[0] / "envs").rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "-p", "dmo"], "did you mean `demo`"),
        (["plan", "--set", "caption.promt=x"], "did you mean `prompt`"),
        (["run", "--stage", "captoin", "--yes"], "did you mean `caption`"),
        (["retry", "--stage", "captoin"], "did you mean `caption`"),
        (["run", "--reask"], "needs a stage"),
        (["run", "--stage", "caption", "--where", "x = 1"], "add --reask"),
        (["run", "--stage", "caption", "--why", "so"], "add --reask"),
        (["run", "--stage", "ingest", "--reask"], "not a stage that asks"),
        (["try", "ingest"], "not a stage that asks"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_right(cli, profile, words, said):
    code, events = cli(*words, *(profile if "-p" not in words else []))
    assert code == 2
    assert events[-1]["event"] == "error"
    assert said in events[-1]["message"]


def test_spans_are_said_in_the_unit_one_would_say_them_in():
    assert interval((3, 3), str) == "3" and interval((3, 5), str) == "3 to 5" and interval(None, str) == "unknown"
    assert [duration(s) for s in (7, 119, 121, 7300)] == ["7 s", "119 s", "2 min", "2.0 h"]


def test_a_sum_is_unknown_where_one_part_is():
    assert total([(1, 2), (3, 4)]) == (4, 6)
    assert total([(1, 2), None]) is None
    assert total([]) == (0, 0)
