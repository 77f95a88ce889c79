"""What a run computed is counted from its own questions alone, and stands in the record and in every manifest."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mllmsrec_core.ask import Choose, Decoding, Embed, Fetch, Generate, Message, Picture, Reply
from mllmsrec_core.prefixes import shared
from storage.store import Store
from tasks.engines.scripted import MODEL, ScriptedEngine
from tasks.run_stage import run_stage
from tasks.runner import SPENT, Counts, Elsewhere, How
from tasks.spent import LOOKED_AT, Meter, engine_figures, peak_memory_mb

sys.path.append(str(Path(__file__).parent))
import toy

FIGURES = {
    *("prompt_tokens", "reused_tokens", "hit_rate", "shared_ratio", "images"),
    *("seconds", "tokens_per_s", "images_per_s", "peak_memory_mb"),
}


class Counting(ScriptedEngine):
    """A scripted engine that says what it read, and that a fourth of it was read before."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.blobs)
        self.said = {"prompt_tokens": 1_000, "reused_tokens": 1_000, "images": 7}  # of an earlier stage

    async def answer(self, ask: Any) -> Reply:
        reply = await super().answer(ask)
        self.said = {
            "prompt_tokens": self.said["prompt_tokens"] + 8,
            "reused_tokens": self.said["reused_tokens"] + 2,
            "images": self.said["images"] + 3,
        }
        return reply

    def counters(self) -> dict[str, int]:
        return dict(self.said)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def made(store: Store, rows: int, engine: Any, how: How | None = None) -> dict[str, Any]:
    given = toy.inputs(toy.frame([(f"user {n} likes things", 1) for n in range(rows)]))
    return run_stage(store, toy.stage(), given, {"rows": rows}, lambda _: engine, how or How())


def prompt(*parts: str | Picture) -> Generate:
    return Generate(MODEL, (Message("user", parts),), Decoding(9))


def noted(engine: Any, asks: list[Any]) -> Counts:
    meter, counts = Meter(lambda _: engine), Counts()
    for ask in asks:
        assert meter(ask) is engine
    meter.note(counts)
    return counts


def test_the_record_and_every_manifest_say_what_this_run_asked(store: Store) -> None:
    record = made(store, 40, Counting(store))
    figures = record["engine"]
    assert figures.keys() == FIGURES
    pointer = record["tables"]["toys"]
    manifest = store.tables.manifest("toys", pointer["write_id"])
    assert manifest and manifest["engine"] == figures
    assert figures["prompt_tokens"] == record["counts"]["tokens_in"] > 0
    assert (figures["reused_tokens"], figures["hit_rate"], figures["images"]) == (2 * 80, 0.25, 3 * 80)
    assert 0 < figures["shared_ratio"] < 1
    tokens = record["counts"]["tokens_in"] + record["counts"]["tokens_out"]
    seconds = record["counts"]["asking_seconds"]
    assert 0 < seconds < record["seconds"] + 0.001
    assert figures["tokens_per_s"] == pytest.approx(tokens / seconds, abs=0.1)
    assert figures["images_per_s"] == pytest.approx(240 / seconds, abs=0.1)


def test_what_is_known_counts_nothing_and_the_tables_stay_the_same(store: Store) -> None:
    first, again = made(store, 10, Counting(store)), made(Store(store.url), 10, Counting(store))
    assert again["counts"]["asked"] == 0
    assert again["tables"]["toys"]["digest"] == first["tables"]["toys"]["digest"]
    assert again["fingerprint"] == first["fingerprint"]
    nothing = {"prompt_tokens": 0, "images": 0, "seconds": 0.0}
    assert {name: again["engine"][name] for name in nothing} == nothing
    rest = FIGURES - nothing.keys() - {"peak_memory_mb"}
    assert {again["engine"][name] for name in rest} == {None}


def test_an_engine_that_does_not_count_leaves_the_hit_rate_open(store: Store) -> None:
    figures = made(store, 10, ScriptedEngine(store.blobs))["engine"]
    assert (figures["reused_tokens"], figures["hit_rate"]) == (None, None)
    assert figures["prompt_tokens"] > 0 and figures["shared_ratio"] is not None


def test_an_engine_that_does_not_know_what_it_reused_leaves_the_hit_rate_open(store: Store) -> None:
    class Silent(Counting):
        def counters(self) -> dict[str, int]:
            return {"prompt_tokens": self.said["prompt_tokens"], "images": self.said["images"]}

    figures = made(store, 10, Silent(store))["engine"]
    assert (figures["reused_tokens"], figures["hit_rate"], figures["images"]) == (None, None, 3 * 20)


def test_pictures_of_every_kind_of_question_are_counted_where_the_engine_does_not(store: Store) -> None:
    red, blue = Picture("a" * 64), Picture("b" * 64)
    yes_no = (("yes", ("yes",)), ("no", ("no",)))
    asks = [
        prompt("what?", red, blue), Choose(MODEL, prompt("red?", red).messages, yes_no), Embed(MODEL, red),
        Embed(MODEL, "red"), Fetch("u", "v"), prompt("nothing to see"),
    ]  # fmt: skip
    assert [noted(ScriptedEngine(store.blobs), [ask]).images for ask in asks] == [2, 1, 1, 0, 1, 0]
    assert noted(ScriptedEngine(store.blobs), asks).images == 5


def test_the_shared_ratio_is_of_the_first_prompts_in_the_order_in_which_they_are_asked(store: Store) -> None:
    alike = [prompt("Describe the item in this picture. " * 4, f"number {n}") for n in range(LOOKED_AT // 2)]
    apart = [prompt(f"{n} is another beginning " * 4) for n in range(LOOKED_AT)]
    counts = noted(ScriptedEngine(store.blobs), [*alike, *apart])
    expected = shared(ask.messages for ask in [*alike, *apart][:LOOKED_AT])
    assert engine_figures(counts)["shared_ratio"] == pytest.approx(expected.ratio, abs=1e-5)
    assert 0.2 < expected.ratio < 0.8


def test_what_shards_spent_is_added_to_what_the_stage_spent() -> None:
    own = replace(Counts(asked=2, known=30, asking_seconds=1.0), **{name: 5 for name in SPENT})
    shards = replace(Counts(asked=10), **{name: 100 for name in SPENT})
    both = Elsewhere(shards, 4.0, 2).added(own)
    assert {getattr(both, name) for name in SPENT} == {105}
    assert both.asking_seconds == 5.0
    assert engine_figures(both)["tokens_per_s"] == pytest.approx(210 / 5)
    assert asdict(Elsewhere(Counts(), 4.0, 2).added(own)) == asdict(replace(own, known=30))


CHILD = "from tasks.spent import peak_memory_mb; print(peak_memory_mb())"


def test_the_peak_of_memory_is_in_megabytes_and_of_this_process_alone() -> None:
    before = peak_memory_mb()
    held = bytearray(400_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert 400 < peak_memory_mb() < before + 500
    said = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert 10 < int(said.stdout) < 350  # what a bare import takes, and not what its parent held
    del held
