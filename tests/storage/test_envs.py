"""Environments only ever move forward, and no move is lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from mllmsrec_core.errors import StoreError, UsageError
from storage.envs import Envs
from storage.files import Files


def record(n: int) -> dict:
    return {"fingerprint": f"f{n}", "tables": {"t": {"write_id": f"w{n}", "rows": n}}, "rate": 0.1 * n}


def test_an_environment_is_empty_before_its_first_run(files):
    assert Envs(files).current("dev")["stages"] == {}
    assert Envs(files).names() == []


def test_the_newest_move_holds_and_older_stages_stay(files):
    envs = Envs(files)
    assert envs.move("dev", {"caption": record(1)}) == 1
    assert envs.move("dev", {"summary": record(2)}) == 2
    assert envs.move("dev", {"caption": record(3)}) == 3
    assert envs.current("dev")["stages"] == {"caption": record(3), "summary": record(2)}
    assert envs.names() == ["dev"]


def test_the_tenth_move_holds_over_the_ninth(files):
    envs = Envs(files)
    for n in range(12):
        envs.move("dev", {"caption": record(n)})
    assert envs.current("dev")["seq"] == 12
    assert envs.current("dev")["stages"]["caption"] == record(11)


def test_nothing_is_written_when_nothing_changes(files):
    envs = Envs(files)
    envs.move("dev", {"caption": {**record(1), "reads": ("a", "b")}})
    before = files.names("envs")
    assert envs.move("dev", {"caption": {**record(1), "reads": ("a", "b")}}) == 1
    assert envs.move("dev", {}) == 1
    assert files.names("envs") == before


def test_environments_do_not_see_each_other(files):
    envs = Envs(files)
    envs.move("prod", {"caption": record(1)})
    envs.move("prod.sample5", {"caption": record(2)})
    assert envs.current("prod")["stages"]["caption"] == record(1)
    assert envs.current("pro")["stages"] == {}
    assert envs.names() == ["prod", "prod.sample5"]


def test_racers_never_lose_a_move(tmp_path):
    url = str(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda n: Envs(Files(url)).move("dev", {f"stage{n}": record(n)}), range(24)))
    assert sorted(numbers) == list(range(1, 25))
    assert Envs(Files(url)).current("dev")["stages"] == {f"stage{n}": record(n) for n in range(24)}


@pytest.mark.parametrize("name", ["", "../out", "a/b", "..", ".hidden", "a b", "ä"])
def test_a_name_that_is_no_single_folder_is_refused(files, name):
    with pytest.raises(UsageError, match="letters, digits"):
        Envs(files).move(name, {"caption": record(1)})
    assert files.names("envs") == []


def test_files_of_others_in_the_folder_are_passed_over(files):
    envs = Envs(files)
    envs.move("dev", {"caption": record(1)})
    files.write("envs/dev/notes.json", b"{}")
    files.write("envs/dev/00000002.json.0123.tmp", b"to")
    assert envs.current("dev")["seq"] == 1


def test_a_record_comes_back_as_it_was_written(files):
    envs = Envs(files)
    assert envs.record("caption", "f1") is None
    envs.write_record("caption", "f1", record(1))
    assert envs.record("caption", "f1") == record(1)


def test_a_damaged_pointer_is_named_with_what_to_do(files):
    files.write("stages/caption/f1.json", b'{"tables": ')
    with pytest.raises(StoreError, match=r"stages/caption/f1\.json.*Remove it"):
        Envs(files).record("caption", "f1")
