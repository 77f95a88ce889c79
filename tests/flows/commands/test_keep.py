"""Taking things out for good asks first, says what went, and proves it."""

from __future__ import annotations

import polars as pl


def test_a_forgotten_user_is_gone_by_proof_and_by_export(own, tmp_path):
    path = str(tmp_path / "interactions.parquet")
    own("export", "interactions", "-o", path)
    user = pl.read_parquet(path)["user_id"][0]
    code, events = own("forget", "--user", user, "--yes")
    assert code == 0 and events[-1] == {"event": "forgotten", "clean": True}
    assert [event for event in events if event["event"] == "proof"]
    own("export", "interactions", "-o", path)
    assert user not in pl.read_parquet(path)["user_id"]


def test_nobody_is_forgotten_where_nobody_can_be_asked(own, tmp_path):
    code, events = own("forget", "--user", "U1")
    assert code == 2 and "--yes" in events[-1]["message"]
    assert not (tmp_path / "store" / "forgotten").exists()


def test_gc_lists_on_a_dry_run_what_it_then_removes(own, profile):
    own("run", *profile, "--stage", "caption", "--set", "caption.prompt=Name it.", "--yes")
    sweep = ["gc", "--grace-hours", "0", "--keep", "1"]
    code, listed = own(*sweep, "--dry-run")
    assert code == 0 and {event["event"] for event in listed} == {"removable"}
    assert any("captions" in event["name"] and event["bytes"] > 0 for event in listed)
    code, removed = own(*sweep)
    assert code == 0
    assert sorted(event["name"] for event in removed) == sorted(event["name"] for event in listed)
    assert own("status")[0] == 0 and own("rollback", "--to", "1")[0] == 2


def test_gc_says_in_words_what_went(words, tmp_path, own):
    assert "would go" in words("gc", "--dry-run", "--replies", store=tmp_path / "store")
    assert "removed" in words("gc", store=tmp_path / "store")
