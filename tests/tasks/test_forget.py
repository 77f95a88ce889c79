"""Forget: a user whose id and whose one item nobody else knows is gone from every byte, and all else is as it was."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image

from mllmsrec_core.errors import UsageError
from storage.corrections import Correction
from storage.presence import present
from storage.store import Store
from tasks.config import Config, Pipeline, Settings
from tasks.forget import forget, pointed
from tasks.traces import find

CANARY, ITEM = "canary-user-7f3a", "C99"
TITLE = "Zanzibar quillfeather teapot"
USERS, ITEMS = 8, 18
RunAll = Callable[..., dict[str, Any]]


def shop(root: Path) -> Path:
    """18 items, 8 users with 7 clicks each, and a canary who clicked six of them and one item of the canary's own."""
    root.mkdir(parents=True)
    names = [f"I{n:02d}" for n in range(ITEMS)]
    for n, item in enumerate([*names, ITEM]):
        Image.new("RGB", (8, 8), (10 * n, 255 - 10 * n, 40)).save(root / f"{item}.png")
    titles = [f"Plain {kind} number {n}" for n, kind in enumerate(["mug", "cap", "lamp"] * 6)]
    items = pl.DataFrame({"item_id": [*names, ITEM], "title": [*titles, TITLE]})
    items.with_columns(image=pl.format("{}.png", "item_id")).write_csv(root / "items.csv")
    clicks = [
        (f"user-{u}", names[(3 * u + 5 * n) % ITEMS], 1_600_000_000 + 86_400 * n)
        for u in range(USERS)
        for n in range(7)
    ]
    clicks += [(CANARY, item, 1_600_000_000 + 86_400 * n) for n, item in enumerate([*names[:3], ITEM, *names[3:6]])]
    pl.DataFrame(clicks, schema=["user_id", "item_id", "at"], orient="row").write_csv(root / "interactions.csv")
    return root


@pytest.fixture(scope="module")
def config_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    raw = shop(tmp_path_factory.mktemp("raw") / "shop")

    def config(store: Path) -> Config:
        ingest = {"dataset": "generic", "path": str(raw), "generic": {"item_columns": {"image": "image"}}}
        params: dict[str, Any] = {"ingest": ingest, "audit": {"model": "scripted"}, "examples": {"n_negatives": 4}}
        return Config(Settings(store=str(store)), Pipeline(model="scripted", **params))

    return config


def bytes_that_hold(store: Path, *needles: str) -> list[str]:
    """Files in which a needle stands in plain or in a decoded Parquet value."""
    found = []
    for path in store.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".parquet":
                frame = pl.read_parquet(io.BytesIO(content))
                content = repr(frame.rows()).encode()
            found += [f"{path}: {needle}" for needle in needles if needle.encode() in content]
    return found


def shown(config: Config) -> dict[str, pl.DataFrame]:
    """Every table of the environment."""
    store = Store(config.settings.store)
    stages = store.envs.current("dev")["stages"].values()
    pointers = [pointer for record in stages for pointer in record["tables"].items()]
    return {table: store.tables.read(table, pointer["write_id"]) for table, pointer in pointers}


def rows_about_others(tables: dict[str, pl.DataFrame], items: tuple[str, ...] = (ITEM,)) -> dict[str, list[Any]]:
    """What a forgotten canary must not change: every row about neither the canary nor the canary's item."""
    left = {}
    for name, frame in tables.items():
        gone = {"user_id": (CANARY,), "item_id": items, "subject_id": items}
        stays = [~pl.col(column).is_in(ids) for column, ids in gone.items() if column in frame.columns]
        left[name] = frame.filter(*stays).rows()
    return left


@pytest.fixture(scope="module")
def ran_shop(
    tmp_path_factory: pytest.TempPathFactory, config_of: Callable[..., Config], run_all: RunAll
) -> tuple[Path, str]:
    """A store in which the shop was run, and the sha256 of the canary item's picture."""
    store = tmp_path_factory.mktemp("forget") / "store"
    config = config_of(store)
    run_all(config)
    images = shown(config)["images"]
    return store, images.row(by_predicate=pl.col("item_id") == ITEM, named=True)["sha256"]


@pytest.fixture
def config(ran_shop: tuple[Path, str], config_of: Callable[..., Config], tmp_path: Path) -> Config:
    """This test's own copy of it."""
    shutil.copytree(ran_shop[0], tmp_path / "store")
    return config_of(tmp_path / "store")


def opened(config: Config) -> Store:
    return Store(config.settings.store)


def state(store: Store) -> dict[str, Any]:
    """What the store holds, whatever its files are called: tables as every state shows them, answers, blobs."""
    states = []
    for name in store.files.names("envs", ".json"):
        for stage, record in json.loads(store.files.read(name))["stages"].items():
            writes = sorted(pointed({stage: record}))
            states.append((name, stage, [(table, store.tables.read(table, write).rows()) for table, write in writes]))
    index = sorted(
        {(folder, *row[:2]) for folder, piece in store.replies.scan() for row in piece.iter_rows()}, key=repr
    )
    names = [
        name for folder in ("blobs", "stages", "forgotten", "locks", "reports") for name in store.files.names(folder)
    ]
    return {"states": states, "index": index, "names": names}


# --- what goes, and what stays ---


def test_neither_the_id_nor_the_title_stands_anywhere_and_the_next_ingest_brings_neither_back(
    config: Config, ran_shop: tuple[Path, str], run_all: RunAll
) -> None:
    root = Path(config.settings.store)
    assert bytes_that_hold(root, CANARY) and bytes_that_hold(root, TITLE), "otherwise nothing is proven"
    (root / "reports").mkdir()
    (root / "reports" / "old.html").write_text(f"<p>{CANARY}</p>")
    proof = forget(opened(config), CANARY)
    assert proof.clean and proof.items == 1 and proof.values > 1_000
    assert bytes_that_hold(root, CANARY, TITLE, ran_shop[1]) == []
    assert not (root / "blobs" / ran_shop[1][:2] / ran_shop[1]).exists()
    run_all(config)
    assert bytes_that_hold(root, CANARY, TITLE, ran_shop[1]) == []
    tables = shown(config)
    assert CANARY not in tables["interactions"]["user_id"] and ITEM not in tables["items"]["item_id"]
    assert tables["items"].height == ITEMS and tables["interactions"]["user_id"].n_unique() == USERS


def test_the_rows_of_others_are_the_very_same_but_for_candidates_that_were_the_item(config: Config) -> None:
    before = rows_about_others(shown(config))
    forget(opened(config), CANARY)
    after = shown(config)
    picture = before["captions"]
    assert rows_about_others(after) == {
        name: rows for name, rows in before.items() if name not in ("captions", "audit")
    } | {name: rows_about_others(after)[name] for name in ("captions", "audit")}
    assert len(after["captions"]) == len(picture) - 1 == ITEMS
    assert set(rows_about_others(after)["audit"]) <= set(before["audit"])


def test_the_next_run_asks_only_what_lists_that_lost_the_item_need(config: Config, run_all: RunAll) -> None:
    scores = shown(config)["scores"]
    lists = scores.filter(pl.col("item_id") == ITEM, pl.col("user_id") != CANARY).select(
        "user_id", "split", "target_seq"
    )
    assert 0 < len(lists.unique()), "the item is a candidate of others"
    forget(opened(config), CANARY)
    before = {
        key for folder, piece in opened(config).replies.scan() for key in piece["key"] if folder.startswith("replies")
    }
    run_all(config)
    new = [
        folder.split("/")[1]
        for folder, piece in opened(config).replies.scan()
        if folder.startswith("replies")
        for key in piece["key"]
        if key not in before
    ]
    assert set(new) <= {"choose"} and len(new) <= len(lists.unique())


def test_answers_that_others_use_too_stay(config: Config) -> None:
    store, tables = opened(config), shown(config)
    others = [
        frame.filter(pl.col("user_id") != CANARY)
        for frame in tables.values()
        if {"user_id", "ask"} <= set(frame.columns)
    ]
    keys = {
        key
        for frame in others
        for key in frame.filter(pl.col("item_id") != ITEM if "item_id" in frame.columns else True)["ask"]
    }
    summaries = set(tables["item_summaries"].filter(pl.col("item_id") != ITEM)["ask"])
    forget(store, CANARY)
    assert all(opened(config).replies.find(key) for key in (keys | summaries) - {None})


def test_an_item_somebody_else_clicked_stays(config: Config) -> None:
    traces = find(opened(config), "user-0")
    assert traces.items == frozenset() and traces.titles == frozenset() and traces.keys


def test_the_adapter_trained_on_the_rows_is_named_and_kept(config: Config) -> None:
    adapter = shown(config)["adapters"].row(0, named=True)
    proof = forget(opened(config), CANARY)
    assert any(adapter["sha256"] in line and "--retrain" in line for line in proof.lines())
    assert opened(config).blobs.has(adapter["sha256"])


def test_a_second_time_finds_nothing_more_and_somebody_unknown_nothing_at_all(config: Config) -> None:
    forget(opened(config), CANARY)
    before = state(opened(config))
    again = forget(opened(config), CANARY)
    assert again.clean and not any(again.removed.values()) and state(opened(config)) == before
    assert "held nothing" in forget(opened(config), "nobody-anybody-knows").lines()[0]


def test_words_of_a_correction_that_name_the_user_are_blanked(config: Config) -> None:
    store = opened(config)
    asked = shown(config)["captions"].filter(
        pl.col("sha256").is_in(shown(config)["images"].filter(pl.col("item_id") == "I00")["sha256"].implode())
    )
    key = asked["ask"][0]
    store.corrections.write([(key, "caption", Correction("ban", None, "Ada", datetime.now(UTC), f"{CANARY} told us"))])
    assert forget(store, CANARY).clean
    made = opened(config).corrections.of(key)
    assert made and made.reason == "(a forgotten user) told us"


# --- every state of every environment ---


def test_older_states_and_other_environments_are_made_again_and_what_nothing_reaches_goes(config: Config) -> None:
    store = opened(config)
    stages = store.envs.current("dev")["stages"]
    store.envs.move("copy", {name: stages[name] for name in ("ingest", "images")})
    lost = store.tables.publish("interactions", shown(config)["interactions"], {})
    assert forget(store, CANARY).clean
    assert store.tables.manifest("interactions", lost.write_id) is None
    copied = store.envs.current("copy")["stages"]["ingest"]["tables"]["interactions"]["write_id"]
    assert CANARY not in store.tables.read("interactions", copied)["user_id"]


# --- kills, locks and runs ---


class Killed(BaseException):
    """The process is gone."""


def deadly(store: Store, operations: int) -> Store:
    """The store of a process that dies before its operation of this number that writes or removes."""
    left = [operations]

    def until(action: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return action(*args)

        return counted

    for name in ("write", "create", "remove"):
        setattr(store.files, name, until(getattr(store.files, name)))
    return store


def test_killed_anywhere_and_repeated_it_comes_to_the_same_end(config: Config, tmp_path: Path) -> None:
    root = Path(config.settings.store)
    whole = shutil.copytree(root, tmp_path / "whole")
    forget(Store(str(whole)), CANARY)
    expected, killed = None, 0
    for operations in (1, 2, 3, 20, 45, 55, 70, 85, 100, 115):
        copy = shutil.copytree(root, tmp_path / str(operations))
        secret = copy / "subjects" / "secret"
        assert secret.exists()
        with suppress(Killed):
            forget(deadly(Store(str(copy)), operations), CANARY)
            killed -= 1
        killed += 1
        (copy / "locks" / "forget.json").unlink(missing_ok=True)  # as the message says of a dead one
        assert forget(Store(str(copy)), CANARY).clean
        expected = expected or state(Store(str(whole)))
        assert state(Store(str(copy))) == expected
        assert bytes_that_hold(copy, CANARY, TITLE) == []
        shutil.rmtree(copy)
    assert killed >= 8, "most of these moments lie before the end"


def test_while_a_run_is_at_work_it_refuses_unless_forced(config: Config) -> None:
    store = opened(config)
    with present(store.files, "caption"):
        with pytest.raises(UsageError, match="at work"):
            forget(store, CANARY)
        assert store.forgotten.digest() is None, "nothing was begun"
        assert forget(store, CANARY, force=True).clean


def test_of_two_at_once_the_second_refuses(config: Config) -> None:
    store = opened(config)
    with store.forgotten.lock(), pytest.raises(UsageError, match="if it is dead"):
        forget(opened(config), CANARY)
    with pytest.raises(UsageError, match="name the user"):
        forget(store, " ")
