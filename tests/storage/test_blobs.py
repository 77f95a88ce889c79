"""Blobs are named by what they hold."""

from __future__ import annotations

from hashlib import sha256

import pytest

from mllmsrec_core.errors import StoreError
from storage.blobs import Blobs


def test_equal_bytes_are_kept_once_under_their_hash(files):
    blobs = Blobs(files)
    name = blobs.put(b"picture")
    assert name == blobs.put(b"picture") == sha256(b"picture").hexdigest()
    assert files.names("blobs") == [f"blobs/{name[:2]}/{name}"]
    assert blobs.get(name) == b"picture"
    assert blobs.has(name)
    assert not blobs.has(sha256(b"other").hexdigest())


def test_a_blob_that_is_gone_is_named_with_the_command_that_makes_it_again(files):
    blobs = Blobs(files)
    name = blobs.put(b"picture")
    files.remove(f"blobs/{name[:2]}/{name}")
    with pytest.raises(StoreError, match=f"{name}.*mllmsrec retry --stage images"):
        blobs.get(name)


def test_bytes_that_are_not_what_their_name_says_are_never_handed_out(files):
    blobs = Blobs(files)
    name = blobs.put(b"picture")
    files.write(f"blobs/{name[:2]}/{name}", b"pict")
    with pytest.raises(StoreError, match="does not hold what its name says"):
        blobs.get(name)


def test_a_reference_keeps_where_the_bytes_lie_and_hands_them_out_while_they_are_the_same(files, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"picture")
    blobs, uri = Blobs(files), str(tmp_path / "a.jpg")
    name = blobs.refer(b"picture", uri)
    assert name == blobs.refer(b"picture", uri) == sha256(b"picture").hexdigest()
    assert files.names("blobs") == [f"blobs/{name[:2]}/{name}.ref"]
    assert blobs.has(name) and blobs.get(name) == b"picture"


@pytest.mark.parametrize("content", [None, b"", b"pictur", b"pictuRe", b"picture and more"])
def test_what_lies_there_now_is_never_handed_out_for_what_lay_there(files, tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(b"picture")
    blobs = Blobs(files)
    name = blobs.refer(b"picture", str(tmp_path / "a.jpg"))
    (tmp_path / "a.jpg").unlink()
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(StoreError, match=rf"{name}.*a\.jpg.*mllmsrec run --stage images"):
        blobs.get(name)


def test_a_copy_stands_in_for_a_reference_and_is_asked_first(files, tmp_path):
    blobs = Blobs(files)
    name = blobs.refer(b"picture", str(tmp_path / "never there.jpg"))
    with pytest.raises(StoreError):
        blobs.get(name)
    assert blobs.put(b"picture") == name
    assert blobs.get(name) == b"picture"
    assert blobs.refer(b"other", "x") != name and not blobs.has("0" * 64)
