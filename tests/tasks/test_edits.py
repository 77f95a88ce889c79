"""What an edit costs: exactly what depends on it is asked, the plan says so before, and nothing where nothing is due.

Run with `-s` to see the table of edits, planned and asked.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from flows.settings import load
from tasks.work import open_work
from tests.tasks.shop import Item, Shop, a_shop, sets

ASKING = ("images", "caption", "summary", "preference", "sft", "score", "audit")
NOTHING = dict.fromkeys(ASKING, 0)
APPEND = {"ingest__mode": '"append"'}
TITLE = "An entirely new title"


@dataclass(frozen=True)
class Edit:
    """An edit of files or of parameters, and what it must cost: a number or an interval per stage, 0 where none is named."""

    name: str
    shop: Callable[[Shop], Shop] = lambda shop: shop
    then: dict[str, Any] = field(default_factory=dict)  # parameters of the run after the edit
    given: dict[str, Any] = field(default_factory=dict)  # parameters of the run before and after it
    first: dict[str, Any] = field(default_factory=dict)  # parameters of one more run in between
    act: Callable[[Any], None] = lambda work: None
    cost: dict[str, Any] = field(default_factory=dict)


def retitled(shop: Shop) -> Shop:
    return shop.with_item("i07", replace(shop.items["i07"], title=TITLE))


def repainted(shop: Shop) -> Shop:
    return shop.with_item("i07", replace(shop.items["i07"], colour="black"))


def added(shop: Shop) -> Shop:
    return shop.with_item("i99", Item("A thing nobody clicked", "mugs", "white"))


def without_oldest_month(shop: Shop) -> Shop:
    return replace(shop, clicks=tuple(click for click in shop.clicks if click[2] >= 30))


def caption_of(work: Any, **how: Any) -> None:
    from tasks.overrule import correct

    correct(work, "dev", "i07", **{"text": None, "ban": False, "reask": False, **how}, why="wrong", by="a test")


def reask(stage: str, where: str | None) -> Callable[[Any], None]:
    def act(work: Any) -> None:
        from tasks.overrule import reask

        reask(work, "dev", stage, where, "the model was drunk", "a test")

    return act


ANY = (0, 10_000)
ITEM_TEXT = {"summary": (1, 2), "preference": ANY, "score": ANY, "audit": ANY}  # what the text of one item reaches
EDITS = [
    Edit("nothing"),
    Edit("dataset re-exported in another order", lambda shop: replace(shop, clicks=shop.clicks[::-1])),
    Edit("items re-exported in another order", lambda shop: replace(shop, items=dict(reversed(shop.items.items())))),
    Edit("code refactored", act=lambda work: None),
    Edit("prompt edited", then={"caption__prompt": '"Name it."'}, cost={**ITEM_TEXT, "caption": 30, "summary": 30}),
    Edit("prompt reverted", first={"caption__prompt": '"Name it."'}),
    Edit("chain's prompt edited", then={"preference__recurrent_prompt": '"{previous} {items}"'},
         cost={"preference": 32, "score": ANY}),
    Edit("block size changed", then={"preference__block": 4}, cost={"preference": 24, "score": ANY}),
    Edit("threshold changed", then={"audit__grounded_from": 0.5}),
    Edit("error rate allowed changed", then={"caption__max_error_rate": 0.5}),
    Edit("adapter rank changed", then={"sft__rank": 4}, cost={"sft": 1, "score": ANY}),
    Edit("model revision changed for captions", then={"caption__model": '"scripted@2"'},
         cost={**ITEM_TEXT, "caption": 30, "summary": 30}),
    Edit("model revision changed for scores", then={"score__model": '"scripted@2"'}, cost={"score": (1, 96)}),
    Edit("one title changed", retitled, cost={**ITEM_TEXT, "summary": 2}),
    Edit("one title changed, steps as first read", retitled, given={"preference__upstream": '"as_first_read"'},
         cost={"summary": 2, "score": ANY, "audit": ANY}),
    Edit("one picture changed", repainted, cost={**ITEM_TEXT, "images": 1, "caption": 1, "summary": 1}),
    Edit("one item added", added, cost={"images": 1, "caption": 1, "summary": 2, "score": (0, 60), "audit": ANY}),
    Edit("one item removed", lambda shop: replace(shop, items={k: v for k, v in shop.items.items() if k != "i29"}),
         cost={"preference": ANY, "score": ANY, "audit": ANY}),
    Edit("one click added, no block full", lambda shop: shop.with_click("u3", "i02", 90), cost={"score": (1, 18)}),
    Edit("clicks added that fill a block",
         lambda shop: shop.with_click("u3", "i02", 90).with_click("u3", "i03", 93), cost={"preference": 1, "score": (1, 18)}),
    Edit("one user added", lambda shop: replace(shop, clicks=(*shop.clicks, *(("new", f"i{n:02d}", n) for n in range(6)))),
         cost={"preference": 2, "score": (1, 18)}),
    Edit("a late event, appended", lambda shop: shop.with_click("u3", "i02", 4), given=APPEND),
    Edit("a late event, snapshot", lambda shop: shop.with_click("u3", "i02", 4), cost={"preference": 4, "score": (1, 18)}),
    Edit("rolling export without its oldest month, appended", without_oldest_month, given=APPEND),
    Edit("rolling export without its oldest month, snapshot", without_oldest_month,
         cost={"preference": ANY, "score": ANY}),
    Edit("titles beside the preference", then={"score__keep_last": 2}, cost={"sft": 1, "score": (1, 96)}),
    Edit("fine-tuning left out", then={"sft__strategy": '"none"'}, cost={"score": (1, 96)}),
    Edit("one caption corrected", act=lambda work: caption_of(work, text="A mug."), cost={**ITEM_TEXT, "summary": 1}),
    Edit("one caption banned", act=lambda work: caption_of(work, ban=True), cost={**ITEM_TEXT, "summary": 0}),
    Edit("one caption asked again", act=reask("caption", "item_id = 'i07'"), cost={"caption": 1}),
    Edit("one user's preference asked again", act=reask("preference", "user_id = 'u3'"), cost={"preference": 4}),
]  # fmt: skip


@pytest.fixture(scope="session")
def ran_shops(tmp_path_factory: pytest.TempPathFactory, run_all: Callable[..., Any]) -> Callable[..., Path]:
    """`ran_shops(given, first)`: a folder with the shop's files and a store of the runs before the edit, made once.

    Always the same folder for the same runs, put back to what it was: where a picture lies is part of what it is.
    """
    made: dict[str, Path] = {}

    def folder(given: dict[str, Any], first: dict[str, Any]) -> Path:
        name = repr((given, first))
        if name not in made:
            root = made[name] = tmp_path_factory.mktemp("shop")
            a_shop().write(root / "files")
            for others in [{}, first] if first else [{}]:
                run_all(load((), sets(root / "files", root / "store", **given, **others), {}))
            shutil.copytree(root, root.with_suffix(".ran"), copy_function=shutil.copy2)
        shutil.rmtree(made[name])
        shutil.copytree(made[name].with_suffix(".ran"), made[name], copy_function=shutil.copy2)
        return made[name]

    return folder


def within(count: int, cost: int | tuple[int, int]) -> bool:
    low, high = (cost, cost) if isinstance(cost, int) else cost
    return low <= count <= high


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_what_is_asked_after_an_edit_is_what_depends_on_it_and_what_was_planned(
    edit, ran_shops, run_all, planned, monkeypatch
):
    root = ran_shops(edit.given, edit.first)
    edit.shop(a_shop()).write(root / "files")
    if edit.name == "code refactored":
        monkeypatch.setattr("tasks.stage_task.code_digest", lambda: "another source")
    config = load((), sets(root / "files", root / "store", **edit.given, **edit.then), {})
    open_work.cache_clear()
    store = open_work(config.to_json()).store
    before, records = store.envs.current("dev")["stages"], store.files.names("stages")
    edit.act(open_work(config.to_json()))
    plan = planned(config)
    after = run_all(config)
    reused = [n for n in ASKING if after[n] == before[n] or f"stages/{n}/{after[n]['fingerprint']}.json" in records]
    asked = {name: 0 if name in reused else after[name]["counts"]["asked"] for name in ASKING}
    for name, count in asked.items():
        due = plan[name].due
        row = f"{edit.name:<52} {name:<11} planned {due.low:>3} to {due.high:<3} asked {count:<3} {plan[name].why}\n"
        sys.stdout.write(row if due.high else "")
        assert due.low <= count <= due.high, name
        assert within(count, {**NOTHING, **edit.cost}[name]), name
    assert all(line.due.high == 0 for line in planned(config).values())
