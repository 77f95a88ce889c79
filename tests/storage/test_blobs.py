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
