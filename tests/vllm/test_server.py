"""The openai engine in front of a real vLLM server, held against the transformers engine in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mllmsrec_core.ask import Decoding, Generate, Message
from mllmsrec_core.errors import ContextTooLong, EngineError, ImageUnreadable
from tasks.engines.openai import OpenAIEngine

from .conftest import KEY, Watched, kill


@pytest.fixture(scope="module")
def served(server: Any) -> tuple[str, Any]:
    return server()


@pytest.fixture
def new_engine(served: Any, blobs: Any, embedded: Any, runner: Any, monkeypatch: Any) -> Iterator[Any]:
    monkeypatch.setenv("SERVED_KEY", KEY)
    opened: list[OpenAIEngine] = []

    def make(**how: Any) -> OpenAIEngine:
        how = {"endpoints": [served[0]], "api_key_env": "SERVED_KEY", "retries": 3, "backoff_s": 0.1, **how}
        how.setdefault("locations", {embedded.model.slug: embedded.location})
        opened.append(OpenAIEngine(blobs, **how))
        return opened[-1]

    yield make
    for engine in opened:
        runner.run(engine.close())


def test_captions_and_choices_are_those_of_the_transformers_engine(
    *, new_engine: Any, captions: Any, scores: Any, reference: Any, ask_all: Any, agree: Any
) -> None:
    mixed = [ask for pair in zip(captions, scores, strict=True) for ask in pair]
    agree(ask_all(new_engine(), mixed), reference(mixed))


def test_an_adapter_is_loaded_from_a_shared_folder(
    *, new_engine: Any, captions: Any, scores: Any, tuned: Any, reference: Any, ask_all: Any, agree: Any, tmp_path: Any
) -> None:
    asks = tuned([*captions[:8], *scores[:8]])
    [unknown] = ask_all(new_engine(), asks[:1])
    assert isinstance(unknown, EngineError) and "--lora-modules" in str(unknown)
    outcomes = ask_all(new_engine(adapter_folder=str(tmp_path)), asks)
    agree(outcomes, reference(asks))
    name = f"adapter-{asks[0].model.adapter[:12]}"
    named = new_engine(adapters={asks[0].model.adapter: name})  # it is there now, so its name is enough
    assert [reply.value for reply in ask_all(named, asks[:4])] == [reply.value for reply in outcomes[:4]]


def test_bad_rows_fail_alone(*, new_engine: Any, captions: Any, broken: Any, ask_all: Any) -> None:
    good, model = captions[0], captions[0].model
    unreadable = Generate(model, (Message("user", ("what?", broken)),), Decoding(60))
    long = [Generate(model, (Message("user", ("mug " * words,)),), Decoding(60)) for words in (1000, 9000)]
    first, bad, over, far_over, last = ask_all(new_engine(), [good, unreadable, *long, good])
    assert first.value == last.value
    assert isinstance(bad, ImageUnreadable)
    for error in (over, far_over):
        assert isinstance(error, ContextTooLong) and "--max-model-len" in str(error)


def test_without_a_tokenizer_a_form_outside_the_likeliest_tokens_fails_its_row(
    *, new_engine: Any, scores: Any, reference: Any, ask_all: Any
) -> None:
    engine = new_engine(locations={})
    few = (("yes", ("yes",)), ("no", ("no",)))
    [near] = ask_all(engine, [replace(scores[0], choices=few)])
    assert near.value["logprobs"] == pytest.approx(
        reference([replace(scores[0], choices=few)])[0].value["logprobs"], abs=1e-3
    )
    [far] = ask_all(engine, [replace(scores[0], choices=(*few, ("third", ("never a token of this model",))))])
    assert "never a token" in str(far) and "not among them" in str(far)


def test_a_wrong_key_or_name_is_an_engine_error_that_shows_no_key(
    *, new_engine: Any, captions: Any, ask_all: Any, monkeypatch: Any
) -> None:
    [name] = ask_all(new_engine(served_as={"embedded-vlm": "other"}), captions[:1])
    assert isinstance(name, EngineError) and "serves no other" in str(name)
    monkeypatch.setenv("SERVED_KEY", "a-wrong-secret")
    [key] = ask_all(new_engine(), captions[:1])
    assert isinstance(key, EngineError) and "SERVED_KEY" in str(key) and "a-wrong-secret" not in str(key)


def test_a_stage_whose_server_is_killed_says_what_to_do_and_asks_another_only_what_is_missing(
    *, served: Any, server: Any, captioned: Any, monkeypatch: Any, tmp_path: Any
) -> None:
    monkeypatch.setenv("SERVED_KEY", KEY)
    how = {"engine": '"openai"', "api_key_env": '"SERVED_KEY"', "retries": 1}
    dying, after = [], 20

    def watched(engines: Any) -> Watched:
        dying.append(Watched(engines, after, lambda: kill(served[1])))
        return dying[-1]

    with pytest.raises(EngineError, match="Start the server"):
        captioned(tmp_path / "store", watched, endpoints=f'["{served[0]}"]', **how)
    kept = len(dying[0].answered)
    record, table = captioned(tmp_path / "store", Watched, endpoints=f'["{server()[0]}"]', **how)
    assert after <= kept < record["counts"]["rows"]
    assert (record["counts"]["known"], record["counts"]["asked"]) == (kept, record["counts"]["rows"] - kept)
    assert table.equals(captioned(tmp_path / "undisturbed", Watched, engine='"transformers"')[1])
