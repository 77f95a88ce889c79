"""The Prefect flows: what the UI would show of a run, and what a stage alone may and may not do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

from flows.deployments import deployments, install
from flows.pipeline import NAMES, STAGE_FLOWS, pipeline
from mllmsrec_core.ask import Ask, Reply
from mllmsrec_core.errors import EngineError, UsageError
from storage.blobs import Blobs
from tasks.config import Options
from tasks.engines.scripted import ScriptedEngine
from tasks.work import open_work


@pytest.fixture(scope="module", autouse=True)
def prefect() -> Iterator[None]:
    """A Prefect database of this module's own; started once, because it takes longer than all that is tested."""
    with prefect_test_harness(server_startup_timeout=180):
        yield


def run(config: Any, **how: Any) -> Any:
    open_work.cache_clear()
    return pipeline(config.params, config.settings, Options(**how), return_state=True)


def stage_runs(state: Any) -> dict[str, str]:
    """Task run name -> state name, of one flow run."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        return {task.name: task.state_name or "" for task in client.read_task_runs(flow_run_filter=chosen)}


def records(config: Any, env: str = "dev") -> dict[str, Any]:
    return open_work(config.to_json()).store.envs.current(env)["stages"]


def test_a_second_run_shows_every_stage_as_cached_and_opens_no_engine(small):
    config = small()
    first, second = run(config), run(config)
    assert stage_runs(first) == dict.fromkeys(NAMES, "Completed")
    assert stage_runs(second) == dict.fromkeys(NAMES, "Cached")
    assert open_work(config.to_json()).engine_for._open == {}
    assert first.result() == second.result()


def test_a_stage_alone_reads_the_environment_and_moves_only_itself(small):
    config = small()
    run(config)
    before = records(config)
    edited = small(caption__prompt='"What is it?"')
    made = STAGE_FLOWS["caption"](edited.params, edited.settings)
    after = records(config)
    assert made["counts"]["asked"] == 24
    assert after["caption"]["tables"] != before["caption"]["tables"]
    assert {name: after[name] for name in NAMES if name != "caption"} == {
        name: before[name] for name in NAMES if name != "caption"
    }


def test_a_stage_alone_never_runs_what_is_upstream_but_says_how(small):
    config = small()
    with pytest.raises(UsageError, match="mllmsrec run --stage images"):
        STAGE_FLOWS["caption"](config.params, config.settings)
    assert records(config) == {}


def test_a_sample_publishes_beside_the_environment_and_the_full_run_asks_none_of_it_again(small):
    config = small()
    run(config, sample=2)
    assert records(config) == {}
    sampled = records(config, "dev.sample2")
    asked = {name: sampled[name]["counts"]["asked"] for name in ("caption", "summary", "preference")}
    assert all(asked.values())
    run(config)
    full = records(config)
    assert full["preference"]["counts"]["rows"] > sampled["preference"]["counts"]["rows"]
    assert {name: full[name]["counts"]["known"] >= asked[name] for name in asked} == dict.fromkeys(asked, True)


class Fragile(ScriptedEngine):
    """The first `dead` of these that are opened answer nothing."""

    dead = 0

    def __init__(self, blobs: Blobs, seconds: float) -> None:
        super().__init__(blobs, seconds)
        self.broken = type(self).dead > 0
        type(self).dead -= 1

    async def answer(self, ask: Ask) -> Reply:
        if self.broken:
            raise EngineError("the engine died")
        return await super().answer(ask)


@pytest.mark.parametrize(("dead", "ends"), [(1, "Completed"), (2, "Failed")])
def test_an_engine_that_breaks_gets_one_more_try_with_a_fresh_one(small, monkeypatch, dead, ends):
    monkeypatch.setattr("tasks.work.ScriptedEngine", Fragile)
    monkeypatch.setattr(Fragile, "dead", dead)
    monkeypatch.setattr("tasks.prefect_tasks.stage_task.retry_delay_seconds", 0)
    state = run(small())
    assert state.name == ends
    assert stage_runs(state)["caption"] == ends


def test_the_form_offers_every_stage_and_setting_with_its_default():
    schema = pipeline.parameters
    assert set(schema.properties) == {"params", "settings", "options"}
    offered = schema.definitions["Pipeline"]["properties"]
    assert set(NAMES) < set(offered)
    assert schema.definitions["Settings"]["properties"]["store"]["default"] == "./store"


def test_a_deployment_may_pass_plain_dicts(small):
    config = small()
    open_work.cache_clear()
    values = {
        "params": config.params.model_dump(mode="json"),
        "settings": config.settings.model_dump(mode="json"),
    }
    state = pipeline(**values, return_state=True)
    assert state.is_completed()
    assert set(stage_runs(state)) == set(NAMES)


def test_a_run_leaves_its_funnel_and_the_path_of_the_report_as_an_artifact(small):
    state = run(small())
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts()
    shown = [artifact.data for artifact in artifacts if artifact.flow_run_id == state.state_details.flow_run_id]
    tables = [data for data in shown if isinstance(data, str)]
    assert len(tables) == 1
    assert "| caption | captions | 24 |" in tables[0]
    assert state.result() in tables[0]


def test_deploying_again_keeps_the_schedule_somebody_started(small):
    def put(**how: Any) -> None:
        install(deployments(small(), **how)[:1])

    def standing() -> Any:
        with get_client(sync_client=True) as client:
            return client.read_deployment_by_name("mllmsrec/demo-dev")

    put(cron="0 3 * * *")
    first = standing()
    assert [one.active for one in first.schedules] == [False]
    with get_client(sync_client=True) as client:
        client.update_deployment_schedule(first.id, first.schedules[0].id, active=True)
    put()
    assert [(one.schedule.cron, one.active) for one in standing().schedules] == [("0 3 * * *", True)]
    put(cron="0 4 * * *")
    assert [(one.schedule.cron, one.active) for one in standing().schedules] == [("0 4 * * *", True)]
