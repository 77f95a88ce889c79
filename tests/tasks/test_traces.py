"""Traces: which rows, words and questions are one user's, told on stores of a few rows."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import polars as pl
import pytest

from storage.store import Store
from tasks.traces import Look, Subjects, Traces, find


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def clicks(store: Store, *pairs: tuple[str, str]) -> None:
    frame = pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row")
    store.tables.publish("interactions", frame, {})


def test_an_item_goes_when_nobody_else_clicked_it_in_any_table_of_the_store(store: Store) -> None:
    clicks(store, ("U", "mine"), ("U", "ours"), ("V", "ours"), ("V", "theirs"))
    clicks(store, ("U", "mine"), ("U", "other store front"))
    clicks(store, ("V", "other store front"))
    assert find(store, "U").items == {"mine"}
    assert find(store, "nobody").items == frozenset()


def test_what_was_known_before_some_of_it_went_is_not_forgotten(store: Store) -> None:
    earlier = Traces("U", items=frozenset({"gone"}), keys=frozenset({"00" * 32}))
    assert Traces.from_json(earlier.to_json()) == earlier
    found = find(store, "U", earlier)
    assert found.items == {"gone"} and found.keys == {"00" * 32}


def test_a_title_that_stands_in_the_words_of_another_item_is_not_looked_for(store: Store) -> None:
    titles = {"a": "Red mug", "b": "Zanzibar teapot", "c": "A nice Red mug with a handle"}
    items = pl.DataFrame({"item_id": list(titles), "title": list(titles.values())})
    store.tables.publish("items", items.with_columns(image_uri=pl.lit("x")), {})
    traces = Look(store).of_items(Traces("U", items=frozenset("ab")))
    assert traces.titles == {"Zanzibar teapot"}
    assert traces.uris == frozenset(), "the item that stays has the same picture"


def test_rows_are_told_by_user_item_picture_and_subject() -> None:
    traces = Traces("U", items=frozenset({"i"}), pictures=frozenset({"p"}), uris=frozenset({"u"}))
    cases = {
        "scores": ({"user_id": ["U", "V", "V"], "item_id": ["j", "i", "j"]}, [True, True, False]),
        "captions": ({"sha256": ["p", "q", None]}, [True, False, False]),
        "adapters": ({"sha256": ["p"]}, [False]),
        "done.images": ({"uri": ["u", "v"], "sha256": ["q", "q"]}, [True, False]),
        "audit": (
            {"subject": ["summary", "summary", "caption", "caption"], "subject_id": ["i", "p", "p", "i"]},
            [True, False, True, False],
        ),
        "rejects": ({"reason": ["second row of item `i`; kept is line 2", "second row of item `ii`"]}, [True, False]),
        "metrics": ({"scorer": ["U"]}, [False]),
    }
    for table, (columns, expected) in cases.items():
        frame = pl.DataFrame(columns)
        assert frame.select(traces.rows(table, frame.columns)).to_series().to_list() == expected, table


def test_a_question_goes_unless_somebody_who_stays_used_it(store: Store) -> None:
    index = Subjects(store, Traces("U", items=frozenset({"i"})), users=["U", "V"], items=["i", "j"])
    names = {name: store.forgotten.subject("user" if name in "UV" else "item", name) for name in "UVij"}

    def goes(used: set[str]) -> bool:
        return index.goes({names[name] for name in used})

    for with_user, with_other, with_gone, with_item in product((True, False), repeat=4):
        used = {n for n, there in zip("UVij", (with_user, with_other, with_gone, with_item), strict=True) if there}
        if not used & {"U", "i"}:
            continue  # no candidate
        if with_gone:
            expected = not with_item or (with_user and not with_other)
        else:
            expected = not with_other
        assert goes(used) == expected, used
