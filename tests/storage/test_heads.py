"""The first rows of tables, of any format and size, and what cannot be read said rather than raised."""

import gzip
import json

import polars as pl
import pytest

from storage.heads import PIECE, ROWS, heads
from storage.source import FsspecSource

ROW = {"user": "u1", "sku": "b 2", "time": "1700000000"}


def of(folder) -> dict:
    source = FsspecSource(str(folder))
    return {head.name: head for head in heads(source, source.names())}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("clicks.csv", "user,sku,time\nu1,b 2,1700000000\n"),
        ("clicks.tsv", "user\tsku\ttime\nu1\tb 2\t1700000000\n"),
        ("clicks.jsonl", json.dumps(ROW) + "\n"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_every_text_format_is_read_as_it_is_later(tmp_path, name, content, packed):
    path = tmp_path / "sub" / (f"{name}.gz" if packed else name)
    path.parent.mkdir()
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    (head,) = of(tmp_path).values()
    assert head.name == f"sub/{path.name}" and head.whole and not head.trouble
    assert head.columns == list(ROW) and head.frame.drop("line").row(0, named=True) == ROW


def test_of_a_large_file_whole_lines_of_its_first_piece_are_read(tmp_path):
    (tmp_path / "clicks.csv").write_text("user,sku\n" + f"u1,{'x' * 90}\n" * (2 * PIECE // 90))
    head = of(tmp_path)["clicks.csv"]
    assert not head.whole and head.size > PIECE
    assert 0 < head.frame.height <= PIECE // 90
    assert set(head.frame["sku"]) == {"x" * 90}


def test_a_folder_of_parquet_is_one_table_and_a_lone_file_is_itself(tmp_path):
    (tmp_path / "clicks").mkdir()
    frame = pl.DataFrame({"user": ["u"] * (ROWS + 1)})
    for path in ("clicks/part-0.parquet", "clicks/part-1.parquet", "items.parquet"):
        frame.write_parquet(tmp_path / path)
    found = of(tmp_path)
    assert list(found) == ["clicks", "items.parquet"]
    assert all(head.frame.height == ROWS and not head.whole for head in found.values())
    assert found["clicks"].size == 2 * found["items.parquet"].size


def test_pictures_are_no_tables_and_what_is_broken_says_so(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "broken.csv.gz").write_bytes(gzip.compress(b"user,sku\n" * 1000)[:20])
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "wrong.parquet").write_bytes(b"PAR1 no")
    found = of(tmp_path)
    assert sorted(found) == ["broken.csv.gz", "empty.csv", "wrong.parquet"]
    assert all(head.trouble and not head.columns for head in found.values())


def test_a_bucket_is_looked_at_as_a_folder_is():
    source = FsspecSource("memory://heads")
    source.files.fs.pipe_file(source.files.path("clicks.csv"), b"user,sku\nu,a\n")
    (head,) = heads(source, source.names())
    assert head.columns == ["user", "sku"]
