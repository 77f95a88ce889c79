"""A store that one real run has filled, and the command line called on it or on a copy of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from tasks.work import open_work

SMALL = ["--set", "ingest.demo.items=24", "--set", "ingest.demo.users=6"]
PROFILE = ["-p", "demo", "--engine", "scripted", *SMALL]
Cli = Callable[..., tuple[int, list[dict]]]


@pytest.fixture(scope="session")
def profile() -> list[str]:
    """The options with which the shop was made."""
    return PROFILE


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A store that `mllmsrec run` has filled, and the events it printed; starts Prefect once."""
    store = tmp_path_factory.mktemp("cli") / "store"
    code = "from flows.cli import main; main()"
    command = [sys.executable, "-c", code, "run", *PROFILE, "--store", str(store), "--yes", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    return store, [json.loads(line) for line in done.stdout.splitlines()]


def call(store: Path, *words: str) -> tuple[int, list[dict]]:
    open_work.cache_clear()  # as a new process would
    result = CliRunner().invoke(app, [*words, "--store", str(store), "--json"])
    lines = [line for line in result.output.splitlines() if line.startswith("{")]
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, [json.loads(line) for line in lines]


@pytest.fixture
def cli(shop: tuple[Path, list[dict]]) -> Cli:
    """`cli("status")` on the shop, which must stay as it is: exit code, and the events printed."""
    return lambda *words, store=None: call(store or shop[0], *words)


@pytest.fixture
def own(shop: tuple[Path, list[dict]], tmp_path: Path) -> Cli:
    """As `cli`, on this test's own copy of the shop's store at `tmp_path / "store"`."""
    shutil.copytree(shop[0], tmp_path / "store")
    return lambda *words: call(tmp_path / "store", *words)


@pytest.fixture
def words(shop: tuple[Path, list[dict]]) -> Callable[..., str]:
    """`words("status")`: what is printed for people, on one wide line each."""

    def show(*args: str, store: Path | None = None) -> str:
        open_work.cache_clear()
        return CliRunner().invoke(app, [*args, "--store", str(store or shop[0])]).output

    return show
