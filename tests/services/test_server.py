"""The server and the worker as docker-compose.yml starts them: healthy, closed to strangers, on Postgres, and quiet."""

from __future__ import annotations

import httpx
import pytest

from mllmsrec_core.stages import STAGES

from .composed import Composed
from .conftest import Prefect
from .outside import Outside


def test_both_are_healthy_by_the_checks_of_compose(composed: Composed, worker):
    alive = [service for service in composed.running if service.process.poll() is None]  # another test kills workers
    assert sorted(service.name for service in alive if service.healthy()) == ["server", "worker"]


def test_postgres_is_ready_by_the_check_of_compose(composed: Composed):
    assert composed.database.ready(composed.check("postgres"))


def test_the_server_asks_everybody_for_the_login(composed: Composed):
    for login in (None, ("admin", "guess")):
        answer = httpx.post(f"{composed.url}/api/flow_runs/filter", json={}, auth=login, trust_env=False)
        assert answer.status_code == 401


def test_runs_and_deployments_are_rows_in_postgres(composed: Composed, deployed):
    found = composed.database.ask(f"select count(*) from deployment where name = '{deployed}'")
    assert found == str(len(STAGES) + 2)


def test_the_server_reports_nothing_home(api: Prefect):
    settings = api.get("/admin/settings")["server"]
    assert settings["analytics_enabled"] is False
    assert settings["ui"]["show_promotional_content"] is False


def test_a_deployed_run_ends_and_the_environment_shows_what_it_made(composed: Composed, api: Prefect, worker, deployed):
    run = api.start(deployed)
    assert api.wait(run) == "Completed"
    assert set(api.stages(run)) == {stage.name for stage in STAGES}
    shown = composed.run("worker", "mllmsrec", "status", "-p", "demo")
    assert all(stage.name in shown for stage in STAGES)


def test_whoever_reaches_for_another_machine_is_seen(outside: Outside):
    with pytest.raises(httpx.ProxyError):
        httpx.get("https://example.invalid", proxy=outside.environment["HTTPS_PROXY"])
    assert outside.asked.pop() == "example.invalid:443"
