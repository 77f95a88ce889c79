"""`mllmsrec bench` says every figure, names what bounds each stage, and leaves every store as it was."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from mllmsrec_core.stages import STAGES
from tasks.bench import PARTS
from tasks.bench.local import ORIGINAL, REUSE

ASKING = [stage.name for stage in STAGES if stage.ask and stage.name != "sft"]
SHOP = ["--set", "ingest.demo.items=24", "--set", "ingest.demo.users=9"]


def files(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.fixture
def measured(cli, shop, tmp_path, monkeypatch):
    """`measured("--engine", "scripted")`: the events by name; the shop's store and temporary files are as before."""

    def run(*words):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        before = files(shop[0])
        code, events = cli("bench", *SHOP, *words)
        assert code == 0, events
        assert files(shop[0]) == before
        assert list(tmp_path.glob("mllmsrec-bench-*")) == []
        return {kind: [e for e in events if e["event"] == kind] for kind in ("figures", "ratio", "leftout")}

    return run


def test_every_stage_has_its_figures_and_a_verdict_that_they_bear_out(measured):
    found = measured("--engine", "scripted", "--rows", "5")
    assert [one["stage"] for one in found["figures"]] == ASKING
    for one in found["figures"]:
        assert (one["rows"], one["failed"]) == (5, 0)
        assert one["rows_s"] == pytest.approx(5 / one["seconds"])
        assert tuple(one["parts"]) == PARTS
        assert min(one["parts"].values()) >= 0
        assert one["parts"][one["bound_by"]] == max(one["parts"].values()) > 0
        assert one["memory_mb"] > 10
        assert 0 < one["cores"] <= one["of_cores"] + 0.5
    rates = {one["stage"]: one for one in found["figures"]}
    assert {name for name in ASKING if rates[name]["images_s"] > 0} == {"images", "caption", "audit"}
    assert {name for name in ASKING if rates[name]["tokens_out_s"] > 0} == {"caption", "summary", "preference", "score"}
    assert [one["stage"] for one in found["ratio"]] == ASKING, "the runner beside a bare loop"


def test_what_needs_a_local_model_is_left_out_aloud(measured):
    found = measured("--engine", "scripted", "--rows", "2", "--against", "original")
    said = {one["what"]: one["why"] for one in found["leftout"]}
    originals = {f"{stage}: {ORIGINAL}" for stage in ("caption", "preference", "score")}
    assert set(said) == {*originals, f"score: {REUSE}", "sft"}
    assert all("scripted answers here" in why for what, why in said.items() if what != "sft")


def test_the_embedded_model_stands_beside_the_original_and_beside_itself_without_reuse(measured):
    found = measured("--rows", "2", "--against", "original")
    told = {(one["stage"], one["what"]): one for one in found["ratio"]}
    assert {stage for stage, what in told if what == ORIGINAL} == {"caption", "preference", "score"}
    assert "tokens computed instead of" in told["score", REUSE]["because"]
    assert "batches of 64 instead of 6" in told["score", ORIGINAL]["because"]
    for one in told.values():
        assert one["ratio"] == pytest.approx(one["ours"] / one["theirs"])
    assert [one["what"] for one in found["leftout"]] == ["sft"]


def test_people_read_each_figure_and_no_store_is_made(words, tmp_path):
    said = words("bench", *SHOP, "--engine", "scripted", "--rows", "3", store=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for word in (
        "rows/s",
        "images/s",
        "tokens in/s",
        "tokens out/s",
        "memory",
        "cores used",
        "bound by",
        *PARTS,
        *ASKING,
    ):
        assert word in said
    assert "runner : bare loop" in said
    assert "Left out:" in said
