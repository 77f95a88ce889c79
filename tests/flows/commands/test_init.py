"""init writes a profile that loads and can be planned with, and never takes another one's place unasked."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flows.commands.init import init, profile, written
from flows.settings import load
from tasks.config import Options
from tasks.init import Line, Proposal
from tasks.planning import make_plan
from tasks.work import environment, open_work

SHARED = Path(__file__).parents[4] / "shared" / "data"
ITEMS = 'sku,name\n"a ""b""",Mug\nb2,Lamp\n'
CLICKS = "customer_id,sku,created_at\n" + "".join(f"u{n % 3},b2,{1_700_000_000 + n}\n" for n in range(9))


def call(*words: str) -> tuple[int, dict]:
    app = typer.Typer()
    app.command()(init)
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.output.splitlines()[-1])


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    folder = tmp_path / 'my "shop"'
    folder.mkdir()
    (folder / "items.csv").write_text(ITEMS)
    (folder / "clicks.csv").write_text(CLICKS)
    return folder


def planned(path: Path, store: Path, sample: int = 0) -> dict[str, int]:
    """Rows of each stage in the plan of a profile, without any model."""
    config = load([str(path)], ["model=scripted", "audit.model=scripted", f'settings.store="{store}"'], {})
    open_work.cache_clear()
    lines = make_plan(open_work(config.to_json()), environment(config, sample), Options(sample=sample))
    return {line.stage: line.due.rows for line in lines}


def test_the_profile_loads_and_its_plan_sees_the_data(shop, tmp_path):
    code, event = call(str(shop), "-o", str(tmp_path / "mine.toml"))
    assert (code, event["dataset"], event["path"]) == (0, "generic", str(tmp_path / "mine.toml"))
    assert event["unsure"] == []
    plan = planned(tmp_path / "mine.toml", tmp_path / "store")
    assert plan["summary"] == 2 and plan["preference"] == 3


def test_every_doubt_is_marked_on_its_line(shop, tmp_path):
    (shop / "clicks.csv").write_text(CLICKS.replace("customer_id", "visitor_hash"))
    _, event = call(str(shop), "-o", str(tmp_path / "mine.toml"))
    text = (tmp_path / "mine.toml").read_text()
    assert 'user_id = "visitor_hash"  # unsure: the name only resembles `visitor`' in text.splitlines()
    assert len(event["unsure"]) == text.count("  # unsure: ") == 1
    assert "1 of the guesses" in text


def test_a_store_that_is_named_stands_in_the_profile(shop, tmp_path):
    call(str(shop), "-o", str(tmp_path / "mine.toml"), "--store", "s3://bucket/x")
    assert load([str(tmp_path / "mine.toml")], (), {}).settings.store == "s3://bucket/x"


def test_what_is_there_is_replaced_only_by_force(shop, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("mine")
    code, event = call(str(shop), "-o", str(path))
    assert (code, path.read_text()) == (2, "mine") and "--force" in event["message"]
    code, _ = call(str(shop), "-o", str(path), "--force")
    assert code == 0 and tomllib.loads(path.read_text())["ingest"]["dataset"] == "generic"


def test_a_folder_that_does_not_exist_and_an_empty_one_say_so_and_write_nothing(tmp_path):
    for place in (tmp_path / "nowhere", tmp_path):
        code, event = call(str(place), "-o", str(tmp_path / "mine.toml"))
        assert code == 1 and str(place) in event["message"]
    code, event = call(str(tmp_path), "-o", str(tmp_path / "no" / "mine.toml"))
    assert code == 2 and "folder" in event["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not SHARED.exists(), reason="the shared datasets are not beside the repository")
@pytest.mark.parametrize("folder", ["microlens-50k", "movielens-posters"])
def test_the_profiles_of_the_real_folders_can_be_planned_with(folder, tmp_path):
    call(str(SHARED / folder), "-o", str(tmp_path / "mine.toml"))
    plan = planned(tmp_path / "mine.toml", tmp_path / "store", sample=5)
    assert plan["preference"] == 5 and plan["score"] > 5 * 21


values = st.one_of(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.lists(st.text(), max_size=3))


@given(values, st.text(), st.text())
def test_whatever_stands_in_a_name_the_line_is_valid_toml_that_says_it(value, unsure, note):
    assert tomllib.loads(written(Line("t", "key", value, unsure, note))) == {"key": value}
    assert tomllib.loads(written(Line("t", "key", value, unsure, note, off=True))) == {}


@given(st.lists(st.sampled_from(["ingest.generic", "ingest.generic.item_columns", "ingest"]), max_size=6), st.text())
def test_lines_stand_below_their_tables_in_whatever_order_they_come(tables, path):
    lines = tuple(Line(table, f"k{n}", n) for n, table in enumerate(tables))
    told = tomllib.loads(profile(Proposal("generic", lines), path))
    assert told["ingest"]["path"] == path
    for line in lines:
        at = told
        for name in line.table.split("."):
            at = at[name]
        assert at[line.key] == line.value
