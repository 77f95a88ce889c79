"""A file is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.errors import StoreError
from storage.files import Files


def test_what_is_written_is_read_listed_and_removed(files):
    files.write("a/b/1.json", b"one")
    files.write("a/2.parquet", b"")
    assert files.read("a/b/1.json") == b"one"
    assert (files.size("a/b/1.json"), files.size("a/2.parquet"), files.size("a/3")) == (3, 0, None)
    assert files.names("a") == ["a/2.parquet", "a/b/1.json"]
    assert files.names("a", ".json") == ["a/b/1.json"]
    assert files.names("nowhere") == []
    files.remove("a/b")
    files.remove("a/b")
    assert not files.exists("a/b/1.json")
    with pytest.raises(FileNotFoundError):
        files.read("a/b/1.json")


def test_a_later_write_replaces_an_earlier_one(files):
    files.write("x", b"one")
    files.write("x", b"two")
    assert files.read("x") == b"two"


def test_what_another_writer_adds_is_seen(files, url):
    assert files.names("a") == []
    Files(url).write("a/1", b"1")
    assert files.names("a") == ["a/1"]


def test_only_the_first_creates(files):
    assert files.create("a/1", b"one")
    assert not files.create("a/1", b"two")
    assert files.read("a/1") == b"one"
    assert files.names("a") == ["a/1"]


def test_of_many_who_create_at_once_one_wins(tmp_path):
    files = Files(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: files.create("seat", str(n).encode()), range(40)))
    assert won.count(True) == 1
    assert files.read("seat") == str(won.index(True)).encode()
    assert os.listdir(tmp_path) == ["seat"]


@pytest.mark.parametrize("operation", ["write", "create"])
def test_a_full_disk_leaves_nothing_behind_and_says_so(tmp_path, monkeypatch, operation):
    files = Files(str(tmp_path))
    files.write("kept", b"before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*/x: no space left.*repeat"):
        getattr(files, operation)("x", b"1")
    assert os.listdir(tmp_path) == ["kept"]
    assert files.read("kept") == b"before"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        Files(str(tmp_path)).write("file/below/x", b"1")


def test_what_a_kill_left_behind_is_never_listed_as_a_part(tmp_path):
    files = Files(str(tmp_path))
    files.write("a/part-1.parquet", b"whole")
    (tmp_path / "a" / "part-2.parquet.0123.tmp").write_bytes(b"tor")
    assert files.names("a", ".parquet") == ["a/part-1.parquet"]


@given(st.binary(max_size=200))
def test_bytes_come_back_as_they_went(content):
    files = Files("memory://test-files-bytes")
    files.write("x", content)
    assert files.read("x") == content
