"""What would be sent to a Prefect server, and what is in prefect.yaml; no server takes part."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.automations import Posture
from prefect.cli.deploy._config import _load_deploy_configs_and_actions
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import load_flow_from_entrypoint
from prefect.server.events.schemas.automations import Automation as ServerAutomation
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate
from rich.console import Console

from flows import automations, events
from flows.commands.run import perform
from flows.deployments import JOB_ENVIRONMENT, collect, deployments, install, refuse_relative
from flows.pipeline import NAMES, pipeline
from mllmsrec_core.errors import UsageError
from storage.files import SECRET
from storage.store import Store
from tasks.config import Config, Options, Pipeline, Settings

ROOT = Path(__file__).parents[2]
NIGHTLY = "0 3 * * *"
NOBODY = "http://127.0.0.1:9/api"  # the port of `discard`, which nobody serves


@pytest.fixture
def made(small: Any) -> list[RunnerDeployment]:
    return deployments(small(), Options(budget_minutes=60), cron=NIGHTLY, pool="night")


def told(deployment: RunnerDeployment) -> tuple[Config, Options]:
    """What the flow would be called with, read back from the plain values that travel."""
    values = deployment.parameters
    return Config(
        Settings.model_validate(values["settings"]), Pipeline.model_validate(values["params"])
    ), Options.model_validate(values["options"])


# --- deployments ----------------------------------------------------------------------------------------------------


def test_the_pipeline_each_stage_and_gc_are_deployed_under_dataset_and_environment(made):
    flows = ["mllmsrec", *(f"mllmsrec-{stage}" for stage in NAMES), "mllmsrec-gc"]
    assert [deployment.full_name for deployment in made] == [f"{flow}/demo-dev" for flow in flows]


def test_the_entrypoint_of_a_deployment_is_the_flow_it_is_named_after(made):
    for deployment in made:
        assert load_flow_from_entrypoint(str(deployment.entrypoint)).name == deployment.flow_name


def test_the_parameters_are_plain_and_valid_in_the_form_of_their_flow(made):
    for deployment in made:
        schema = parameter_schema(load_flow_from_entrypoint(str(deployment.entrypoint))).model_dump()
        assert yaml.safe_load(yaml.safe_dump(deployment.parameters)) == deployment.parameters
        validate(deployment.parameters, schema, raise_on_error=True)
        with pytest.raises(ValidationError, match="surprise"):
            validate({"settings": {"surprise": 1}}, schema, raise_on_error=True)


def test_what_a_run_is_told_is_the_configuration_it_was_deployed_with(small, made):
    for deployment in made[:-1]:
        config, options = told(deployment)
        assert config.to_json() == small().to_json()
        assert options == Options(budget_minutes=60)
    assert made[-1].parameters == {"settings": small().settings.model_dump(mode="json"), "dataset": "demo"}


def test_only_the_pipeline_has_a_schedule_and_it_is_paused(made):
    (schedule,) = made[0].schedules or []
    assert (schedule.schedule.cron, schedule.schedule.timezone, schedule.active) == (NIGHTLY, "UTC", False)
    assert [deployment.schedules for deployment in made[1:]] == [[]] * (len(made) - 1)


def test_without_a_cron_nothing_is_scheduled(small):
    assert [deployment.schedules for deployment in deployments(small())] == [[]] * (len(NAMES) + 2)


def test_a_cron_that_is_none_is_refused_with_one_that_is(small):
    with pytest.raises(UsageError, match=r'write "0 3 \* \* \*"'):
        deployments(small(), cron="every night")


def test_runs_of_one_environment_wait_for_each_other(made):
    for deployment in made:
        assert deployment.concurrency_limit == 1
        assert str(deployment.concurrency_options.collision_strategy.value) == "ENQUEUE"
        assert (deployment.work_pool_name, deployment.work_queue_name) == ("night", "demo-dev")


def test_a_job_works_in_the_folder_of_the_caller_and_reports_nothing_home(made, tmp_path, monkeypatch, small):
    assert {deployment.job_variables["working_dir"] for deployment in made} == {str(Path.cwd())}
    monkeypatch.chdir(tmp_path)
    assert deployments(small())[0].job_variables["working_dir"] == str(tmp_path)
    assert JOB_ENVIRONMENT["DO_NOT_TRACK"] == "1"
    assert JOB_ENVIRONMENT["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert all(deployment.job_variables["env"] == JOB_ENVIRONMENT for deployment in made)


def test_the_heartbeat_a_job_is_told_is_the_one_prefect_then_uses(monkeypatch):
    for name, value in JOB_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    flows_settings = type(get_current_settings().flows)()
    assert flows_settings.heartbeat_frequency == automations.HEARTBEAT_SECONDS
    assert automations.SILENCE.total_seconds() >= 3 * automations.HEARTBEAT_SECONDS


def test_deployments_say_their_dataset_and_environment_as_tags(made):
    assert {tuple(deployment.tags) for deployment in made} == {("mllmsrec", "dataset:demo", "env:dev")}


@pytest.mark.parametrize("store", ["store", "./store", "../store", "~/store", "file://store", ""])
def test_a_relative_store_is_refused_with_what_to_write(store, small):
    with pytest.raises(UsageError, match=r"write --store /\S+, or a URL such as s3://"):
        refuse_relative(store)


@pytest.mark.parametrize("store", ["/srv/store", "file:///srv/store", "s3://bucket/store", "gs://bucket"])
def test_a_store_that_every_worker_finds_is_not_refused(store):
    refuse_relative(store)


def test_nothing_is_built_for_a_relative_store(small):
    with pytest.raises(UsageError, match="relative"):
        deployments(small(store="./store"))


def test_without_a_server_to_put_it_on_the_command_that_starts_one_is_named(made):
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(UsageError, match="none is configured"):
        install(made)


def test_a_server_that_does_not_answer_is_named(made):
    with temporary_settings({PREFECT_API_URL: NOBODY}), pytest.raises(UsageError, match=f"answers at {NOBODY}"):
        install(made)


@pytest.mark.parametrize("what", [install, lambda made: perform(told(made[0])[0], Options(), None, as_json=True)])
def test_a_server_that_refuses_the_login_says_which_variable_holds_it(made, what):
    with closed_server() as url, temporary_settings({PREFECT_API_URL: url}):
        with pytest.raises(UsageError, match="PREFECT_API_AUTH_STRING") as error:
            what(made)
    assert url in str(error.value)


def test_a_run_that_reaches_no_server_says_so_in_one_sentence(made):
    with temporary_settings({PREFECT_API_URL: NOBODY}), pytest.raises(UsageError, match=f"answers at {NOBODY}"):
        perform(told(made[0])[0], Options(), None, as_json=True)


@contextmanager
def closed_server() -> Iterator[str]:
    """The address of a server that wants a login of everybody."""

    class Closed(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_PUT = do_PATCH = answer

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Closed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def test_gc_as_a_flow_removes_what_gc_removes(small, run_all):
    config = small()
    run_all(config)
    run_all(small(caption__prompt='"What is it?"'))
    store = Store(config.settings.store)
    before = set(store.tables.writes())
    seen = _logged(lambda: collect.fn(config.settings, grace_hours=0, keep=1, dry_run=True))
    assert set(store.tables.writes()) == before
    assert _logged(lambda: collect.fn(config.settings, grace_hours=0, keep=1)) == seen > 0
    assert set(store.tables.writes()) < before


def _logged(call: Any) -> Any:
    """The flow's function outside a run, where Prefect's loggers would refuse to work."""
    from prefect.logging import disable_run_logger

    with disable_run_logger():
        return call()


# --- the form in the UI ---------------------------------------------------------------------------------------------


def leaves(node: dict[str, Any], defined: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Every field of a form that holds a value, by its path."""
    if "$ref" in node:
        node = {**defined[node["$ref"].rpartition("/")[2]], **node}
    if len(node.get("allOf", ())) == 1:
        node = {**defined[node["allOf"][0]["$ref"].rpartition("/")[2]], **node}
    if "properties" not in node:
        yield ".".join(path), node
    for name, field in node.get("properties", {}).items():
        yield from leaves({**field, "asked": name in node.get("required", ())}, defined, (*path, name))


FORM = parameter_schema(pipeline).model_dump()
LEAVES = dict(leaves(FORM, FORM["definitions"]))


def test_every_field_of_the_form_has_a_title_says_what_it_is_and_need_not_be_filled():
    assert len(LEAVES) > 100
    assert [path for path, field in LEAVES.items() if not field.get("title")] == []
    assert [path for path, field in LEAVES.items() if not field.get("description")] == []
    assert [path for path, field in LEAVES.items() if field["asked"]] == []


def test_a_choice_among_names_is_a_dropdown():
    choices = ("settings.engine", "options.order", "params.dtype", "params.ingest.dataset", "params.preference.mode")
    assert all(len(LEAVES[path]["enum"]) > 1 for path in choices)


def test_no_field_of_the_form_holds_a_secret():
    suspect = {path for path in LEAVES if SECRET.search(path) and not path.endswith("max_tokens")}
    assert suspect == {"settings.api_key_env"}, "the name of a variable"
    assert not any(field.get("format") == "password" for field in LEAVES.values())


@pytest.mark.parametrize(
    "others",
    [
        {"ingest__dataset": '"generic"', "ingest__path": '"s3://AKIA:hunter2@bucket/x"'},
        {"settings__endpoints": '["http://user:hunter2@host/v1"]'},
        {"settings__vllm": '{hf_token="hunter2"}'},
        {"settings__image_roots": '["s3://AKIA:hunter2@bucket/x"]'},
    ],
)
def test_credentials_never_reach_the_server(small, others):
    with pytest.raises(UsageError, match="environment") as error:
        deployments(small(**others))
    assert "hunter2" not in str(error.value)


# --- automations ----------------------------------------------------------------------------------------------------


def crash(
    run_count: int,
    flow: str = "mllmsrec",
    tags: tuple[str, ...] = ("mllmsrec", "env:dev"),
    deployments: tuple[str, ...] = ("1",),
) -> ReceivedEvent:
    """The event that a server sends when a run is marked Crashed."""
    related = [
        {"prefect.resource.id": "prefect.flow.1", "prefect.resource.role": "flow", "prefect.resource.name": flow},
        *(
            {"prefect.resource.id": f"prefect.deployment.{one}", "prefect.resource.role": "deployment"}
            for one in deployments
        ),
        *({"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in tags),
    ]
    return ReceivedEvent(
        occurred=datetime.now(UTC),  # type: ignore[arg-type]
        event="prefect.flow-run.Crashed",
        resource={"prefect.resource.id": "prefect.flow-run.1", "prefect.run-count": str(run_count)},  # type: ignore[arg-type]
        related=related,  # type: ignore[arg-type]
        id=UUID(int=1),
    )


def on_server(automation: Any) -> EventTrigger:
    """The trigger as a server reads it."""
    read = ServerAutomation.model_validate(automation.model_dump(mode="json"))
    assert isinstance(read.trigger, EventTrigger)
    return read.trigger


def test_a_crashed_pipeline_starts_again_twice_and_then_stays_crashed():
    trigger = on_server(automations.restarts())
    assert [count for count in range(10) if trigger.covers(crash(count))] == [1, 2]
    assert trigger.starts_after("prefect.flow-run.Crashed")
    assert not trigger.starts_after("prefect.flow-run.Failed")


def test_a_crashed_pipeline_that_somebody_starts_or_cancels_meanwhile_is_not_started_again():
    trigger = on_server(automations.restarts())
    assert trigger.posture == Posture.Proactive
    assert trigger.within >= timedelta(seconds=60)
    assert all(
        trigger.expects(f"prefect.flow-run.{name}") for name in ("AwaitingRetry", "Pending", "Running", "Cancelled")
    )
    assert not trigger.expects("prefect.flow-run.Crashed")


def test_a_stage_alone_and_runs_of_others_are_not_started_again():
    trigger = on_server(automations.restarts())
    assert not trigger.covers(crash(1, flow="mllmsrec-caption"))
    assert not trigger.covers(crash(1, tags=("env:dev",)))


def test_a_run_of_the_command_line_is_marked_dead_but_neither_started_again_nor_told():
    dead = crash(1, deployments=())
    assert on_server(automations.dead_runs()).covers(dead)
    assert not on_server(automations.restarts()).covers(dead)
    assert not on_server(automations.failure_notice(UUID(int=2))).covers(dead)


def test_silence_after_a_heartbeat_is_death_unless_the_run_ended_or_was_set_aside():
    trigger = on_server(automations.dead_runs())
    assert trigger.starts_after("prefect.flow-run.heartbeat")
    assert trigger.for_each == {"prefect.resource.id"}
    for name in ("heartbeat", "Completed", "Failed", "Cancelled", "Crashed", "AwaitingRetry", "Suspended"):
        assert trigger.expects(f"prefect.flow-run.{name}")
    assert not trigger.expects("prefect.flow-run.Running")
    assert trigger.covers(crash(1, flow="mllmsrec-caption"))
    assert not trigger.covers(crash(1, tags=("somebody-elses",)))


def test_a_dead_run_is_crashed_within_three_minutes_and_not_for_one_late_heartbeat():
    slack = timedelta(seconds=30 + automations.HEARTBEAT_SECONDS)  # the server's loop, and the heartbeat just missed
    assert automations.SILENCE + slack <= timedelta(minutes=3)
    assert automations.SILENCE >= timedelta(seconds=3 * automations.HEARTBEAT_SECONDS)


def test_a_failed_run_and_a_metric_below_its_bar_are_told_and_a_good_run_is_not():
    failed, low = automations.failure_notice(UUID(int=2)), automations.metric_notice(UUID(int=2))
    trigger = on_server(failed)
    assert {name for name in (*automations.ENDED, "TimedOut") if trigger.expects(f"prefect.flow-run.{name}")} == {
        "Failed", "TimedOut", "Crashed",
    }  # fmt: skip
    assert trigger.covers(crash(1)) and trigger.covers(crash(1, flow="mllmsrec-caption"))
    assert not trigger.covers(crash(1, tags=("somebody-elses",)))
    assert on_server(low).expects(events.BELOW) and not on_server(low).expects(events.METRIC)
    for notice in (failed, low):
        (action,) = ServerAutomation.model_validate(notice.model_dump(mode="json")).actions
        assert action.block_document_id == UUID(int=2)  # type: ignore[union-attr]


# --- prefect.yaml ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read() -> list[dict[str, Any]]:
    """The deployments of prefect.yaml, as `prefect deploy` reads them; it skips a file it finds wrong."""
    said = StringIO()
    configs, actions = _load_deploy_configs_and_actions(ROOT / "prefect.yaml", console=Console(file=said))
    assert said.getvalue() == ""
    assert actions["pull"] == []
    return configs


def test_the_file_holds_the_deployments_that_the_command_makes(read, made):
    assert [one["entrypoint"] for one in read] == [deployment.entrypoint for deployment in made]
    assert {one["name"] for one in read} == {deployment.name for deployment in made}
    assert {tuple(one["tags"]) for one in read} == {tuple(deployment.tags) for deployment in made}


def test_the_file_and_the_command_tell_jobs_and_servers_the_same(read):
    for one in read:
        assert one["work_pool"]["job_variables"]["env"] == JOB_ENVIRONMENT
        assert one["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
        refuse_relative(one["parameters"]["settings"]["store"])
        flow = load_flow_from_entrypoint(one["entrypoint"])
        validate(one["parameters"], parameter_schema(flow).model_dump(), raise_on_error=True)


def test_in_the_file_too_only_the_pipeline_is_scheduled_and_paused(read):
    assert [schedule["active"] for one in read for schedule in one.get("schedules", ())] == [False]
    assert "schedules" in read[0]


def test_the_pool_in_the_file_and_of_the_command_is_the_one_the_composed_worker_serves(read, small):
    worker = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["worker"]["command"]
    served = worker[worker.index("--pool") + 1]
    assert {one["work_pool"]["name"] for one in read} == {served}
    assert deployments(small())[0].work_pool_name == served


def test_the_run_book_names_no_deployment_that_is_not_made(made):
    text = (ROOT / "docs" / "operations.md").read_text()
    named = set(re.findall(r"(mllmsrec(?:-[a-z]+)?)/(?:generic-dev|DATASET-ENV)", text))
    assert named and named <= {deployment.flow_name for deployment in made}
