"""What a run says before it starts shards that could not work; shards on a real cluster are in tests/services."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from mllmsrec_core.errors import UsageError
from tasks.cluster import Shards
from tasks.config import Options
from tasks.stage_task import STAGE_BY_NAME

SERVER = {PREFECT_API_URL: "http://127.0.0.1:4200/api"}
with_ray = pytest.mark.skipif(
    importlib.util.find_spec("prefect_ray") is None, reason="Ray is not installed: pip install -e '.[ray]'"
)


def test_on_threads_no_stage_is_divided_wherever_the_store_lies(small):
    with Shards(small("memory://here", settings__shards=16)) as shards:
        assert [shards.ask(name, {}, {}, Options(), None) for name in STAGE_BY_NAME] == [None] * len(STAGE_BY_NAME)


def test_without_ray_it_says_how_to_install_it(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[ray\]'"):
        Shards(small(settings__runner='"ray"'))


@with_ray
def test_a_store_that_nodes_do_not_find_is_refused_before_anything_starts(small):
    with pytest.raises(UsageError, match="relative path"):
        Shards(small("./store", settings__runner='"ray"'))


@with_ray
def test_nodes_of_a_cluster_need_a_prefect_server_that_they_reach(small):
    config = small(settings__runner='"ray"', settings__ray_address='"10.0.0.1:6379"')
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(UsageError, match="prefect server start --host"),
    ):
        Shards(config)


@with_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "somewhere"])
def test_a_cluster_that_is_not_there_is_named(small, address):
    config = small(settings__runner='"ray"', settings__ray_address=f'"{address}"')
    with temporary_settings(SERVER), pytest.raises(UsageError, match=rf"{address} .*ray start --head"):
        Shards(config)
