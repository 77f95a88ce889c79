"""docker-compose.yml is what Docker Compose accepts, and its worker reaches an S3 store as it is wired to.

Not run here: SeaweedFS itself, which Debian does not package; any other S3 server takes its place. `vllm serve` is run
as it stands in the file by `make test-vllm`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from storage.store import Store

from .composed import COMPOSE, ROOT, Composed, Service
from .conftest import Prefect, answers, wait_for

CHECK = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]


def checked(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHECK, str(path)], capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("everything_is_there")
def test_the_file_follows_the_schema_of_the_compose_specification():
    done = checked(ROOT / "docker-compose.yml")
    assert done.returncode == 0, done.stdout


@pytest.mark.usefixtures("everything_is_there")
@pytest.mark.parametrize("key", ["healthcheck", "depends_on", "secrets", "start_period"])
def test_a_misspelt_key_is_seen(tmp_path, key):
    text = (ROOT / "docker-compose.yml").read_text()
    (tmp_path / "compose.yml").write_text(text.replace(f" {key}:", f" {key[:-1]}:"))
    done = checked(tmp_path / "compose.yml")
    assert done.returncode == 1 and key[:-1] in done.stdout


@pytest.fixture
def s3(composed: Composed) -> Iterator[str]:
    """The address of an S3 server where compose has its own, with the bucket that compose makes."""
    port = composed.ports["s3"]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (composed.folder / "s3.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    bucket = f"{url}/{COMPOSE['services']['s3']['environment']['S3_BUCKET']}"
    try:
        assert wait_for(lambda: responds(url), 60)
        assert httpx.put(bucket, trust_env=False).is_success
        yield url
    finally:
        process.terminate()
        process.wait(30)


def responds(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def test_a_worker_whose_store_is_the_composed_bucket_runs_the_pipeline_there(composed: Composed, s3, shop, monkeypatch):
    monkeypatch.setitem(composed.variables, "STORE", "s3://mllmsrec/store")
    assert composed.environment("worker")["AWS_ENDPOINT_URL"] == s3
    sets = [word for value in shop for word in ("--set", value)]
    composed.run("worker", "mllmsrec", "run", "-p", "demo", *sets)
    assert "recommendations" in composed.run("worker", "mllmsrec", "status", "-p", "demo", "--json")
    listing = httpx.get(f"{s3}/mllmsrec?list-type=2&prefix=store/envs/", trust_env=False).text
    assert "store/envs/dev/" in listing


@pytest.fixture
def gpu_worker(composed: Composed) -> Iterator[Service]:
    started = composed.start("gpu-worker")
    yield started
    started.stop()


def test_the_worker_for_gpus_deploys_into_its_pool_what_asks_the_endpoint_it_is_wired_to(
    composed: Composed, api: Prefect, gpu_worker, shop
):
    sets = [word for value in shop for word in ("--set", value)]
    deploy = ("mllmsrec", "deploy", "-p", "demo", "--env", "gpu", "--pool", "gpu", "--gpus", "1")
    composed.run("gpu-worker", *deploy, *sets)
    deployment = api.deployment("demo-gpu")
    told = deployment["parameters"]["settings"]
    assert deployment["work_pool_name"] == "gpu"
    assert (told["engine"], told["endpoints"]) == ("openai", ["http://vllm:8000/v1"])
    assert told["adapter_folder"] == "/adapters", "where compose has the volume that vLLM sees too"
    assert api.get("/v2/concurrency_limits/gpu")["limit"] == 1


def test_two_workers_on_one_store_share_the_work_and_publish_the_same_tables(
    composed: Composed, api: Prefect, worker, gpu_worker, deploy
):
    store = composed.folder / "two"
    slowly = ("--store", str(store), "--set", "settings.scripted_seconds=0.5", "--set", "settings.window=4")
    deploy("--env", "left", "--pool", "cpu", *slowly)
    deploy("--env", "right", "--pool", "gpu", *slowly)
    runs = [api.start("demo-left"), api.start("demo-right")]
    assert [api.wait(run, 300) for run in runs] == ["Completed"] * 2, [api.log(run) for run in runs]
    envs = Store(str(store)).envs
    left, right = (envs.current(name)["stages"] for name in ("left", "right"))
    for name in left:
        digests = [{table: made["digest"] for table, made in one[name]["tables"].items()} for one in (left, right)]
        assert digests[0] == digests[1], name
    records = [record for one in (left, right) for record in one.values()]  # one that both show was made once
    made = {next(iter(one["tables"].values()))["write_id"]: one["counts"]["asked"] for one in records}
    assert answers(store) <= sum(made.values()) <= 1.25 * answers(store)
