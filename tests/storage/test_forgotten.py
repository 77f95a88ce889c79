"""Forgotten: no id in any name or byte, one secret a store, and one process at a time that removes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.errors import UsageError
from storage.files import Files
from storage.forgotten import LOCK, Forgotten


def test_a_subject_is_16_bytes_the_same_in_every_process_and_another_in_every_store(files: Files) -> None:
    name = Forgotten(files).subject("user", "U1")
    assert len(name) == 16 and Forgotten(files).subject("user", "U1") == name
    assert Forgotten(Files(files.url + "-other")).subject("user", "U1") != name


@given(
    a=st.tuples(st.sampled_from(("user", "item")), st.text()), b=st.tuples(st.sampled_from(("user", "item")), st.text())
)
def test_different_subjects_have_different_names(tmp_path_factory: pytest.TempPathFactory, a: tuple, b: tuple) -> None:  # type: ignore[type-arg]
    forgotten = Forgotten(Files(str(tmp_path_factory.getbasetemp() / "names")))
    assert (forgotten.subject(*a) == forgotten.subject(*b)) == (a == b)


def test_racers_for_the_first_subject_agree(files: Files) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: Forgotten(files).subject("user", "U1"), range(16)))
    assert len(set(names)) == 1


def test_a_suppressed_user_is_told_from_others_and_null_is_nobody(files: Files) -> None:
    ids = pl.Series("user_id", ["U1", "U2", None, "U1", ""])
    forgotten = Forgotten(files)
    assert forgotten.users(ids).to_list() == [False] * 5 and forgotten.digest() is None
    forgotten.suppress("U1")
    for reader in (forgotten, Forgotten(files)):
        assert reader.users(ids).to_list() == [True, False, False, True, False]
        assert len(reader.users(ids.clear())) == 0


def test_the_list_holds_a_time_and_no_id(files: Files) -> None:
    Forgotten(files).suppress("a-very-personal-id")
    (name,) = files.names("forgotten")
    assert json.loads(files.read(name)).keys() == {"at"}
    assert all("personal" not in name and b"personal" not in files.read(name) for name in files.names(""))


def test_the_digest_changes_with_every_new_user_and_not_with_a_repeated_one(files: Files) -> None:
    forgotten = Forgotten(files)
    digests = [forgotten.digest()]
    for user in ("U1", "U1", "U2"):
        forgotten.suppress(user)
        digests.append(forgotten.digest())
    assert digests[1] == digests[2] and len(set(digests)) == 3


# --- the lock ---


def test_the_lock_is_held_once_and_free_again_afterwards(files: Files) -> None:
    one, other = Forgotten(files), Forgotten(files)
    with one.lock():
        assert str(os.getpid()) in (other.at_work() or "")
        with pytest.raises(UsageError, match=r"remove .*forget\.json"), other.lock():
            pass
    assert other.at_work() is None
    with other.lock():
        pass


def test_a_failure_frees_the_lock(files: Files) -> None:
    forgotten = Forgotten(files)
    with pytest.raises(RuntimeError), forgotten.lock():
        raise RuntimeError
    assert forgotten.at_work() is None


def test_a_dead_process_of_this_machine_holds_nothing(files: Files) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    files.write(LOCK, json.dumps({"host": socket.gethostname(), "pid": done.pid, "at": "then"}).encode())
    with Forgotten(files).lock():
        assert str(os.getpid()) in (Forgotten(files).at_work() or "")


@pytest.mark.parametrize("content", [b'{"host": "elsewhere", "pid": 1, "at": "then"}', b"damaged"])
def test_a_lock_of_another_machine_or_of_nobody_known_stands(files: Files, content: bytes) -> None:
    files.write(LOCK, content)
    with pytest.raises(UsageError, match="if it is dead: remove"), Forgotten(files).lock():
        pass
    assert files.read(LOCK) == content
