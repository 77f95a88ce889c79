"""Corrections: append-only, the newest about a key holds, and what is not there costs one listing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.errors import StoreError
from storage.corrections import SCHEMA, Action, Correction, Corrections
from storage.files import Files

START = datetime(2026, 1, 1, tzinfo=UTC)
KEYS = [bytes([n]) * 32 for n in range(4)]


def made(action: Action, at: int = 0, text: str | None = None, by: str = "Ada") -> Correction:
    return Correction(action, text, by, START + timedelta(seconds=at), "it was wrong")


def test_what_was_written_is_read_by_another_process(files: Files) -> None:
    correction = made("replace", text="a mug")
    assert Corrections(files).write([(KEYS[0], "caption", correction)]) == 1
    there = Corrections(files)
    assert there.of(KEYS[0]) == correction and there.of(KEYS[1]) is None
    assert there.keys("caption") == {KEYS[0]} and there.keys("summary") == set()


def test_nothing_written_leaves_no_part_and_no_digest(files: Files) -> None:
    corrections = Corrections(files)
    assert corrections.write([]) == 0 and files.names("corrections") == []
    assert corrections.digest("caption") is None and corrections.generation(KEYS[0]) == 0
    assert corrections.all().schema == pl.Schema(SCHEMA)


def test_an_empty_store_is_listed_once_however_many_keys_are_looked_up(tmp_path: Path) -> None:
    class Counted(Files):
        listed = 0

        def names(self, under: str, suffix: str = "") -> list[str]:
            Counted.listed += 1
            return super().names(under, suffix)

    corrections = Corrections(Counted(str(tmp_path)))
    for key in KEYS:
        assert corrections.of(key) is None and corrections.generation(key) == 0
    assert Counted.listed == 1


def test_another_process_is_heard_after_a_refresh(files: Files) -> None:
    one, other = Corrections(files), Corrections(files)
    assert one.of(KEYS[0]) is None
    other.write([(KEYS[0], "caption", made("ban"))])
    one.refresh()
    assert one.of(KEYS[0]) == made("ban")


entries = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(get_args(Action)), st.booleans()), max_size=12)


@given(entries=entries)
def test_the_newest_of_a_key_holds_and_every_reask_opens_a_generation(
    tmp_path_factory: pytest.TempPathFactory, entries: Sequence[tuple[bytes, Action, bool]]
) -> None:
    files = Files(str(tmp_path_factory.mktemp("corrections")))
    writer, waiting = Corrections(files), []
    for at, (key, action, writes) in enumerate(entries):
        waiting.append((key, "caption", made(action, at)))
        if writes:
            writer.write(waiting)
            waiting = []
    writer.write(waiting)
    for corrections in (writer, Corrections(files)):
        for key in KEYS:
            mine = [made(action, at) for at, (of, action, _) in enumerate(entries) if of == key]
            assert corrections.history(key) == mine
            assert corrections.of(key) == (mine[-1] if mine else None)
            assert corrections.generation(key) == sum(one.action == "reask" for one in mine)
            later = {of for at, (of, _, _) in enumerate(entries) if at > 3}
            assert corrections.since("caption", START + timedelta(seconds=3)) == later


def test_the_digest_tells_what_changes_and_not_in_which_parts_it_lies_or_who_said_it(tmp_path: Path) -> None:
    stores = [Corrections(Files(str(tmp_path / str(n)))) for n in range(5)]
    pair: list[tuple[bytes, str, Correction]] = [
        (KEYS[0], "caption", made("ban", 1)),
        (KEYS[1], "caption", made("replace", 2, "a mug")),
    ]
    stores[0].write(pair)
    for entry in reversed(pair):
        stores[1].write([entry])
    stores[2].write([(key, stage, made(c.action, i + 1, c.text, "Bob")) for i, (key, stage, c) in enumerate(pair)])
    stores[3].write([pair[0], (KEYS[1], "caption", made("replace", 2, "a cap"))])
    stores[4].write([pair[0], (KEYS[1], "summary", pair[1][2])])
    digests = [store.digest("caption") for store in stores]
    assert digests[0] == digests[1] == digests[2]
    assert len({digests[0], digests[3], digests[4], None}) == 4


def test_removed_keys_leave_no_byte_and_the_others_stay(files: Files) -> None:
    corrections = Corrections(files)
    corrections.write([(key, "caption", made("replace", at, f"text {at}")) for at, key in enumerate(KEYS)])
    corrections.write([(KEYS[0], "caption", made("reask", 9))])
    assert corrections.remove([KEYS[0], KEYS[3]]) == 3
    again = Corrections(files)
    assert again.keys("caption") == set(KEYS[1:3]) and again.of(KEYS[1]) == made("replace", 1, "text 1")
    assert len(files.names("corrections")) == 1, "a part with nothing left is gone"


def test_a_damaged_part_is_named(files: Files) -> None:
    files.write("corrections/part-x.parquet", b"not a table")
    with pytest.raises(StoreError, match=r"corrections/part-x\.parquet cannot be read"):
        Corrections(files).of(KEYS[0])
