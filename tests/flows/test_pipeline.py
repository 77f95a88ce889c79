"""The Prefect flows: what the UI would show of a run, and what a stage alone may and may not do."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from prefect._internal.schemas.fields import CreatedBy
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.testing.utilities import prefect_test_harness

from flows import automations, events
from flows.deployments import deployments, install
from flows.pipeline import NAMES, STAGE_FLOWS, _cause, pipeline
from mllmsrec_core.ask import Ask, Reply
from mllmsrec_core.errors import EngineError, UsageError
from mllmsrec_core.stages import STAGES
from storage.blobs import Blobs
from tasks.child import StageTimeout
from tasks.config import Options
from tasks.engines.scripted import ScriptedEngine
from tasks.prefect_tasks import gpu_slot
from tasks.work import open_work


@pytest.fixture(scope="module", autouse=True)
def prefect() -> Iterator[None]:
    """A Prefect database of this module's own; started once, because it takes longer than all that is tested."""
    with prefect_test_harness(server_startup_timeout=180):
        yield


def run(config: Any, **how: Any) -> Any:
    open_work.cache_clear()
    return pipeline(config.params, config.settings, Options(**how), return_state=True)


def of(state: Any) -> FlowRunFilter:
    """The flow run that ended in this state."""
    return FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))


def stage_runs(state: Any) -> dict[str, str]:
    """Task run name -> state name, of one flow run."""
    with get_client(sync_client=True) as client:
        return {task.name: task.state_name or "" for task in client.read_task_runs(flow_run_filter=of(state))}


def records(config: Any, env: str = "dev") -> dict[str, Any]:
    return open_work(config.to_json()).store.envs.current(env)["stages"]


def test_a_second_run_shows_every_stage_as_cached_and_opens_no_engine(small):
    config = small()
    first, second = run(config), run(config)
    assert stage_runs(first) == dict.fromkeys(NAMES, "Completed")
    assert stage_runs(second) == dict.fromkeys(NAMES, "Cached")
    assert open_work(config.to_json()).engine_for._open == {}
    assert first.result() == second.result()


def test_progress_reaches_the_server_while_a_stage_is_at_work(small):
    state = run(small(settings__scripted_seconds=0.2, settings__window=4))
    run_id = ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id])
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=run_id))
    shown = {artifact.key: artifact for artifact in found if artifact.type == "progress"}
    assert set(shown) == {f"progress-{stage.name}-demo-dev" for stage in STAGES if stage.ask}
    assert {float(artifact.data) for artifact in shown.values()} == {100.0}
    caption = shown["progress-caption-demo-dev"]
    assert caption.updated > caption.created  # not at its end alone


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


def shown(state: Any) -> dict[str, Any]:
    """The artifacts of one flow run that its stages did not make: data by key."""
    with get_client(sync_client=True) as client:
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
        found = client.read_artifacts(artifact_filter=chosen)
    return {str(artifact.key): artifact.data for artifact in found if artifact.type != "progress"}


def test_a_run_leaves_plan_stages_lineage_card_metrics_and_report_under_keys_of_its_environment(small):
    config = small(settings__env='"Night_2"')
    state = run(config)
    kinds = ("plan", "stages", "lineage", "data-card", "metrics", "report", "report-link")
    made = shown(state)
    assert set(made) == {f"{kind}-demo-night-2" for kind in kinds}
    stages = open_work(config.to_json()).store.envs.current("Night_2")["stages"]
    captions = stages["caption"]["tables"]["captions"]
    assert "| caption | captions | 24 | never run | 24 |" in made["stages-demo-night-2"]
    lineage = made["lineage-demo-night-2"]
    assert captions["write_id"] in lineage and captions["digest"][:12] in lineage and "scripted@1" in lineage
    assert state.result() in made["report-demo-night-2"] and "| model |" in made["report-demo-night-2"]
    assert f"file://{state.result()}" in made["report-link-demo-night-2"]
    assert {"metric": "users", "detail": "", "value": 6.0} in json.loads(made["data-card-demo-night-2"])
    scores = json.loads(made["metrics-demo-night-2"])
    assert {row["slice"] for row in scores} == {"all"} and {"low", "high", "n_users"} < set(scores[0])


def test_the_plan_on_a_runs_page_says_what_is_due_and_why(small):
    first, second = run(small()), run(small(caption__prompt='"What is it?"'))
    assert "| caption | due | never run |" in shown(first)["plan-demo-dev"]
    plan = shown(second)["plan-demo-dev"]
    assert "| caption | due | prompt caption.prompt |" in plan
    assert "| summary |  | stands, if nothing upstream of it changes |" in plan
    stages = shown(second)["stages-demo-dev"]
    assert "| ingest | items | 24 | reused |" in stages and "upstream captions" in stages


@pytest.mark.parametrize(
    ("run_count", "scheduled", "by", "said"),
    [
        (0, False, None, "by hand"),
        (0, True, None, "scheduled"),
        (0, False, CreatedBy(type="AUTOMATION"), "by an automation"),
        (2, True, None, "retry 2"),
    ],
)
def test_the_cause_of_a_run_is_in_its_name(run_count, scheduled, by, said):
    known = FlowRun(flow_id=uuid4(), run_count=run_count, auto_scheduled=scheduled, created_by=by)
    assert _cause(known) == said


def test_a_run_is_named_after_dataset_environment_sample_and_cause(small):
    def name(state: Any) -> str:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(state.state_details.flow_run_id).name

    config = small()
    assert name(run(config, sample=2)) == "demo-dev sample 2 (by hand)"
    alone = STAGE_FLOWS["ingest"](config.params, config.settings, return_state=True)
    assert name(alone) == "ingest demo-dev (by hand)"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What stages write to their log, at whatever level Prefect's own loggers stand."""
    lines: list[str] = []
    log = logging.Logger("stages")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    monkeypatch.setattr("tasks.prefect_tasks.get_run_logger", lambda: log)
    return lines


# --- stages in a process of their own -------------------------------------------------------------------------------


def test_a_stage_over_its_limit_fails_at_once_and_the_next_run_goes_on(small):
    run(small())
    how = {"caption__prompt": '"What is it?"', "settings__scripted_seconds": 1e6}
    limited = small(**how, settings__stage_timeout_minutes=0.001)
    stuck = STAGE_FLOWS["caption"](limited.params, limited.settings, return_state=True)
    assert isinstance(stuck.result(raise_on_failure=False), StageTimeout)
    with get_client(sync_client=True) as client:
        (task,) = client.read_task_runs(flow_run_filter=of(stuck))
    assert (task.state_name, task.run_count) == ("Failed", 1), "no second try"
    assert run(small(caption__prompt='"What is it?"')).is_completed()


def test_a_stage_that_holds_a_gpu_waits_for_a_slot_and_gives_it_back(small, monkeypatch, said):
    monkeypatch.setattr("tasks.prefect_tasks.holds_gpu", lambda work, name: name == "caption")
    with get_client(sync_client=True) as client:
        automations.limit_gpus(client, None)
        assert run(small()).is_completed()
        limit = client.read_global_concurrency_limit_by_name("gpu")
        assert (limit.limit, limit.active_slots) == (1, 0)
        automations.limit_gpus(client, 3)
        automations.limit_gpus(client, None)
        assert client.read_global_concurrency_limit_by_name("gpu").limit == 3
    assert [line for line in said if "waits" in line] == ["caption: waits for a slot of the limit `gpu`"]


def test_a_limit_that_nobody_made_holds_nothing_up(monkeypatch):
    monkeypatch.setattr("tasks.prefect_tasks.GPU", "no-such-limit")
    with gpu_slot(lambda *words: None):
        pass


# --- logs and events ------------------------------------------------------------------------------------------------


def test_the_log_says_what_each_stage_is_due_for_and_what_came_of_it_and_no_secret(small, said, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-told")
    run(small())
    said.clear()
    run(small(caption__prompt='"What is it?"'))
    assert "caption: begins, due for: prompt caption.prompt" in said
    assert any(line.startswith("caption: done in ") for line in said)
    assert any(line.startswith("ingest: reused, nothing it depends on has changed since") for line in said)
    assert not any("sk-not-to-be-told" in line for line in said)


def test_automations_hear_of_stages_environments_metrics_and_metrics_below_their_bar(small, monkeypatch):
    heard: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "flows.events.emit_event", lambda event, resource, related, payload: heard.append((event, payload))
    )
    bars = "{ auc = 1.1, 'hr@10' = 0.0, speling = 0.5 }"
    run(small(settings__min_metrics=bars))
    names = [event for event, _ in heard]
    assert names.count(events.PUBLISHED) == len(NAMES)
    (moved,) = [payload for event, payload in heard if event == events.MOVED]
    assert moved["stages"] == list(NAMES) and moved["place"] == "demo-dev"
    (below,) = [payload for event, payload in heard if event == events.BELOW]
    assert (below["name"], below["least"]) == ("auc", 1.1) and below["value"] < 1.1
    assert names.count(events.METRIC) > 5
    heard.clear()
    run(small(settings__min_metrics=bars))
    assert [event for event, _ in heard] == []


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


class Mailbox(BaseHTTPRequestHandler):
    """Keeps what is posted to it."""

    received: ClassVar[Queue[dict[str, Any]]] = Queue()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.put(json.loads(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def test_a_metric_below_its_bar_reaches_somebody_through_a_block_of_prefects_own(small):
    with ThreadingHTTPServer(("127.0.0.1", 0), Mailbox) as mailbox:
        threading.Thread(target=mailbox.serve_forever, daemon=True).start()
        block = CustomWebhookNotificationBlock(
            name="loopback",
            url=f"http://127.0.0.1:{mailbox.server_port}/",
            headers=None,
            cookies=None,
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
        )
        block.save("loopback", overwrite=True)
        with get_client(sync_client=True) as client:
            with pytest.raises(UsageError, match="there is no block `custom-webhook/nobody`"):
                automations.install(client, "custom-webhook/nobody")
            names = automations.install(client, "custom-webhook/loopback")
            assert automations.install(client, "custom-webhook/loopback") == names
            assert [len(client.read_automations_by_name(name)) for name in names] == [1] * 4
        run(small(settings__min_metrics="{ auc = 1.1 }"))
        told = Mailbox.received.get(timeout=120)
        mailbox.shutdown()
    assert told["subject"] == "mllmsrec: auc of demo-dev is low"
    assert re.fullmatch(r"auc of demo-dev is 0\.\d+, below 1\.1, on \d+ users\.", told["body"])
