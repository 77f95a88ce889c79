"""Environments on the command line: listed, promoted, rolled back, and never moved by halves."""

from __future__ import annotations

from flows.commands.environments import changed


def test_promote_lists_and_rolls_back(own):
    assert own("envs")[1] == [
        {"event": "environment", "name": "dev", "stages": own("envs")[1][0]["stages"], "coverage": 1.0, "seq": 1,
         "at": own("envs")[1][0]["at"], "note": ""}
    ]  # fmt: skip
    code, (moved,) = own("promote", "dev", "prod")
    assert code == 0 and (moved["environment"], moved["seq"]) == ("prod", 1)
    assert [event["name"] for event in own("envs")[1]] == ["dev", "prod"]
    assert own("status", "--env", "prod")[1] == own("status", "--env", "dev")[1]
    assert own("history", "--env", "prod")[1][0]["note"] == "promoted from dev 1"


def test_a_roll_back_is_a_state_with_a_note(own, profile):
    own("run", *profile, "--stage", "caption", "--set", "caption.prompt=Name it.", "--yes")
    before = own("status")[1]
    code, (moved,) = own("rollback")
    assert (code, moved["seq"], moved["note"]) == (0, 3, "rolled back to 1")
    assert own("status")[1] != before
    assert own("rollback", "--to", "2")[1][0]["seq"] == 4
    assert own("status")[1] == before
    assert [event["changed"] for event in own("history")[1]][1:] == [["caption"]] * 3


def test_what_cannot_be_moved_exits_with_2(own):
    for words, said in (
        (("promote", "dve", "prod"), "did you mean `dev`"),
        (("promote", "dev", "dev"), "name two"),
        (("rollback",), "one state only"),
        (("rollback", "--to", "7"), "no state 7"),
        (("history", "--env", "prod"), "known: dev"),
    ):
        code, events = own(*words)
        assert code == 2 and said in events[-1]["message"]


def test_a_store_without_environments_lists_none(cli, words, tmp_path):
    assert cli("envs", store=tmp_path / "new") == (0, [])
    assert "no environment yet" in words("envs", store=tmp_path / "new")


def test_a_stage_changed_when_its_tables_say_something_else():
    def record(digest: str, write_id: str = "w") -> dict:
        return {"tables": {"t": {"digest": digest, "write_id": write_id}}}

    assert changed({"a": record("1", "w1")}, {"a": record("1", "w2")}) == []
    assert changed({"a": record("1"), "gone": record("1")}, {"a": record("2"), "new": record("1")}) == [
        "a",
        "new",
        "gone",
    ]
