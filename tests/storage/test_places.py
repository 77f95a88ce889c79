"""One file anywhere: bounded, from archives too, and never another than was named."""

from __future__ import annotations

import io
import os
import uuid
import zipfile
from pathlib import Path

import fsspec
import pytest

from mllmsrec_core.errors import ImageRefused, ImageUnreadable
from storage.places import Places, parts, shown

MEMBERS = {"a.jpg": b"one", "deep/b.jpg": b"two" * 1_000, "empty.jpg": b""}


def packed(members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def put(uri: str, content: bytes) -> str:
    with fsspec.open(uri, "wb") as file:
        file.write(content)  # type: ignore[union-attr]
    return uri


@pytest.mark.parametrize(
    ("uri", "place", "member"),
    [
        ("/a/b.jpg", "/a/b.jpg", ""),
        ("s3://a/b.jpg", "s3://a/b.jpg", ""),
        ("zip://b.jpg::/a.zip", "/a.zip", "b.jpg"),
        ("zip:///d/b.jpg::s3://a/a.zip", "s3://a/a.zip", "d/b.jpg"),
        ("zip://b.jpg", "zip://b.jpg", ""),
        ("zip://a::zip://b::/c.zip", "zip://b::/c.zip", "a"),
        ("simplecache::/a.jpg", "simplecache::/a.jpg", ""),
    ],
)
def test_a_uri_names_a_file_or_a_member_of_one(uri: str, place: str, member: str) -> None:
    assert parts(uri) == (place, member)


def test_files_and_members_are_read_whole_and_never_beyond_the_limit(root: str) -> None:
    places, archive = Places(), put(f"{root}/covers.zip", packed(MEMBERS))
    uris = {put(f"{root}/plain.jpg", b"plain"): b"plain"} | {f"zip://{n}::{archive}": c for n, c in MEMBERS.items()}
    for uri, content in uris.items():
        assert places.read(uri, 3_000) == places.read(uri, len(content)) == content
        if content:
            with pytest.raises(ImageRefused, match="more than"):
                places.read(uri, len(content) - 1)


def test_where_nothing_lies_nothing_is_read(root: str) -> None:
    places, archive = Places(), put(f"{root}/covers.zip", packed(MEMBERS))
    for uri in (f"{root}/gone.jpg", f"zip://gone.jpg::{archive}", f"zip://a.jpg::{root}/gone.zip"):
        with pytest.raises(FileNotFoundError):
            places.read(uri, 99)


def test_an_archive_is_opened_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda file, *how: opened.append(file) or real(file, *how))
    places, archive = Places(), tmp_path / "covers.zip"
    archive.write_bytes(packed(MEMBERS))
    opened.clear()
    for _ in range(20):
        assert places.read(f"zip://a.jpg::{archive}", 99) == b"one"
    assert len(opened) == 1
    archive.write_bytes(packed({"a.jpg": b"another one"}))
    assert places.read(f"zip://a.jpg::{archive}", 99) == b"another one"


def test_versions_of_members_change_with_their_bytes_alone(root: str) -> None:
    places, archive = Places(), f"{root}/covers.zip"
    put(archive, packed(MEMBERS))
    before = places.contents(archive)
    assert set(before) == set(MEMBERS)
    put(archive, packed({"new.jpg": b"new", **MEMBERS, "a.jpg": b"One"}, zipfile.ZIP_STORED))
    after = places.contents(archive)
    assert {name for name in before if before[name] != after[name]} == {"a.jpg"}


@pytest.mark.parametrize("how", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_ways_of_packing_whose_memory_has_no_bound_are_refused(root: str, how: int) -> None:
    archive = put(f"{root}/covers.zip", packed(MEMBERS, how))
    with pytest.raises(ImageRefused, match="pack it again"):
        Places().read(f"zip://deep/b.jpg::{archive}", 9_999)


@pytest.mark.parametrize("member", ["../a.jpg", "deep/../../a.jpg", ".."])
def test_a_member_that_leads_out_is_refused(root: str, member: str) -> None:
    archive = put(f"{root}/covers.zip", packed({member: b"one"}))
    with pytest.raises(ImageRefused, match="leads out"):
        Places().read(f"zip://{member}::{archive}", 99)


def test_a_damaged_archive_or_member_is_unreadable_wherever_it_is_damaged(root: str) -> None:
    content, places = packed({"a.jpg": bytes(range(256)) * 9}, zipfile.ZIP_STORED), Places()
    for at in (*range(0, len(content), 61), len(content) - 22):
        changed = bytearray(content)
        changed[at] ^= 0x55
        uri = f"zip://a.jpg::{put(f'{root}/{at}.zip', bytes(changed))}"
        try:
            assert places.read(uri, 9_999) == bytes(range(256)) * 9
        except (ImageUnreadable, ImageRefused, FileNotFoundError):
            continue
    with pytest.raises(ImageUnreadable):
        places.read(f"zip://a.jpg::{put(f'{root}/cut.zip', content[:999])}", 9_999)


def test_what_is_no_plain_file_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for uri in (f"{tmp_path}/pipe", f"zip://a::{tmp_path}/pipe", f"zip://a::{tmp_path}"):
        with pytest.raises(ImageRefused, match="pipe"):
            Places().read(uri, 99)


def test_a_uri_is_shown_on_one_short_line() -> None:
    assert shown("/a/b.jpg") == "/a/b.jpg"
    for uri in ("a\nb", "a\x1b[31m", "\u202egnp", "x" * 10_000, "\udcff"):
        assert shown(uri).isprintable() and len(shown(uri)) < 1_000
