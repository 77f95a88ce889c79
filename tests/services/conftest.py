"""A Prefect server on a Postgres and a worker, started as docker-compose.yml starts them, shared by every test here.

`make test-services` installs what they need and runs them. By hand they are skipped where something is missing; with
REQUIRE_SERVICES=1, as make sets it, that is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from . import database
from .composed import Composed, Service
from .outside import Outside

CHROMIUM = "/usr/bin/chromium"
SHOP = {"model": "scripted", "audit.model": "scripted", "ingest.demo.items": 30, "ingest.demo.users": 10}
ENDED = {"Completed", "Cached", "Failed", "Crashed", "Cancelled", "TimedOut"}


def missing() -> list[str]:
    """What `sh tests/services/install` and the extra `services` would bring."""
    wanted = ("playwright", "check_jsonschema", "moto", "prefect_ray")
    packages = [name for name in wanted if importlib.util.find_spec(name) is None]
    programs = {
        "Postgres": database.programs(),
        "Chromium": shutil.which(CHROMIUM),
        "a user who may run Postgres": os.getuid() or shutil.which("runuser"),
    }
    return packages + [name for name, found in programs.items() if not found]


@pytest.fixture(scope="session")
def everything_is_there() -> None:
    """Skips, or fails where these tests are required, with what is missing."""
    if gone := missing():
        why = f"missing: {', '.join(gone)}; `make test-services` installs them"
        pytest.fail(why) if os.environ.get("REQUIRE_SERVICES") else pytest.skip(why)


@pytest.fixture(scope="session")
def outside() -> Iterator[Outside]:
    """What every service takes for the rest of the world."""
    with Outside() as outside:
        yield outside


@pytest.fixture(scope="session")
def composed(
    everything_is_there: None, tmp_path_factory: pytest.TempPathFactory, outside: Outside
) -> Iterator[Composed]:
    """Postgres and the server; healthy. Nothing that ran may have reached for another machine by the end."""
    folder = tmp_path_factory.mktemp("composed")
    made = Composed(folder, {"STORE": str(folder / "store")}, outside.environment)
    try:
        made.start("server")
        yield made
        assert outside.asked == []
    finally:
        made.stop()


@pytest.fixture
def worker(composed: Composed) -> Service:
    """A worker that is healthy: the one of the test before, if it lived."""
    alive = [one for one in composed.running if one.name == "worker" and one.process.poll() is None]
    return alive[0] if alive else composed.start("worker")


@pytest.fixture(scope="session")
def api(composed: Composed) -> Iterator[Prefect]:
    user, password = composed.secret("prefect_login").split(":", 1)
    with httpx.Client(base_url=f"{composed.url}/api", auth=(user, password), timeout=60, trust_env=False) as client:
        yield Prefect(client)


@pytest.fixture(scope="session")
def shop() -> list[str]:
    """`--set` values of a small shop without a model."""
    return [f"{name}={value}" for name, value in SHOP.items()]


@pytest.fixture(scope="session")
def deploy(composed: Composed, shop: list[str]) -> Callable[..., str]:
    """`deploy("--env", "night")`: the pipeline, each stage and gc of the small shop, by the command of the run book."""
    sets = [word for value in shop for word in ("--set", value)]
    return lambda *options: composed.run("worker", "mllmsrec", "deploy", "-p", "demo", *sets, *options)


@pytest.fixture(scope="session")
def deployed(deploy: Callable[..., str]) -> str:
    """The name of the deployments of the environment `dev`."""
    deploy()
    return "demo-dev"


class Prefect:
    """The server's API as far as these tests ask it. Errors of the server are raised."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def get(self, path: str) -> Any:
        return self._read(self.client.get(path))

    def post(self, path: str, **body: Any) -> Any:
        return self._read(self.client.post(path, json=body))

    def deployment(self, name: str, flow: str = "mllmsrec") -> dict[str, Any]:
        return self.get(f"/deployments/name/{flow}/{name}")

    def start(self, name: str, **parameters: Any) -> str:
        """The id of a new run of the deployed pipeline; `parameters` stand in for whole ones of the deployment."""
        found = self.deployment(name)
        return self.post(f"/deployments/{found['id']}/create_flow_run", parameters=parameters)["id"]

    def run(self, run: str) -> dict[str, Any]:
        return self.get(f"/flow_runs/{run}")

    def wait(self, run: str, seconds: float = 180, until: frozenset[str] | set[str] = ENDED) -> str:
        """The name of the state once it is one of `until`. Fails the test with the run's log if it takes longer."""
        state = wait_for(lambda: (name := self.run(run)["state"]["name"]) in until and name, seconds)
        return state or pytest.fail(f"after {seconds} s the run is {self.run(run)['state']}:\n{self.log(run)}")

    def runs(self, **filters: Any) -> list[dict[str, Any]]:
        """Of a flow, a deployment, ...: Prefect's filters; oldest first."""
        return self.post("/flow_runs/filter", sort="EXPECTED_START_TIME_ASC", limit=200, **filters)

    def stages(self, run: str) -> dict[str, str]:
        """Stage -> state, once every task has ended: the server records them some seconds late."""

        def states() -> dict[str, str]:
            tasks = self.post("/task_runs/filter", flow_runs={"id": {"any_": [run]}})
            return {task["name"]: task["state"]["name"] for task in tasks}

        wait_for(lambda: len(found := states()) >= 9 and set(found.values()) <= ENDED, 60)
        return states()

    def log(self, run: str) -> str:
        lines = self.post("/logs/filter", logs={"flow_run_id": {"any_": [run]}}, sort="TIMESTAMP_ASC")
        return "\n".join(line["message"] for line in lines)

    def _read(self, answer: httpx.Response) -> Any:
        assert answer.is_success, f"{answer.request.url}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None


def wait_for(found: Callable[[], Any], seconds: float, pause: float = 0.5) -> Any:
    """What `found` returns once it is true; false if that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(pause)
    return value


def answers(store: Path) -> int:
    """How many questions have a durable answer."""
    parts = list(store.glob("replies/**/*.parquet"))
    return pl.concat([pl.read_parquet(part, columns=["key"]) for part in parts])["key"].n_unique() if parts else 0
