"""A table exists once its manifest does; its digest is its logical content and nothing else."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from mllmsrec_core.errors import StoreError
from storage import tables as module
from storage.tables import Tables, content_digest

AT = datetime(2024, 2, 29, 12, 30, 1, 5, tzinfo=UTC)
RICH = pl.DataFrame(
    {
        "id": ["a", "b", "c"],
        "text": ["", None, "zwölf «»\n\x00"],
        "n": pl.Series([1, -(2**31), None], dtype=pl.Int32),
        "x": [math.nan, math.inf, 5e-324],
        "at": pl.Series([AT, None, AT], dtype=pl.Datetime("us", "UTC")),
        "tags": [["x", None], [], None],
        "vector": [[0.1, math.nan], [-math.inf], None],
        "pair": [{"k": 1, "v": 0.5}, {"k": None, "v": math.nan}, None],
        "kind": pl.Series(["one", "two", None], dtype=pl.Enum(["one", "two"])),
        "liked": [True, None, False],
        "raw": [b"\x00\xff", b"", None],
        "ask": [b"1", b"2", None],
    }
)
# A digest that changes with a library makes every stage due again.
GOLDEN = "d65371f95c326a4cd99b0faa30439e91b292655adcedc8b511b5984eea6cc394"


@pytest.fixture
def tables(files):
    return Tables(files)


@pytest.mark.parametrize("frame", [RICH, RICH.clear(), RICH.tail(1)], ids=["rich", "empty", "last row"])
def test_a_table_comes_back_as_it_was_published(tables, frame):
    published = tables.publish("t", frame, {"stage": "s"})
    assert_frame_equal(tables.read("t", published.write_id), frame)
    assert tables.whole("t", published.write_id)
    manifest = tables.manifest("t", published.write_id)
    assert (manifest["rows"], manifest["digest"], manifest["stage"]) == (len(frame), content_digest(frame), "s")


def test_a_table_in_many_parts_is_the_same_table(tables, monkeypatch):
    one = tables.publish("t", RICH, {})
    monkeypatch.setattr(module, "ROWS_PER_PART", 1)
    many = tables.publish("t", RICH, {})
    assert (one.digest, one.rows) == (many.digest, many.rows)
    assert len(tables.manifest("t", many.write_id)["parts"]) == 3
    assert_frame_equal(tables.read("t", many.write_id), RICH)


def test_a_write_that_was_killed_before_its_manifest_does_not_exist(tables, files):
    write_id = tables.publish("t", RICH, {}).write_id
    files.remove(f"tables/t/{write_id}/manifest.json")
    assert tables.manifest("t", write_id) is None
    assert not tables.whole("t", write_id)
    with pytest.raises(StoreError, match="mllmsrec run"):
        tables.read("t", write_id)


def test_the_manifest_is_written_after_every_part(tables, files, monkeypatch):
    written = []
    write = files.write
    monkeypatch.setattr(module, "ROWS_PER_PART", 2)
    monkeypatch.setattr(files, "write", lambda name, content: (written.append(name), write(name, content)))
    tables.publish("t", RICH, {})
    assert [name.rsplit("/", 1)[1] for name in written] == ["part-00000.parquet", "part-00001.parquet", "manifest.json"]


@pytest.mark.parametrize("damage", ["lost", "torn", "empty"])
def test_a_damaged_part_is_noticed_and_named_with_what_to_do(tables, files, damage):
    write_id = tables.publish("t", RICH, {}).write_id
    part = f"tables/t/{write_id}/part-00000.parquet"
    content = files.read(part)
    files.remove(part)
    if damage != "lost":
        files.write(part, content[: len(content) // 2 if damage == "torn" else 0])
    assert not tables.whole("t", write_id)
    with pytest.raises(StoreError, match=r"part-00000\.parquet.*mllmsrec run"):
        tables.read("t", write_id)


def test_a_file_of_someone_else_in_the_folder_is_not_read(tables, files):
    write_id = tables.publish("t", RICH, {}).write_id
    files.write(f"tables/t/{write_id}/part-00001.parquet", b"not ours")
    assert len(tables.read("t", write_id)) == len(RICH)


def test_where_a_row_came_from_is_not_part_of_the_digest():
    assert (
        content_digest(RICH)
        == content_digest(RICH.with_columns(ask=pl.lit(b"other")))
        == content_digest(RICH.drop("ask"))
    )


def test_the_width_of_a_number_is_not_part_of_the_digest():
    assert content_digest(RICH) == content_digest(RICH.with_columns(pl.col("n").cast(pl.Int64)))


def test_digests_are_what_they_were_when_the_first_tables_were_published():
    assert content_digest(RICH) == GOLDEN


OTHERS = {
    "id": ["z", ""],
    "text": ["x", None],
    "n": [2, None],
    "x": [math.inf, -math.inf, None, 0.0, -0.0, 1.0, math.nextafter(1.0, 2)],
    "at": [None, AT.replace(microsecond=6)],
    "tags": [["x", ""], ["x"], ["x", None, None], [], None],
    "vector": [[0.1, None], [0.1, math.inf], [0.1], None],
    "pair": [{"k": 1, "v": None}, {"k": 1, "v": math.nan}, {"k": 2, "v": 0.5}, None],
    "kind": ["two", None],
    "liked": [False, None],
    "raw": [b"", b"\x00", None],
}


@pytest.mark.parametrize("column", OTHERS)
def test_every_changed_value_changes_the_digest(column):
    digests = {content_digest(RICH)}
    for value in OTHERS[column]:
        changed = pl.Series(column, [value, *RICH[column].to_list()[1:]], dtype=RICH.schema[column], strict=False)
        digests.add(content_digest(RICH.with_columns(changed)))
    assert len(digests) == len(OTHERS[column]) + 1


def test_names_and_order_of_columns_and_rows_count():
    assert len({content_digest(f) for f in (RICH, RICH.reverse(), RICH.select(RICH.columns[::-1]), RICH.head(2))}) == 4
    assert content_digest(RICH.rename({"id": "key"})) != content_digest(RICH)
    assert content_digest(RICH.clear()) != content_digest(RICH.clear().drop("id"))


values = st.one_of(st.none(), st.floats(), st.sampled_from([0.1, -0.0, 1e22]))


@given(st.lists(values, max_size=5), st.lists(values, max_size=5))
def test_two_columns_of_floats_have_one_digest_exactly_when_every_value_reads_the_same(one, two):
    frames = [pl.DataFrame({"x": pl.Series(column, dtype=pl.Float64)}) for column in (one, two)]
    same = [repr(x) for x in one] == [repr(x) for x in two]
    assert (content_digest(frames[0]) == content_digest(frames[1])) == same


@given(st.lists(st.one_of(st.none(), st.text(st.characters(blacklist_categories=["Cs"]), max_size=3)), max_size=4))
def test_text_digests_survive_a_write(column):
    frame = pl.DataFrame({"text": pl.Series(column, dtype=pl.String)})
    tables = Tables(module.Files("memory://test-tables-text"))
    published = tables.publish("t", frame, {})
    assert content_digest(tables.read("t", published.write_id)) == published.digest
