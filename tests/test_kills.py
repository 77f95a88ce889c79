"""Killed at any moment and resumed, or run twice at once, the pipeline publishes what one undisturbed run does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks import kills


@pytest.fixture(scope="module")
def context() -> Any:
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["flows.settings", "tasks.work", "tasks.stage_task"])
    return made


@pytest.fixture(scope="module")
def undisturbed(context: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Any]:
    """The tables, and how often each key was answered."""
    root = tmp_path_factory.mktemp("undisturbed")
    kills.completed(context, root / "store", root / "log", "scripted")
    return kills.tables(root / "store"), kills.asked(root / "log")[0]


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3, 0.6, 0.95])
def test_a_killed_pipeline_goes_on_and_publishes_the_same_tables(context, undisturbed, tmp_path, share):
    expected, once = undisturbed
    process = kills.started(context, tmp_path / "store", tmp_path / "log", "scripted")
    while sum(kills.asked(tmp_path / "log")[0].values()) < share * sum(once.values()):
        assert process.exitcode is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kills.completed(context, tmp_path / "store", tmp_path / "log", "scripted")
    assert kills.same(kills.tables(tmp_path / "store"), expected, exactly=True)
    assert sum((kills.asked(tmp_path / "log")[0] - once).values()) <= kills.FLUSH_ROWS


def test_two_runs_at_once_share_the_work_and_publish_the_same_tables(context, undisturbed, tmp_path):
    expected, once = undisturbed
    slowly = {"settings.scripted_seconds": 0.1, "settings.window": 2}
    runs = [kills.started(context, tmp_path / "store", tmp_path / f"log{n}", "scripted", slowly) for n in (1, 2)]
    for run in runs:
        run.join()
        assert run.exitcode == 0
    logs = [kills.asked(tmp_path / f"log{n}")[0] for n in (1, 2)]
    assert all(sum(log.values()) > sum(once.values()) / 5 for log in logs), "one of them did nearly everything"
    assert sum(sum(log.values()) for log in logs) <= 1.25 * sum(once.values())
    published = kills.tables(tmp_path / "store")
    assert kills.same(published, expected, exactly=True)
    trained = published["adapters"][1]["ask"][0].hex()
    assert sum(log[trained] for log in logs) == 1
