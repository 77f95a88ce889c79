"""What every test may rely on: no network, nothing written outside the checkout or pytest's own folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# A database of its own for each process of a parallel run, and time for its server to start on a busy machine.
HOME = Path(os.environ.get("PREFECT_HOME", ROOT / ".prefect"), os.environ.get("PYTEST_XDIST_WORKER", ""))
HOME.mkdir(parents=True, exist_ok=True)
os.environ["PREFECT_HOME"] = str(HOME)
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.startswith("MLLMSREC_")]:
    del os.environ[name]  # a developer's own settings are no part of a test
with suppress(ImportError):  # vLLM's environment has no hypothesis, nor tests that need it
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)  # machines are shared: a slow example is no fault
    settings.load_profile("untimed")


@pytest.fixture(scope="session")
def golden() -> Callable[[str, tuple[Any, ...]], None]:
    """`golden("caption", messages)` compares a rendered prompt with tests/prompts/caption.txt."""

    def check(name: str, messages: tuple[Any, ...]) -> None:
        turns = [
            f"[{message.role}]\n"
            + "\n".join(part if isinstance(part, str) else f"[picture {part.sha256}]" for part in message.parts)
            for message in messages
        ]
        expected = (ROOT / "tests" / "prompts" / f"{name}.txt").read_text("utf-8")
        assert "\n".join(turns) + "\n" == expected, "models are trained on this wording"

    return check


def small_sets(store: Path | str, **others: Any) -> list[str]:
    """`--set` values for a demo shop of 24 items and 6 users whose every question goes to the scripted engine."""
    values = {
        "settings.store": f'"{store}"',
        "model": "scripted",
        "audit.model": "scripted",
        "ingest.demo.items": 24,
        "ingest.demo.users": 6,
        **{name.replace("__", "."): value for name, value in others.items()},
    }
    return [f"{name}={value}" for name, value in values.items()]


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Any]:
    """`small(caption__prompt='"..."')`: the configuration of a small scripted shop in this test's own store."""
    from flows.settings import load

    return lambda store=None, **others: load(["demo"], small_sets(store or tmp_path / "store", **others), {})


def every_stage(config: Any, retry: frozenset[str] = frozenset(), retrain: bool = False, **how: Any) -> dict[str, Any]:
    """Every stage in order without Prefect, then the environment moves; the records by stage."""
    from tasks.runner import How
    from tasks.stage_task import STAGE_BY_NAME, perform
    from tasks.work import open_work

    open_work.cache_clear()  # as a new process would: nothing is known but what the store holds
    work, stages = open_work(config.to_json()), {}
    before = work.store.envs.current(config.settings.env)["stages"]
    for name in STAGE_BY_NAME:
        stages[name], _ = perform(work, name, stages, How(config.settings.window, retry, **how), before, retrain)
    work.store.envs.move(config.settings.env, stages)
    return stages


@pytest.fixture(scope="session")
def run_all() -> Callable[..., dict[str, Any]]:
    return every_stage


@pytest.fixture(scope="session")
def ran_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    from flows.settings import load

    store = tmp_path_factory.mktemp("ran") / "store"
    return store, every_stage(load(["demo"], small_sets(store), {}))


@pytest.fixture
def ran(ran_once: tuple[Path, dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """This test's own store, in which `small()` has been run already; the records by stage."""
    store, records = ran_once
    shutil.copytree(store, tmp_path / "store")
    return records


@pytest.fixture
def planned() -> Callable[..., dict[str, Any]]:
    """`planned(config)`: the plan's lines by stage."""
    from tasks.planning import make_plan
    from tasks.work import open_work

    def plan(config: Any) -> dict[str, Any]:
        open_work.cache_clear()
        return {line.stage: line for line in make_plan(open_work(config.to_json()), config.settings.env)}

    return plan
