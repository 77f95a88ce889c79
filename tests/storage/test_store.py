"""A store is opened by the schema version that wrote it, or refused and left as it is."""

from __future__ import annotations

import json

import pytest

from mllmsrec_core.errors import StoreError
from storage.files import Files
from storage.store import SCHEMA_VERSION, Store


def test_a_new_store_says_its_version_and_opens_again(url):
    Store(url)
    assert json.loads(Files(url).read("store.json")) == {"schema": SCHEMA_VERSION}
    Store(url)


@pytest.mark.parametrize("content", [b'{"schema": 2}', b'{"schema": 0}', b"{}", b"[]", b"torn {", b"\xff"])
def test_a_store_of_another_version_is_refused_and_untouched(url, content):
    files = Files(url)
    files.write("store.json", content)
    with pytest.raises(StoreError, match="store"):
        Store(url)
    assert [name.strip("/") for name in files.names("")] == ["store.json"]
    assert files.read("store.json") == content
