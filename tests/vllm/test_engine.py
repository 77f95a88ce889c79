"""The vllm engine with real vLLM, held against the transformers engine in float32."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest

from mllmsrec_core.ask import Choose, Decoding, Generate, Message, Reply
from mllmsrec_core.errors import ContextTooLong, EngineError, ImageUnreadable, Passing
from tasks.engines.vllm import VllmEngine
from tasks.engines.vllm_room import LEAST

from .conftest import KV_BYTES, ROOM, YES_NO, Watched


@pytest.fixture(scope="module")
def new_engine(blobs: Any, embedded: Any, runner: Any) -> Iterator[Any]:
    """`new_engine(**how)`; every engine is closed at the end."""
    opened: list[VllmEngine] = []

    def make(**how: Any) -> VllmEngine:
        how = {"max_model_len": ROOM, "eager": True, "options": {"kv_cache_memory_bytes": KV_BYTES}, **how}
        opened.append(VllmEngine(blobs, {embedded.model.slug: embedded.location}, **how))
        return opened[-1]

    yield make
    for engine in opened:
        runner.run(engine.close())


@pytest.fixture(scope="module")
def engine(new_engine: Any) -> VllmEngine:
    return new_engine()


def test_captions_and_choices_are_those_of_the_transformers_engine(
    *, engine: Any, captions: Any, scores: Any, reference: Any, ask_all: Any, agree: Any
) -> None:
    mixed = [ask for pair in zip(captions, scores, strict=True) for ask in pair]
    agree(ask_all(engine, mixed), reference(mixed))
    assert len({ask_all(engine, [ask])[0].value for ask in captions[:8]}) > 3


def test_bad_rows_fail_alone(*, engine: Any, captions: Any, broken: Any, reference: Any, ask_all: Any) -> None:
    good, model = captions[0], captions[0].model
    unreadable = Generate(model, (Message("user", ("what?", broken)),), Decoding(60))
    long = [Generate(model, (Message("user", ("mug " * words,)),), Decoding(60)) for words in (990, 3000, 9000)]
    first, bad, *too_long, last = ask_all(engine, [good, unreadable, *long, good])
    assert first.value == last.value
    assert isinstance(bad, ImageUnreadable)
    for error in too_long:  # the model itself may have room: only the setting keeps the row out
        assert isinstance(error, Passing) and "Raise `max_model_len`" in str(error)
    assert isinstance(reference([long[2]])[0], ContextTooLong)


def test_the_longest_prompt_that_fits_is_answered(engine: Any, captions: Any, ask_all: Any) -> None:
    model = captions[0].model

    def asks(words: int) -> Generate:
        return Generate(model, (Message("user", ("mug " * words,)),), Decoding(8))

    one, two = (ask_all(engine, [asks(words)])[0].tokens_in for words in (1, 2))
    most = (ROOM - 8 - one) // (two - one) + 1
    fits, over = ask_all(engine, [asks(most), asks(most + 1)])
    assert isinstance(fits, Reply) and isinstance(over, Passing)


def test_drawn_texts_depend_on_the_ask_and_its_seed_alone(engine: Any, captions: Any, ask_all: Any) -> None:
    def drawn(seed: int) -> list[Generate]:
        return [replace(ask, decoding=Decoding(20, temperature=2.0, top_p=0.95, seed=seed)) for ask in captions[:8]]

    def texts(outcomes: Any) -> list[str]:
        return [getattr(outcome, "value", "") for outcome in outcomes]

    together, alone = texts(ask_all(engine, drawn(1))), [texts(ask_all(engine, [ask]))[0] for ask in drawn(1)]
    assert together == alone
    assert together != texts(ask_all(engine, drawn(2)))


def test_an_adapter_and_more_pictures_are_taken_up_while_rows_wait(
    *, engine: Any, scores: Any, captions: Any, pictures: Any, tuned: Any, reference: Any, ask_all: Any, agree: Any
) -> None:
    both = [
        Choose(scores[0].model, (Message("user", ("red?", one[1], other[1])),), YES_NO)
        for one, other in zip(pictures[:4], pictures[4:8], strict=True)
    ]
    mixed = [*scores[:8], *tuned(scores[:8]), *both, *captions[:4], *tuned(captions[:4])]
    outcomes = ask_all(engine, mixed)
    agree(outcomes, reference(mixed))
    assert all(plain.value != worn.value for plain, worn in zip(outcomes[:8], outcomes[8:16], strict=True))


def test_room_follows_the_questions_up_to_what_the_model_has(
    *, new_engine: Any, captions: Any, pictures: Any, reference: Any, ask_all: Any, agree: Any
) -> None:
    """LEAST is more than a caption needs; a longer row starts vLLM again, and one beyond the model fails alone."""
    engine, model = new_engine(max_model_len=None), captions[0].model
    agree(ask_all(engine, captions[:4]), reference(captions[:4]))
    assert engine.room == LEAST
    long = [
        Generate(model, (Message("user", ("mug " * words, pictures[0][1])),), Decoding(60))
        for words in (LEAST - 100, 9000)
    ]
    *fits, over = ask_all(engine, [*captions[:4], *long])
    agree(fits, reference([*captions[:4], long[0]]))
    assert isinstance(over, ContextTooLong)
    assert engine.room == 2 * LEAST
    assert engine.counters()["images"] == 4 + 5


def test_counters_hold_every_token_read_and_those_found_in_the_prefix_cache(
    engine: Any, captions: Any, pictures: Any, ask_all: Any
) -> None:
    words = "mug " * 400  # the CPU build reuses blocks of 128 tokens
    ask = Generate(captions[0].model, (Message("user", (words, pictures[0][1])),), Decoding(30))
    before = engine.counters()
    [first] = ask_all(engine, [ask])
    middle = engine.counters()
    again = ask_all(engine, [ask] * 3)
    after = engine.counters()
    assert middle["prompt_tokens"] - before["prompt_tokens"] == first.tokens_in
    assert after["prompt_tokens"] - middle["prompt_tokens"] == 3 * first.tokens_in
    assert after["images"] - before["images"] == 4
    assert [reply.value for reply in again] == [first.value] * 3
    assert 0 < after["reused_tokens"] - middle["reused_tokens"] < 3 * first.tokens_in


def test_choices_that_begin_alike_and_unknown_weights_are_engine_errors(
    engine: Any, new_engine: Any, captions: Any, ask_all: Any
) -> None:
    alike = Choose(captions[0].model, captions[0].messages, (("yes", ("yes",)), ("yep", ("yes!",))))
    unknown = replace(captions[0], model=replace(captions[0].model, revision="0" * 40))
    nf4 = replace(captions[0], model=replace(captions[0].model, quantisation="nf4"))
    for wrong, ask, words in (
        (engine, alike, "both begin with"),
        (new_engine(), unknown, "resolve the model"),
        (new_engine(), nf4, "transformers engine"),
    ):
        [error] = ask_all(wrong, [ask])
        assert isinstance(error, EngineError) and words in str(error)


def test_an_engine_that_cannot_start_says_so_once_to_every_row(new_engine: Any, captions: Any, ask_all: Any) -> None:
    errors = ask_all(new_engine(options={"kv_cache_memory_bytes": 1}), captions[:4])
    assert all(isinstance(error, EngineError) and "`max_model_len`" in str(error) for error in errors)
    assert len(set(map(id, errors))) == 1


def test_a_stage_whose_engine_is_killed_says_what_to_do_and_asks_only_what_is_missing_when_repeated(
    *, captioned: Any, tmp_path: Any
) -> None:
    ours = {"engine": '"vllm"', "eager": "true", "vllm": f"{{kv_cache_memory_bytes = {KV_BYTES}}}"}
    dying, after = [], 20

    def watched(engines: Any) -> Watched:
        dying.append(Watched(engines, after, kill_engines))
        return dying[-1]

    with pytest.raises(EngineError, match="repeat the command"):
        captioned(tmp_path / "store", watched, **ours)
    kept = len(dying[0].answered)
    record, table = captioned(tmp_path / "store", Watched, **ours)
    assert after <= kept < record["counts"]["rows"]
    assert (record["counts"]["known"], record["counts"]["asked"]) == (kept, record["counts"]["rows"] - kept)
    assert table.equals(captioned(tmp_path / "undisturbed", Watched, engine='"transformers"')[1])


def kill_engines() -> None:
    """End what vLLM computes in, as the kernel would that is out of memory."""
    for child in psutil.Process().children(recursive=True):
        if "resource_tracker" not in " ".join(child.cmdline()):
            child.kill()


CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from mllmsrec_core.ask import Decoding, Generate, Message
from storage.blobs import Blobs
from storage.files import Files
from tasks.engines.vllm import VllmEngine
from tasks.models import resolve

if __name__ == "__main__":
    import psutil
    found = resolve("embedded-vlm")
    options = {"kv_cache_memory_bytes": int(sys.argv[1])}
    engine = VllmEngine(Blobs(Files(sys.argv[2])), {found.model.slug: found.location}, eager=True, options=options)
    ask = Generate(found.model, (Message("user", ("Describe the item: a red mug",)),), Decoding(5))
    asyncio.run(engine.answer(ask))
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_of_vllm_outlives_a_killed_run(tmp_path: Any) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), str(KV_BYTES), str(tmp_path / "store")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    children = [int(pid) for pid in ended.stdout.split()]
    assert len(children) > 1, ended.stderr
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in children if psutil.pid_exists(pid)], timeout=60)
    assert not alive, [process.cmdline() for process in alive]
