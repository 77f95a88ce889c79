"""Collect: what no recent state needs goes, what a run made or may point at stays, and nothing is asked for it."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllmsrec_core.errors import UsageError
from storage.presence import present
from storage.store import Store
from tasks.collect import Dropped, collect
from tasks.config import Config
from tasks.forget import pointed

HOUR = 3600.0


@pytest.fixture
def config(small: Callable[..., Config], ran: dict[str, Any]) -> Config:
    """A store in which every stage ran once."""
    return small()


def opened(config: Config) -> Store:
    return Store(config.settings.store)


def aged(config: Config, hours: float = 48) -> None:
    """Let every file of the store be this old."""
    then = time.time() - hours * HOUR
    for path in Path(config.settings.store).rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def kinds(dropped: list[Dropped]) -> set[str]:
    return {kind for kind, *_ in dropped}


def answers(config: Config) -> set[bytes]:
    """The keys of all answers in the store."""
    scan = opened(config).replies.scan()
    return {key for folder, piece in scan if folder.startswith("replies") for key in piece["key"]}


def everything(config: Config) -> dict[str, bytes]:
    files = opened(config).files
    return {name: files.read(name) for name in files.names("")}


def test_what_an_environment_shows_stays_and_is_reused(config: Config, run_all: Callable[..., Any]) -> None:
    aged(config)
    before = everything(config)
    assert collect(opened(config), replies=True, grace_hours=0.001) == []
    assert everything(config) == before
    run_all(config)
    assert set(opened(config).tables.writes()) == pointed(opened(config).envs.current("dev")["stages"])


def test_a_write_that_no_state_shows_goes_with_its_record_once_it_is_old(
    config: Config, small: Callable[..., Config], run_all: Callable[..., Any]
) -> None:
    run_all(small(caption__prompt='"What is it?"'))
    store = opened(config)
    shown = pointed(store.envs.current("dev")["stages"])
    assert collect(store, keep=1) == [], "all of it is younger than the grace"
    aged(config)
    assert collect(store, keep=2) == [], "the state before shows it"
    dropped = collect(store, keep=1)
    assert kinds(dropped) == {"table", "record"} and all(size > 0 and why for _, _, size, why in dropped)
    assert set(store.tables.writes()) == shown
    assert all(store.tables.whole(*write) for write in shown)
    known = answers(config)
    run_all(config)  # the prompt comes back: its tables are made again, and nothing is asked
    again = answers(config)
    assert again == known


def test_a_rehearsal_lists_the_same_and_removes_nothing(config: Config) -> None:
    store = opened(config)
    store.tables.publish(
        "captions", store.tables.read(*next(w for w in store.tables.writes() if w[0] == "captions")), {}
    )
    aged(config)
    before = everything(config)
    listed = collect(store, dry_run=True)
    assert len(listed) == 1 and everything(config) == before
    assert collect(store) == listed and collect(store) == []


def test_leftovers_dead_runs_and_reports_of_states_that_are_gone_go(config: Config) -> None:
    store = opened(config)
    store.files.write("runs/caption/1.json", b'{"at": 0}')
    store.files.write("reports/dev/00000001.html", b"kept")
    store.files.write("reports/gone/00000001.html", b"gone")
    (Path(config.settings.store) / "envs" / f"x.json.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    assert collect(store) == []
    aged(config)
    assert kinds(collect(store)) == {"leftover", "presence", "report"}
    left = everything(config)
    assert "reports/dev/00000001.html" in left and not any("gone" in name or ".tmp" in name for name in left)


def test_answers_go_only_when_asked_for_and_with_them_blobs_that_nothing_names(
    config: Config, small: Callable[..., Config], run_all: Callable[..., Any]
) -> None:
    run_all(small(caption__prompt='"What is it?"'))
    store = opened(config)
    lost = store.blobs.put(b"a picture of nobody")
    aged(config)
    pictures = len(store.files.names("blobs"))
    collect(store, keep=1)
    before = answers(config)
    assert store.blobs.has(lost)
    assert kinds(collect(store, keep=1, replies=True)) == {"blob"}, "answers are told by their own age"
    dropped = collect(store, keep=1, replies=True, grace_hours=0)
    after = answers(config)
    assert "reply" in kinds(dropped) and after < before
    assert len(store.files.names("blobs")) == pictures - 1 and not store.blobs.has(lost)
    shown = opened(config).envs.current("dev")["stages"]
    run_all(small(caption__prompt='"What is it?"'))
    final = answers(config)
    assert final == after and opened(config).envs.current("dev")["stages"] == shown


def test_answers_of_tables_without_units_are_not_guessed_at(config: Config) -> None:
    store = opened(config)
    stages = store.envs.current("dev")["stages"]
    stages["caption"].pop("carried")
    store.envs.move("dev", stages)
    with pytest.raises(UsageError, match="mllmsrec run --stage caption"):
        collect(store, keep=1, replies=True)


def test_while_a_run_or_a_removal_is_at_work_it_refuses(config: Config) -> None:
    store = opened(config)
    with present(store.files, "caption"), pytest.raises(UsageError, match="at work"):
        collect(store)
    with store.forgotten.lock(), pytest.raises(UsageError, match="if it is dead"):
        collect(store)
    with pytest.raises(UsageError, match="keep = 0"):
        collect(store, keep=0)
