"""A plan says what a run will ask and why, exactly where it can and within bounds where answers are still to come."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mllmsrec_core.stages import STAGES
from tasks.config import Settings

EDITED = '"Name the item."'


def asked(records: dict) -> dict[str, int]:
    return {name: record["counts"]["asked"] for name, record in records.items()}


def test_what_is_asked_lies_within_the_first_plan_and_a_second_plan_is_empty(small, run_all, planned):
    plan = planned(small())
    records = run_all(small())
    for name, count in asked(records).items():
        assert plan[name].due.low <= count <= plan[name].due.high, name
        assert plan[name].why == "never run"
    after = planned(small())
    assert [line.due.high for line in after.values()] == [0] * len(STAGES)
    assert not any(line.why for line in after.values())
    assert [line.due.rows for line in after.values()] == [record["counts"]["rows"] for record in records.values()]


def test_an_edited_prompt_is_priced_exactly_with_its_cause_and_a_reverted_one_costs_nothing(
    small, ran, run_all, planned
):
    edited = small(caption__prompt=EDITED)
    plan = planned(edited)
    pictures = ran["caption"]["tables"]["captions"]["rows"]
    due = plan["caption"].due
    assert (due.rows, due.low, due.high, plan["caption"].why) == (pictures, pictures, pictures, "prompt caption.prompt")
    assert plan["summary"].due.low == 0 < plan["summary"].due.high
    assert "upstream captions" in plan["summary"].why
    after = run_all(edited)
    for name, count in asked({name: record for name, record in after.items() if record != ran[name]}).items():
        assert plan[name].due.low <= count <= plan[name].due.high, name
    assert after["caption"]["counts"]["asked"] == pictures
    reverted = planned(small())
    assert [(line.due.high, line.why) for line in reverted.values()] == [(0, "")] * len(STAGES)
    assert run_all(small()) == ran


def test_a_chain_whose_later_questions_need_answers_has_an_interval(small, ran, planned):
    due = planned(small(preference__recurrent_prompt="'{previous} {items}'"))["preference"].due
    assert due.low == ran["preference"]["counts"]["rows"]
    assert due.high == ran["preference"]["tables"]["preferences"]["rows"]


def test_a_plan_changes_nothing_in_the_store(small, ran, planned, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    planned(small(caption__prompt=EDITED))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


OTHER = {
    "env": '"other"',
    "device": '"cpu"',
    "batch_size": 1,
    "window": 2,
    "flush_rows": 3,
    "flush_seconds": 0.5,
    "allow_hosts": '["example.org"]',
    "image_roots": '["/nowhere"]',
    "scratch": '"/nowhere"',
    "engine": '"openai"',
    "keep_images": '"reference"',
    "max_model_len": 2048,
    "picture_cache_gb": 0,
    "eager": "true",
    "vllm": "{max_num_seqs = 8}",
    "endpoints": '["http://127.0.0.1:1/v1"]',
    "api_key_env": '"OTHER_KEY"',
    "concurrency": 2,
    "timeout_s": 1,
    "retries": 0,
    "top_logprobs": 5,
    "served_as": '{scripted = "other"}',
    "adapters": '{abc = "other"}',
    "adapter_folder": '"/nowhere"',
    "storage_options": "{auto_mkdir = true}",
    "price_in": 1.5,
    "price_out": 3,
    "currency": '"EUR"',
    "min_coverage": 0.5,
    "scripted_seconds": 0.001,
    "runner": '"ray"',
    "shards": 4,
    "gpus_per_shard": 0.5,
    "ray_address": '"127.0.0.1:6379"',
    "stage_timeout_minutes": 5,
    "min_metrics": "{auc = 0.5}",
}


def test_no_setting_ever_reaches_a_question(small, ran, run_all, planned):
    assert {"store", *OTHER} == set(Settings.model_fields), "give the new setting another value here"
    for name, value in OTHER.items():
        plan = planned(small(**{f"settings__{name}": value}))
        assert [line.due.high for line in plan.values()] == [0] * len(STAGES), name
    every = run_all(small(**{f"settings__{name}": value for name, value in OTHER.items()}))
    assert every == ran


def test_another_store_and_window_publish_equal_tables(small, ran, run_all, tmp_path):
    other = run_all(small(store=tmp_path / "other", settings__window=1))
    digests = [{t: p["digest"] for r in run.values() for t, p in r["tables"].items()} for run in (ran, other)]
    assert digests[0] == digests[1]


PLAN = """
import sys
from flows.settings import load
from tasks.planning import make_plan
from tasks.work import open_work
sets = ["settings.store=" + sys.argv[1], "ingest.demo.items=24", "ingest.demo.users=6"] + sys.argv[2:]
lines = make_plan(open_work(load(["demo"], sets, {}).to_json()), "dev")
assert sum(line.due.high for line in lines) > 100
print(sorted({"torch", "transformers", "open_clip", "peft", "trl", "prefect"} & set(sys.modules)))
"""


@pytest.mark.parametrize("model", ["scripted", "embedded"])
def test_a_plan_loads_no_model(tmp_path, model):
    sets = ["model=scripted", "audit.model=scripted"] if model == "scripted" else []
    command = [sys.executable, "-c", PLAN, str(tmp_path / "store"), *sets]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
