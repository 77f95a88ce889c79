"""The pipeline on a Ray cluster of two nodes: the tables it publishes alone, also when a node is lost in the middle."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mllmsrec_core.errors import UsageError

if not os.environ.get("REQUIRE_SERVICES"):  # `make test-services` may not pass without it
    pytest.importorskip("prefect_ray", reason="Ray is not installed: pip install -e '.[ray]'")

from prefect.testing.utilities import prefect_test_harness
from ray.cluster_utils import Cluster

from flows.pipeline import pipeline
from tasks.work import open_work

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
SHARDS = 4
# One shard at a time on each node, and some 30 questions a second of each, so that a shard of `score` takes seconds.
NODE = {"num_cpus": 1, "object_store_memory": 80 * 1024**2, "include_dashboard": False}
SLOW = {"settings__scripted_seconds": 0.03, "settings__window": 1, "ingest__demo__users": 30}


@pytest.fixture(scope="module", autouse=True)
def prefect() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def cluster() -> Iterator[tuple[Cluster, Any]]:
    """A head and the node that may be lost; a connection of ours to it is closed by then."""
    made = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        yield made, made.add_node(num_cpus=1, object_store_memory=NODE["object_store_memory"])
    finally:
        made.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, run_all: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The records of a run by one process."""
    from flows.settings import load
    from tests.conftest import small_sets

    slow = {name: value for name, value in SLOW.items() if not name.startswith("settings")}
    return run_all(load(["demo"], small_sets(tmp_path_factory.mktemp("alone") / "store", **slow), {}))


def on_ray(config: Any) -> dict[str, Any]:
    """The records of a run on the cluster that the configuration names."""
    open_work.cache_clear()
    pipeline(config.params, config.settings)
    return open_work(config.to_json()).store.envs.current("dev")["stages"]


def digests(records: dict[str, Any]) -> dict[str, str]:
    return {table: made["digest"] for record in records.values() for table, made in record["tables"].items()}


def at_work(store: Path, stage: str) -> list[dict[str, Any]]:
    """What the shards of a stage that are at work now, or died at it, have left."""
    found = []
    for path in store.glob(f"runs/{stage}.*/*.json"):
        try:
            found.append(json.loads(path.read_text()))
        except (FileNotFoundError, ValueError):
            continue  # it has just ended, or begun
    return found


@contextmanager
def watched(look: Callable[[], bool]) -> Iterator[threading.Event]:
    """While open, `look` is called again and again until it says that it is done; whether it did."""
    over, done = threading.Event(), threading.Event()

    def loop() -> None:
        while not over.is_set() and not done.is_set():
            if look():
                done.set()
            time.sleep(0.02)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def test_two_nodes_share_every_stage_and_publish_what_one_process_publishes(small, cluster, alone, tmp_path):
    config = small(settings__runner='"ray"', settings__ray_address=f'"{cluster[0].address}"',
                   settings__shards=SHARDS, **SLOW)  # fmt: skip
    with watched(lambda: len(at_work(tmp_path / "store", "score")) == 2) as both_at_work:
        records = on_ray(config)
    assert digests(records) == digests(alone)
    assert both_at_work.is_set()
    for name in ("caption", "summary", "score"):
        counts = records[name]["counts"]
        assert counts["asked"] == counts["asked_by_shards"] >= alone[name]["counts"]["asked"] > 0


def test_shards_for_which_no_node_has_a_gpu_are_refused_instead_of_waiting_for_ever(small, cluster):
    address = f'"{cluster[0].address}"'
    config = small(settings__runner='"ray"', settings__ray_address=address, settings__gpus_per_shard=1)
    with pytest.raises(UsageError, match="no node of the Ray cluster has more than 0 GPUs"):
        on_ray(config)


def test_nodes_with_another_version_of_the_package_end_the_run(small, cluster, monkeypatch):
    monkeypatch.setattr("tasks.cluster.code_digest", lambda: "of another version")
    config = small(settings__runner='"ray"', settings__ray_address=f'"{cluster[0].address}"')
    with pytest.raises(UsageError, match="another version of the package"):
        on_ray(config)


def test_a_node_that_is_lost_in_the_middle_costs_seconds_and_no_table(small, cluster, alone, tmp_path):
    config = small(settings__runner='"ray"', settings__ray_address=f'"{cluster[0].address}"',
                   settings__shards=SHARDS, **SLOW)  # fmt: skip
    store = tmp_path / "store"

    def lose_a_node() -> bool:
        if len(at_work(store, "score")) < 2:
            return False
        time.sleep(0.5)  # some fifteen questions of each
        cluster[0].remove_node(cluster[1], allow_graceful=False)
        return True

    with watched(lose_a_node) as lost:
        records = on_ray(config)
    assert lost.is_set()
    assert at_work(store, "score"), "a shard was killed at its work"
    assert digests(records) == digests(alone)
    assert records["score"]["counts"]["asked_by_shards"] > 0
