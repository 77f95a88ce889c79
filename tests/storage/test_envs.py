"""Environments only ever move forward, and no move is lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

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


def test_the_history_holds_every_state_oldest_first_with_its_note(files):
    envs = Envs(files)
    assert envs.history("dev") == []
    for n in range(1, 12):
        envs.move("dev", {"caption": record(n)}, note=f"run {n}")
    states = envs.history("dev")
    assert [state["seq"] for state in states] == list(range(1, 12))
    assert [state["note"] for state in states] == [f"run {n}" for n in range(1, 12)]
    assert [state["stages"]["caption"] for state in states] == [record(n) for n in range(1, 12)]
    assert states[-1] == envs.current("dev")
    assert all(state["at"].endswith("+00:00") for state in states)


def test_a_state_says_nothing_of_who_made_it(files):
    Envs(files).move("dev", {"caption": record(1)})
    assert set(Envs(files).current("dev")) == {"seq", "at", "note", "stages"}


def test_a_state_written_without_a_note_can_be_read(files):
    files.write("envs/dev/00000001.json", b'{"seq": 1, "at": "2026-01-01T00:00:00+00:00", "stages": {"caption": {}}}')
    assert [state["stages"] for state in Envs(files).history("dev")] == [{"caption": {}}]


def test_replace_shows_exactly_these_stages_and_move_adds_to_them(files):
    envs = Envs(files)
    envs.move("dev", {"caption": record(1), "summary": record(2)})
    assert envs.replace("dev", {"caption": record(3)}, "rolled back to 7") == 2
    assert envs.current("dev")["stages"] == {"caption": record(3)}
    assert envs.current("dev")["note"] == "rolled back to 7"
    assert envs.move("dev", {"summary": record(2)}) == 3
    assert envs.current("dev")["stages"] == {"caption": record(3), "summary": record(2)}


def test_replacing_by_what_is_shown_already_writes_nothing(files):
    envs = Envs(files)
    envs.move("dev", {"caption": {**record(1), "reads": ("a",)}}, "first")
    assert envs.replace("dev", {"caption": {**record(1), "reads": ("a",)}}, "second") == 1
    assert envs.current("dev")["note"] == "first"


def test_racing_moves_and_replacements_each_get_a_number(tmp_path):
    url = str(tmp_path)

    def race(n: int) -> int:
        envs = Envs(Files(url))
        return envs.replace("dev", {"only": record(n)}, "r") if n % 2 else envs.move("dev", {f"stage{n}": record(n)})

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(race, range(24)))
    states = Envs(Files(url)).history("dev")
    assert sorted(numbers) == [state["seq"] for state in states] == list(range(1, 25))
    for before, state in pairwise(states):  # a move keeps what stood before it, whoever wrote that
        assert state["note"] == "r" or before["stages"].items() <= state["stages"].items()


def test_the_last_measured_rate_of_a_stage_and_model_holds(files):
    envs = Envs(files)
    assert envs.rate("caption", "org--name@abc") is None
    envs.write_rate("caption", "org--name@abc", 2.5)
    envs.write_rate("caption", "org--name@abc", 7.25)
    envs.write_rate("images", "source", 100.0)
    assert envs.rate("caption", "org--name@abc") == 7.25
    assert (envs.rate("caption", "source"), envs.rate("images", "source")) == (None, 100.0)
    assert files.names("rates") == ["rates/caption/org--name@abc.json", "rates/images/source.json"]
