"""The server on Postgres under load, and after a machine died: no lock errors, nothing asked twice, nothing left Running."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mllmsrec_core.stages import STAGES
from storage.store import Store

from .composed import ROOT, Composed
from .conftest import Prefect, answers, wait_for

AT_ONCE, EACH = 4, 13  # processes, and whole runs of each, one after another: 52
LOCKED = re.compile(r"deadlock|database is locked|lock timeout|could not obtain lock|could not serialize", re.I)
NAMES = {stage.name for stage in STAGES}
RUNS = f"""
from flows.settings import load
from flows.pipeline import pipeline
import sys
config = load(["demo"], sys.argv[1:])
for _ in range({EACH}):
    assert pipeline(config.params, config.settings, return_state=True).name == "Completed"
"""


def test_fifty_runs_at_once_and_no_lock_error(composed: Composed, api: Prefect, shop: list[str]):
    store = composed.folder / "busy"
    environment = {**composed.environment("worker"), "MLLMSREC_STORE": str(store)}
    command = ["sh", str(ROOT / "docker" / "with-secrets"), sys.executable, "-c", RUNS, *shop]
    before = {run["id"] for run in api.runs()}
    logs = [(composed.folder / f"busy-{number}.log").open("w+") for number in range(AT_ONCE)]
    busy = [subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log) for log in logs]
    assert [process.wait(400) for process in busy] == [0] * AT_ONCE, [
        Path(log.name).read_text()[-2000:] for log in logs
    ]
    runs = [run for run in api.runs() if run["id"] not in before]
    assert [run["state"]["name"] for run in runs] == ["Completed"] * (AT_ONCE * EACH)
    assert set(api.stages(runs[-1]["id"]).values()) == {"Cached"}
    said = composed.running[0].said() + composed.database.said()
    assert "Check out the dashboard" in said and LOCKED.findall(said) == []


def test_a_run_whose_worker_died_with_it_is_crashed_within_three_minutes_and_the_next_one_goes_on(
    composed: Composed, api: Prefect, worker, deployed
):
    store = composed.folder / "crashed"
    slowly = {**api.deployment(deployed)["parameters"]["settings"], "store": str(store), "env": "crashed"}
    # eight questions a second, each durable at once
    run = api.start(deployed, settings={**slowly, "window": 8, "scripted_seconds": 1, "flush_seconds": 0.1})
    assert wait_for(lambda: answers(store) > 45, 120), api.log(run)
    assert len(worker.kill()) > 1, "the worker had no run to die with it"
    died, durable = datetime.now(UTC), answers(store)
    assert api.run(run)["state"]["name"] == "Running"
    api.wait(run, 185, {"Crashed", "AwaitingRetry"})
    assert datetime.now(UTC) - died < timedelta(minutes=3)

    composed.start("worker")  # as compose would: `restart: unless-stopped`
    assert api.wait(run, 240, {"Completed", "Failed"}) == "Completed", api.log(run)
    assert api.run(run)["run_count"] == 2
    shown = Store(str(store)).envs.current("crashed")["stages"]
    assert set(shown) == NAMES
    asked = sum(made["counts"]["asked"] for made in shown.values() if datetime.fromisoformat(made["at"]) > died)
    assert 0 < asked == answers(store) - durable
