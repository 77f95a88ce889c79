"""The proof: a value that was left is found wherever it lies, and a value that only looks like it is not."""

from __future__ import annotations

import io
import json
from pathlib import Path

import polars as pl
import pytest

from storage.store import Store
from tasks.proof import Proof, prove
from tasks.traces import Traces

USER, TITLE, KEY = "canary-user-7f3a", "Zanzibar quillfeather teapot", bytes(range(32))
TRACES = Traces(USER, titles=frozenset({TITLE}), keys=frozenset({KEY.hex()}))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def parquet(**columns: list[object] | pl.Series) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


def proof(store: Store, traces: Traces = TRACES) -> Proof:
    return prove(store, traces, {}, skip="locks/note.json")


def test_an_empty_store_is_clean_and_what_was_read_is_counted(store: Store) -> None:
    store.files.write("tables/t/w/part-0.parquet", parquet(a=["x", None], b=[[1, 2], [3]]))
    made = proof(store)
    assert made.clean and made.rows == 2 and made.values >= 4 and made.files == len(store.files.names(""))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", parquet(text=[f"of {USER}!"])),
        ("a.parquet", parquet(text=[TITLE])),
        ("a.parquet", parquet(deep=[[{"in": [USER]}]])),
        ("a.parquet", parquet(kind=pl.Series([USER], dtype=pl.Categorical))),
        ("a.parquet", parquet(value=[f"says {TITLE}.".encode(), b"\xff\xfe"])),
        ("a.parquet", parquet(key=[KEY])),
        ("a.parquet", parquet(asks=[bytes(32) + KEY])),
        ("a.parquet", USER.encode()),
        ("a.json", json.dumps({"deep": [{"id": USER}]}).encode()),
        ("a.json", json.dumps({USER: 1}).encode()),
        ("a.json", json.dumps([KEY.hex()]).encode()),
        ("a.html", f"<p>{USER}</p>".encode()),
        ("blobs/aa/aa", b"\x00\xff" + TITLE.encode()),
        (f"reports/{USER}.html", b""),
    ],
)
def test_a_value_that_was_left_is_found_with_its_file(store: Store, name: str, content: bytes) -> None:
    store.files.write(name, content)
    made = proof(store)
    assert not made.clean and {hit.file for hit in made.found} == {name}
    assert any(line.startswith("found: ") and name in line for line in made.lines())


def test_the_note_that_says_what_to_look_for_is_left_out(store: Store) -> None:
    store.files.write("locks/note.json", TRACES.to_json())
    assert proof(store).clean


def test_a_number_or_a_short_id_is_compared_with_whole_values_and_that_is_said(store: Store) -> None:
    store.files.write("a.parquet", parquet(text=["1234567890 U1x"], n=[1234567]))
    for user in ("1234567", "U1"):
        made = proof(store, Traces(user))
        assert made.clean and "whole values only" in made.lines()[-1]
    store.files.write("b.parquet", parquet(text=["U1"]))
    assert not proof(store, Traces("U1")).clean


def test_an_id_inside_another_users_id_is_no_trace_of_it(store: Store) -> None:
    store.tables.publish("interactions", pl.DataFrame({"user_id": ["user_123"], "item_id": ["I"]}), {})
    made = proof(store, Traces("user_12"))
    assert made.clean and "other ids contain it" in made.lines()[-1]


def test_an_id_that_is_an_items_too_stays_where_items_are_named(store: Store) -> None:
    store.tables.publish("interactions", pl.DataFrame({"user_id": ["2"], "item_id": ["1"]}), {})
    assert proof(store, Traces("1")).clean
    store.tables.publish("preferences", pl.DataFrame({"user_id": ["1"]}), {})
    assert not proof(store, Traces("1")).clean
