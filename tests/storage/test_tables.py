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
GOLDEN = "4fd57c8a798ae702f58cc4f3c9afbacc1f6555e8b00acb5e1bab5318118e41ad"


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


def test_a_few_columns_come_as_they_were_asked_for(tables, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_PART", 2)
    write_id = tables.publish("t", RICH, {}).write_id
    assert_frame_equal(tables.read("t", write_id, ["liked", "id"]), RICH.select("liked", "id"))


def test_a_column_the_table_lacks_is_named_with_what_to_do(tables):
    write_id = tables.publish("t", RICH, {}).write_id
    with pytest.raises(StoreError, match=r"shoe[\s\S]*mllmsrec run"):
        tables.read("t", write_id, ["shoe"])


def test_every_write_is_listed_whole_or_not_and_a_removed_one_is_gone(tables, files):
    assert tables.writes() == []
    writes = [(name, tables.publish(name, RICH, {}).write_id) for name in ("t", "t", "u")]
    files.remove(f"tables/t/{writes[0][1]}/manifest.json")
    assert tables.writes() == sorted(writes)
    tables.remove(*writes[0])
    tables.remove(*writes[2])
    tables.remove("t", "never-written")
    assert tables.writes() == [writes[1]]
    assert files.names("tables/u") == []
    assert_frame_equal(tables.read(*writes[1]), RICH)


def test_a_removal_that_was_killed_leaves_a_write_that_is_not_whole(tables, files, monkeypatch):
    write_id = tables.publish("t", RICH, {}).write_id
    removed = files.remove
    monkeypatch.setattr(files, "remove", lambda name: removed(name) if name.endswith("manifest.json") else None)
    tables.remove("t", write_id)
    assert tables.manifest("t", write_id) is None
    assert tables.writes() == [("t", write_id)], "so that it can be removed again"


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


def test_how_fresh_a_row_is_is_not_part_of_the_digest():
    assert content_digest(RICH) == content_digest(RICH.with_columns(stale_since=pl.lit(AT)))


@pytest.mark.parametrize("dtype", [pl.Int64, pl.Int128])
def test_the_width_of_a_number_is_not_part_of_the_digest(dtype):
    assert content_digest(RICH) == content_digest(RICH.with_columns(pl.col("n").cast(dtype)))


@pytest.mark.parametrize(("narrow", "wide"), [(pl.UInt64, pl.Int128), (pl.UInt64, pl.UInt128)])
def test_numbers_beyond_eight_bytes_have_one_digest_in_every_width(narrow, wide):
    large = pl.DataFrame({"n": pl.Series([2**64 - 1, 0, None], dtype=narrow)})
    assert content_digest(large) == content_digest(large.cast(wide))
    assert content_digest(large) != content_digest(large.with_columns(pl.col("n").replace(2**64 - 1, 2**63)))


def test_four_bytes_of_a_float_are_the_eight_bytes_they_stand_for():
    halves = pl.DataFrame({"x": pl.Series([0.5, math.nan, -0.0, 3.25], dtype=pl.Float32)})
    assert content_digest(halves) == content_digest(halves.cast(pl.Float64))


def test_what_lies_in_memory_below_a_null_does_not_count():
    hidden = pl.DataFrame({"x": [1, 2], "keep": [True, False]}).select(x=pl.when("keep").then("x"))
    assert content_digest(hidden) == content_digest(pl.DataFrame({"x": [1, None]}))


@given(st.lists(st.integers(0, len(RICH) - 1), max_size=12), st.integers(1, 5), st.integers(0, 3))
def test_how_a_frame_is_cut_in_memory_is_not_part_of_the_digest(rows, width, lead):
    whole = RICH[rows]
    pieces = [whole.slice(start, width) for start in range(0, len(whole), width)]
    padded = pl.concat([RICH[[0] * lead], whole]).slice(lead)
    glued = pl.concat(pieces, rechunk=False) if pieces else whole
    assert content_digest(whole) == content_digest(glued) == content_digest(padded)


def test_the_blocks_of_a_digest_are_cut_by_rows_alone(monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_BLOCK", 2)
    tall = pl.concat([RICH] * 4, rechunk=False)
    assert content_digest(tall) == content_digest(tall.rechunk())
    assert content_digest(tall) != content_digest(tall.reverse())


def test_text_bytes_and_numbers_that_look_alike_differ():
    frames = [pl.DataFrame({"x": values}) for values in (["1"], [b"1"], [1], [1.0], [True], [["1"]], [None])]
    assert len({content_digest(frame) for frame in frames}) == len(frames)


@pytest.mark.parametrize(
    "pair", [(["ab", "c"], ["a", "bc"]), ([["a"], ["b"]], [["a", "b"], []]), ([[], None], [None, []])]
)
def test_values_cannot_run_into_each_other(pair):
    one, two = (content_digest(pl.DataFrame({"x": values})) for values in pair)
    assert one != two


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
