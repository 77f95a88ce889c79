"""Adapters as tar files."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mllmsrec_core.errors import EngineError
from tasks.engines.adapters import CONFIG, WEIGHTS, pack, unpack


def saved(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(b"weights")
    (folder / "README.md").write_text("left out")
    return folder


def test_the_same_adapter_gives_the_same_bytes_wherever_it_was_trained(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", r=4, base_model_name_or_path="/home/a", target_modules=["q", "k"])
    two = saved(tmp_path / "two", target_modules=["k", "q"], r=4, base_model_name_or_path="/home/b", revision="main")
    assert pack(one, "base@1") == pack(two, "base@1")


def test_what_is_packed_comes_out_again(tmp_path: Path) -> None:
    unpack(pack(saved(tmp_path / "in", r=4), "base@1"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == {"r": 4, "base_model_name_or_path": "base@1"}
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == b"weights"
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_tar_with_other_files_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../evil"))
    with pytest.raises(EngineError, match="this blob holds"):
        unpack(buffer.getvalue(), tmp_path / "out")


def test_bytes_that_are_no_tar_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no packed adapter"):
        unpack(b"picture" * 100, tmp_path / "out")


def test_a_folder_that_is_whole_is_left_as_it_is_since_a_server_may_be_reading_it(tmp_path: Path) -> None:
    content, folder = pack(saved(tmp_path / "in", r=4), "base@1"), tmp_path / "seen" / "out"
    unpack(content, folder)
    before = {file: (file.stat().st_ino, file.stat().st_ctime_ns) for file in folder.iterdir()}
    unpack(content, folder)
    assert {file: (file.stat().st_ino, file.stat().st_ctime_ns) for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["out"]


def test_many_who_unpack_the_same_at_once_all_find_it_whole(tmp_path: Path) -> None:
    content, folder = pack(saved(tmp_path / "in", r=4), "base@1"), tmp_path / "seen" / "out"
    start = threading.Barrier(8)

    def one(_: int) -> bytes:
        start.wait()
        unpack(content, folder)
        return (folder / WEIGHTS).read_bytes()

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(one, range(8))) == {b"weights"}
    assert [file.name for file in folder.parent.iterdir()] == ["out"]


def test_half_an_adapter_is_an_engine_error_that_names_the_folder(tmp_path: Path) -> None:
    content, folder = pack(saved(tmp_path / "in", r=4), "base@1"), tmp_path / "out"
    unpack(content, folder)
    (folder / WEIGHTS).write_bytes(b"wei")
    with pytest.raises(EngineError, match=f"{folder} holds half an adapter"):
        unpack(content, folder)


def test_others_may_read_what_is_unpacked(tmp_path: Path) -> None:
    unpack(pack(saved(tmp_path / "in", r=4), "base@1"), tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_cannot_be_written_is_the_callers_to_explain(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        unpack(pack(saved(tmp_path / "in", r=4), "base@1"), tmp_path / "file" / "out")
