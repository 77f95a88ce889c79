"""A schedule that somebody switched on fires by itself, again and again, and what stands is not done again."""

from __future__ import annotations

from mllmsrec_core.stages import STAGES

from .composed import Composed
from .conftest import Prefect, wait_for

NAMES = [stage.name for stage in STAGES]
EVERY_MINUTE = "* * * * *"  # the shortest that a cron can say


def test_a_new_schedule_sleeps_then_fires_twice_and_the_second_run_is_cached(
    composed: Composed, api: Prefect, worker, deploy
):
    deploy("--env", "night", "--store", str(composed.folder / "night"), "--cron", EVERY_MINUTE)
    deployment = api.deployment("demo-night")
    (schedule,) = deployment["schedules"]
    assert schedule["active"] is False

    def ended() -> list[dict]:
        runs = api.runs(deployments={"id": {"any_": [deployment["id"]]}})
        return [run for run in runs if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED")]

    switch = ["prefect", "deployment", "schedule"]
    composed.run("worker", *switch, "resume", "mllmsrec/demo-night", schedule["id"])
    fired = wait_for(lambda: len(found := ended()) >= 2 and found[:2], 240, pause=2)
    composed.run("worker", *switch, "pause", "mllmsrec/demo-night", schedule["id"])
    assert fired, worker.said()[-4000:]
    first, second = fired
    assert [(run["auto_scheduled"], run["state"]["name"]) for run in fired] == [(True, "Completed")] * 2
    assert "scheduled" in first["name"]
    assert api.stages(first["id"]) == dict.fromkeys(NAMES, "Completed")
    assert api.stages(second["id"]) == dict.fromkeys(NAMES, "Cached")
