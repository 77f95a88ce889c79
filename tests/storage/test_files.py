"""A file is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.errors import StoreError, UsageError
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


def test_a_folder_is_no_file(files):
    files.write("a/b", b"x")
    assert files.size("a") is None
    with pytest.raises(OSError):
        files.read("a")


def test_names_with_signs_and_spaces_come_back_as_they_went(files):
    names = sorted(["model@1+2/a b", "model@1+2/é%20&=#.json", "model@1+2/~'(x)!,;:$"])
    for name in names:
        files.write(name, name.encode())
    assert files.names("model@1+2") == names
    assert [files.read(name) for name in names] == [name.encode() for name in names]
    for name in names:
        files.remove(name)
    assert files.names("") == []


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


def python(code: str, *arguments: str, **others: object) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, from the root of the checkout."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=os.getcwd(), **others)


LIMITED = """
import resource, signal, sys
from mllmsrec_core.errors import StoreError
from storage.files import Files
files = Files(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (files.write, files.create):
    try:
        write("x", b"1" * 1_000_000)
    except StoreError as error:
        print(error)
"""


def test_a_write_that_ends_in_the_middle_leaves_no_half_file(tmp_path):
    done = python(LIMITED, str(tmp_path))
    assert done.stdout.count("cannot write") == 2, done.stderr
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from storage.files import Files
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
Files(sys.argv[1]).write("a/part-1.parquet", b"torn")
"""


def test_what_a_kill_left_behind_is_listed_apart(tmp_path):
    files = Files(str(tmp_path))
    assert python(KILLED, str(tmp_path)).returncode == -9
    assert len(os.listdir(tmp_path / "a")) == 1
    assert files.names("") == []
    (left,) = files.leftovers(0)
    assert left.startswith("a/part-1.parquet.") and left.endswith(".tmp")
    assert files.leftovers(3600) == []
    os.utime(tmp_path / left, (time.time() - 3601,) * 2)
    assert files.leftovers(3600) == [left]
    files.remove(left)
    assert files.leftovers(0) == []


def test_a_finished_write_leaves_nothing_over(files):
    files.write("a", b"1")
    files.create("b", b"1")
    files.create("b", b"2")
    assert files.leftovers(0) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        Files(str(tmp_path)).write("file/below/x", b"1")


def test_what_a_kill_left_behind_is_never_listed_as_a_part(tmp_path):
    files = Files(str(tmp_path))
    files.write("a/part-1.parquet", b"whole")
    (tmp_path / "a" / f"part-2.parquet.{'0f' * 16}.tmp").write_bytes(b"tor")
    assert files.names("a", ".parquet") == files.names("a") == ["a/part-1.parquet"]


@given(st.binary(max_size=200))
def test_bytes_come_back_as_they_went(content):
    files = Files("memory://test-files-bytes")
    files.write("x", content)
    assert files.read("x") == content


SECRETS = [
    ("s3://AKIA1234:pla/nted+Secret@bucket/store", {}),
    ("https://user:planted@example.org/store", {}),
    ("simplecache::s3://user:planted@bucket/store", {}),
    ("memory://x", {"key": "planted"}),
    ("memory://x", {"aws_secret_access_key": "planted"}),
    ("memory://x", {"client_kwargs": {"aws_session_Token": "planted"}}),
    ("memory://x", {"proxies": [{"https": "http://user:planted@proxy"}]}),
    ("memory://x", {"endpoint_url": "http://user:planted@localhost:9000"}),
    ("memory://x", {"password": "planted"}),
    ("memory://x", {"connection_string": "AccountName=a;planted"}),
]


@pytest.mark.parametrize(("where", "options"), SECRETS)
def test_secrets_in_a_url_or_in_options_are_refused_and_not_repeated(where, options):
    with pytest.raises(UsageError, match="AWS_PROFILE") as caught:
        Files(where, options)
    assert "planted" not in str(caught.value)
    assert "pla/nted" not in str(caught.value)


@pytest.mark.parametrize("where", ["memory://host:9000/a@b", "memory://container@account/x", "memory://a/b:c@d"])
def test_an_at_sign_alone_is_no_secret(where):
    Files(where, {"endpoint_url": "http://localhost:9000", "anon": True})


def test_a_file_system_that_is_not_installed_is_named_with_the_command_that_installs_it():
    code = "import sys; sys.modules['s3fs'] = None; from storage.files import Files; Files('s3://bucket/store')"
    assert (
        "UsageError: the file system of s3://bucket/store is not installed: pip install -e '.[s3]'"
        in python(code).stderr
    )


def test_an_unknown_protocol_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean `s3`"):
        Files("s33://bucket/store")
