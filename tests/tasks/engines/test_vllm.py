"""What the vllm engine says before vLLM itself is needed; tests/vllm has the rest."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest

from mllmsrec_core.ask import Decoding, Embed, Generate, Message
from mllmsrec_core.errors import EngineError, ImageUnreadable, MllmsrecError
from tasks.engines.vllm import NO_OPTIONS, VllmEngine


@pytest.fixture
def ask(known: Any) -> Generate:
    return Generate(known("llava").model, (Message("user", ("red?",)),), Decoding(8))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_an_engine_error_says_how_to_install_it(ask: Any, known: Any, blobs: Any, ask_all: Any) -> None:
    engine = VllmEngine(blobs, {ask.model.slug: known("llava").location})
    errors = ask_all(engine, [ask, ask])
    assert all(isinstance(error, EngineError) and ".[vllm]" in str(error) for error in errors)


def test_other_questions_and_quantised_weights_are_engine_errors(
    ask: Any, known: Any, blobs: Any, ask_all: Any
) -> None:
    locations = {ask.model.slug: known("llava").location}
    nf4 = replace(ask, model=replace(ask.model, quantisation="nf4"))
    for wrong, words in ((Embed(ask.model, "red"), "generate and choose"), (nf4, "transformers engine")):
        [error] = ask_all(VllmEngine(blobs, locations), [wrong])
        assert isinstance(error, EngineError) and words in str(error)


@pytest.mark.parametrize("option", sorted(NO_OPTIONS))
def test_an_option_that_would_change_answers_is_refused(option: str, blobs: Any) -> None:
    with pytest.raises(EngineError, match=option):
        VllmEngine(blobs, {}, options={option: 1})


def test_an_adapter_that_is_none_is_an_engine_error(ask: Any, known: Any, blobs: Any, ask_all: Any) -> None:
    tuned = replace(ask, model=replace(ask.model, adapter=blobs.put(b"no tar")))
    [error] = ask_all(VllmEngine(blobs, {ask.model.slug: known("llava").location}), [tuned])
    assert isinstance(error, MllmsrecError) and not isinstance(error, ImageUnreadable)
    assert "no packed adapter" in str(error)
