"""An S3 server of our own on a free port, and a line to it that can be made faulty.

Everything below a `url` of this folder is S3 over HTTP. Skipped where moto or s3fs is not installed.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from storage.files import Files

sys.path.append(str(Path(__file__).parent))
from faults import Proxy

KEYS = {"AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00", "AWS_SECRET_ACCESS_KEY": "planted/Secret+0123456789"}


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """`host:port` of an S3 server that lives as long as the tests."""
    why = "needs an S3 server to talk to: pip install -e '.[s3,dev]'"
    pytest.importorskip("s3fs", reason=why)
    moto = pytest.importorskip("moto.server", reason=why)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for every request
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield "{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture(scope="session")
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy


@pytest.fixture
def line(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The line to the server, without faults unless the test asks for some; credentials are in the environment."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**KEYS, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    proxy.mend()
    yield proxy
    proxy.mend()


@pytest.fixture
def options(line: Proxy) -> dict[str, Any]:
    """What leads to the line. botocore gives up at once, so that our own patience is what is tested, and soon."""
    config = {"connect_timeout": 1, "read_timeout": 1, "retries": {"total_max_attempts": 1}}
    return {"endpoint_url": line.url, "config_kwargs": config}


@pytest.fixture
def url(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """The root of an empty store in a bucket of its own, which `Files(url)` finds without options."""
    monkeypatch.setitem(fsspec.config.conf, "s3", options)  # as FSSPEC_S3_ENDPOINT_URL and the like do
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}/store"


@pytest.fixture
def files(url: str) -> Files:
    return Files(url)


@pytest.fixture
def during(line: Proxy) -> Callable[..., Any]:
    """`during(["stall"], action)`: what `action` returns while the next requests meet these faults, all of them."""

    def run(faults: list[Any], action: Callable[[], Any]) -> Any:
        line.script.extend(faults)
        answer = action()
        assert not line.script, "the action was over before the faults were"
        return answer

    return run
