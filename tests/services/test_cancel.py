"""A run that somebody cancels ends as Cancelled, keeps what was answered, and is not started again."""

from __future__ import annotations

import time
from pathlib import Path

from .composed import Composed
from .conftest import Prefect, wait_for


def test_a_run_that_is_cancelled_in_the_middle_of_a_stage_is_cancelled_and_nothing_else(
    composed: Composed, api: Prefect, worker, deployed
):
    store = composed.folder / "cancelled"
    slowly = {**api.deployment(deployed)["parameters"]["settings"], "store": str(store), "env": "cancelled"}
    run = api.start(deployed, settings={**slowly, "window": 4, "scripted_seconds": 1, "flush_seconds": 60})
    assert wait_for(lambda: "caption: begins" in api.log(run), 120), api.log(run)
    time.sleep(3)  # a dozen questions, of 30
    api.post(f"/flow_runs/{run}/set_state", state={"type": "CANCELLING"})
    assert api.wait(run, 90) == "Cancelled", api.log(run)
    states = [state["name"] for state in api.get(f"/flow_run_states/?flow_run_id={run}")]
    assert "Crashed" not in states and states[-2:] == ["Cancelling", "Cancelled"], "only a crash is started again"
    assert captions(store), "what was answered a moment before is durable"
    assert "Traceback" not in api.log(run)


def captions(store: Path) -> list[Path]:
    return list(store.glob("replies/generate/**/*.parquet"))
