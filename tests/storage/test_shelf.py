"""A shelf reads like a plain dict of rows, whoever wrote, compacted or died in between."""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.errors import StoreError
from storage import shelf as shelves
from storage.files import Files
from storage.shelf import Cache, Shelf

SCHEMA = {"key": pl.Binary, "n": pl.Int64, "text": pl.String}
FOLDER = "rows/of/one"


def name(number: int) -> bytes:
    return sha256(str(number).encode()).digest()


def rows(numbers: Iterable[int], text: str = "") -> pl.DataFrame:
    return pl.DataFrame([(name(n), n, text) for n in numbers], SCHEMA, orient="row")


def opened(files: Files) -> Shelf:
    return Shelf(files, FOLDER, SCHEMA)


def everything(shelf: Shelf) -> set[tuple]:
    return {row for piece in shelf.pieces() for row in piece.iter_rows()}


def levels(files: Files) -> tuple[int, int]:
    """Parts of level 0 and of the buckets."""
    parts = files.names(FOLDER, ".parquet")
    loose = [part for part in parts if part.count("/") == FOLDER.count("/") + 1]
    return len(loose), len(parts) - len(loose)


@pytest.fixture
def small(monkeypatch) -> None:
    """Everything that happens at scale happens with a dozen rows."""
    make_small(monkeypatch)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shelf, "spill_rows", 6)
    monkeypatch.setattr(shelves, "GROUP_ROWS", 2)
    monkeypatch.setattr(shelves, "LOOSE_PARTS", 3)


def same_first_byte(count: int) -> list[int]:
    return [n for n in range(count * 300) if name(n)[0] == 7][:count]


NUMBERS = [*same_first_byte(6), *range(6)]
some = st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=5)
moves = st.one_of(
    st.tuples(st.just("append"), some),
    st.tuples(st.just("append"), some),
    st.tuples(st.just("compact"), st.integers(0, 3)),
    st.tuples(st.just("remove"), some),
    st.tuples(st.just("refresh"), st.none()),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), moves), max_size=20))
def test_any_interleaving_of_two_writers_reads_like_a_dict(steps):
    """Whatever one writes is seen by it at once, and by the other after a refresh."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        files = Files("memory://test-shelf-interleaved")
        files.remove("")
        writers = [opened(files), opened(files)]
        seen: list[set[tuple]] = [set(), set()]  # what each has to see at the least
        held: set[tuple] = set()
        for count, (writer, (move, given_value)) in enumerate(steps):
            shelf = writers[writer]
            if move == "append":
                added = rows(dict.fromkeys(given_value), str(count))
                shelf.append(added)
                held |= set(added.iter_rows())
                seen[writer] |= set(added.iter_rows())
            elif move == "remove":
                keys = {name(n) for n in given_value}
                gone = {row for row in held if row[0] in keys}
                assert shelf.remove(keys) == len(gone)
                held, seen = held - gone, [before - gone for before in seen]
                for other in writers:
                    other.refresh()
            elif move == "compact":
                shelf.compact(given_value)
            else:
                shelf.refresh()
                seen[writer] = set(held)
            assert seen[writer] <= {row for n in NUMBERS for row in shelf.rows(name(n))} <= held
        for reader in (*writers, opened(files)):
            reader.refresh()
            assert {row for n in NUMBERS for row in reader.rows(name(n))} == held == everything(reader)
            asked = pl.Series([name(n) for n in NUMBERS[::2]])
            assert set(reader.lookup(asked).iter_rows()) == {row for row in held if row[0] in asked.to_list()}


def test_looking_up_columns_gives_those_alone_and_nothing_of_other_keys(files, small):
    shelf = opened(files)
    shelf.append(rows(range(20), "kept"))
    shelf.append(rows(range(20, 22), "loose"))
    shelf.compact(most_parts=8)
    asked = pl.Series([name(3), name(21), name(99)])
    assert opened(files).lookup(asked, ["n"]).schema == {"n": pl.Int64}
    assert sorted(opened(files).lookup(asked, ["n"])["n"]) == sorted(shelf.lookup(asked, ["n"])["n"]) == [3, 21]
    assert shelf.lookup(asked.clear()).schema == SCHEMA
    assert shelf.rows(name(21))  # level 0 is in memory now
    assert sorted(shelf.lookup(asked, ["n"])["n"]) == [3, 21]


def test_rows_with_one_key_are_all_found_across_levels_parts_and_groups(files, small):
    shelf = opened(files)
    for n in range(9):
        shelf.append(rows([1, 2, 3], str(n)))
        if n % 4 == 3:
            shelf.compact(most_parts=1)
    found = {row[2] for row in shelf.rows(name(2))}
    assert found == {row[2] for row in opened(files).rows(name(2))} == {str(n) for n in range(9)}


def test_keys_that_share_their_first_eight_bytes_are_told_apart(files, small):
    twins = [b"12345678" + bytes([n]) * 24 for n in range(5)]
    shelf = opened(files)
    shelf.append(pl.DataFrame({"key": twins * 2, "n": range(10), "text": ""}))
    shelf.compact()
    assert levels(files) == (0, 1)
    assert [{row[1] for row in shelf.rows(twin)} for twin in twins] == [{n, n + 5} for n in range(5)]
    assert shelf.rows(b"12345678" + b"\xff" * 24) == []


def test_few_rows_stay_in_level_0_and_many_go_into_sorted_buckets(files, small):
    shelf = opened(files)
    for n in range(6):
        shelf.append(rows([n]))
    assert shelf.compact(most_parts=5) == 6
    assert levels(files) == (1, 0)
    shelf.append(rows(same_first_byte(4)))
    assert shelf.compact(most_parts=5) == 2
    assert levels(files)[0] == 0
    (part,) = files.names(f"{FOLDER}/07", ".parquet")
    keys = pl.read_parquet(io.BytesIO(files.read(part)))["key"]
    assert keys.is_sorted() and set(keys) >= {name(n) for n in same_first_byte(4)}


def test_a_part_of_a_store_without_buckets_is_read_and_then_spread(files, small):
    buffer = io.BytesIO()
    rows(range(50)).write_parquet(buffer)
    files.write(f"{FOLDER}/part-20240101T000000-12345678.parquet", buffer.getvalue())
    assert opened(files).rows(name(7)) == [(name(7), 7, "")]
    assert opened(files).compact() == 1
    assert levels(files)[0] == 0
    assert everything(opened(files)) == set(rows(range(50)).iter_rows())


def test_a_few_new_rows_rewrite_no_large_part(files, monkeypatch):
    monkeypatch.setattr(Shelf, "spill_rows", 10)
    numbers = same_first_byte(60)
    shelf = opened(files)
    shelf.append(rows(numbers))
    shelf.compact()
    (large,) = files.names(FOLDER, ".parquet")
    for n in range(12):
        shelf.append(rows([numbers[n]], "new"))
        shelf.append(rows(range(10), str(n)))
        shelf.compact(most_parts=2)
    assert large in files.names(FOLDER, ".parquet")
    assert max(len(files.names(f"{FOLDER}/{bucket:02x}", ".parquet")) for bucket in range(256)) <= 2


def test_equal_rows_are_kept_once_by_a_merge(files):
    shelf = opened(files)
    for _ in range(9):
        shelf.append(rows([1, 2]))
    shelf.append(rows([1], "another"))
    shelf.compact(most_parts=1)
    assert [len(piece) for piece in shelf.pieces()] == [3]


@pytest.mark.parametrize("level", ["merge", "spread", "bucket"])
@pytest.mark.parametrize("removals", [0, 1, 4])
def test_a_compaction_killed_before_the_old_parts_are_gone_changes_nothing(files, monkeypatch, level, removals):
    numbers = [*same_first_byte(3), 1, 2, 3]
    monkeypatch.setattr(Shelf, "spill_rows", 10**6 if level == "merge" else 3)
    shelf = opened(files)
    for n in range(6):
        shelf.append(rows(numbers, str(n)))
        if level == "bucket":
            shelf.compact(most_parts=100)
    before = everything(opened(files))
    left = [removals]

    def killed(part: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        Files.remove(files, part)

    with monkeypatch.context() as killer:
        killer.setattr(files, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(files).compact(most_parts=1)
    for reader in (opened(files), shelf):
        reader.refresh()
        assert everything(reader) == before == {row for n in numbers for row in reader.rows(name(n))}
    opened(files).compact(most_parts=1)
    assert sum(len(piece) for piece in opened(files).pieces()) == len(before)
    assert everything(opened(files)) == before


def test_a_writer_knows_when_it_should_compact(files, small):
    shelf = opened(files)
    shelf.append(rows(range(3)))
    assert not shelf.due
    shelf.append(rows(range(3, 7)))
    assert shelf.due
    shelf.compact()
    assert not shelf.due


def counted(files: Files, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read and listed from here on."""
    seen: list[str] = []
    monkeypatch.setattr(files, "read", lambda part: seen.append(part) or Files.read(files, part))
    monkeypatch.setattr(files, "names", lambda *under: seen.append("listing") or Files.names(files, *under))
    return seen


def test_what_was_looked_at_once_costs_no_disk(files, monkeypatch):
    monkeypatch.setattr(Shelf, "spill_rows", 10)
    numbers = same_first_byte(30)
    opened(files).append(rows(numbers[:20]))
    opened(files).compact()
    shelf = opened(files)
    assert shelf.rows(name(numbers[25])) == []
    seen = counted(files, monkeypatch)
    assert not any(shelf.rows(name(n)) for n in numbers[20:])
    assert seen == []
    assert all(shelf.rows(name(n)) for n in numbers[:20])
    assert len(seen) == 1
    shelf.refresh()
    assert seen[1:] == ["listing"]
    assert shelf.lookup(pl.Series([name(n) for n in numbers[20:]])).is_empty()
    assert seen[1:] == ["listing"]


def test_a_look_up_reads_only_the_buckets_of_its_keys(files, small, monkeypatch):
    opened(files).append(rows(range(200)))
    opened(files).compact()
    shelf = opened(files)
    shelf.refresh()
    seen = counted(files, monkeypatch)
    assert shelf.lookup(pl.Series([name(5), name(6)])).sort("n")["n"].to_list() == [5, 6]
    parts = [part for part in seen if part != "listing"]
    assert sorted({part.split("/")[-2] for part in parts}) == sorted({name(n)[:1].hex() for n in (5, 6)})


def test_a_part_that_was_moved_aside_is_no_part_any_more(files):
    shelf = opened(files)
    shelf.append(rows([1]))
    (part,) = files.names(FOLDER, ".parquet")
    files.write(f"{FOLDER}/damaged/{part.rsplit('/', 1)[1]}", files.read(part))
    files.remove(part)
    shelf.refresh()
    assert shelf.rows(name(1)) == []
    assert everything(shelf) == set()
    assert shelf.compact(most_parts=0) == 0


def test_a_removal_rewrites_only_parts_that_hold_the_keys(files, small):
    shelf = opened(files)
    shelf.append(rows(range(100)))
    shelf.compact()
    before = set(files.names(FOLDER, ".parquet"))
    assert shelf.remove([name(4), name(1_000)]) == 1
    gone = before - set(files.names(FOLDER, ".parquet"))
    assert {part.split("/")[-2] for part in gone} == {name(4)[:1].hex()}
    assert shelf.rows(name(4)) == []
    assert shelf.remove_where(pl.col("n") >= 50) == 50
    assert everything(opened(files)) == {row for row in rows(range(50)).iter_rows() if row[1] != 4}


def test_reading_and_appending_while_others_compact_misses_nothing(tmp_path, small):
    url = str(tmp_path)
    first = opened(Files(url))
    for n in range(30):
        first.append(rows([n]))

    def read() -> bool:
        shelf = opened(Files(url))
        return all(shelf.rows(name(n)) for n in range(30)) and {row[1] for row in everything(shelf)} >= set(range(30))

    def write(start: int) -> None:
        shelf = opened(Files(url))
        for n in range(start, start + 10):
            shelf.append(rows([n]))
            shelf.compact(most_parts=2)

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, start) for start in (100, 200)]
        readers = [pool.submit(read) for _ in range(4)]
        assert all(reader.result() for reader in readers)
        assert [writer.result() for writer in writers] == [None, None]
    first.refresh()
    assert {row[1] for row in everything(first)} == {*range(30), *range(100, 110), *range(200, 210)}
    assert all(first.rows(name(n)) for n in range(100, 110))


@pytest.mark.parametrize("looked_before", [False, True])
def test_a_listing_torn_by_a_compaction_hides_nothing(files, small, monkeypatch, looked_before):
    """An object store lists page by page: here the buckets come before, and level 0 after, rows move down."""
    shelf = opened(files)
    opened(files).append(rows(range(10)))
    if looked_before:
        assert shelf.rows(name(99)) == []
    listings = []

    def torn(under: str, suffix: str) -> list[str]:
        if listings:
            return Files.names(files, under, suffix)
        listings.append("torn")
        before = {part for part in Files.names(files, under, suffix) if part.count("/") > FOLDER.count("/") + 1}
        opened(Files(files.url)).compact(most_parts=0)
        after = {part for part in Files.names(files, under, suffix) if part.count("/") == FOLDER.count("/") + 1}
        return sorted(before | after)

    monkeypatch.setattr(files, "names", torn)
    shelf.look()
    assert listings
    assert all(shelf.rows(name(n)) for n in range(10))


def test_a_damaged_part_is_named_with_what_to_do(files):
    opened(files).append(rows([1]))
    (part,) = files.names(FOLDER, ".parquet")
    files.write(part, b"PAR1")
    with pytest.raises(StoreError, match=f"{part} cannot be read.*move it away"):
        opened(files).rows(name(1))


@given(st.lists(st.integers(0, 9), max_size=30))
def test_a_cache_holds_what_was_used_last_within_its_bytes(used):
    piece = rows(range(4), "x" * 100)
    size = int(piece.estimated_size())
    cache = Cache(most_bytes=3 * size)
    order: list[int] = []
    for number in used:
        assert (cache.get("part", number) is not None) == (number in order[-3:])
        if number not in order[-3:]:
            cache.put("part", number, piece)
        order = [*(n for n in order if n != number), number]
        assert cache.held_bytes <= 3 * size
    cache.drop({"part"})
    assert cache.held_bytes == 0
    assert not any(cache.get("part", number) for number in used)
