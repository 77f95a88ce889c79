"""What the vllm engine says and holds before and around vLLM, with a stand-in for it; tests/vllm has the rest."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mllmsrec_core.ask import Decoding, Embed, Generate, Message, Reply
from mllmsrec_core.errors import EngineError, ImageUnreadable, MllmsrecError
from tasks.engines.adapters import CONFIG, WEIGHTS, pack
from tasks.engines.vllm import PICTURES_HELD, VllmEngine

# Stated here and not taken from the engine: one that is dropped there must be missed here.
REFUSED = """
    calculate_kv_scales chat_template code_revision config_format default_mm_loras disable_sliding_window dtype
    enable_lora generation_config hf_config_path hf_overrides hf_token kv_cache_dtype language_model_only
    limit_mm_per_prompt load_format logits_processors logprobs_mode lora_dtype max_lora_rank max_model_len
    media_io_kwargs mm_processor_cache_gb mm_processor_kwargs model override_generation_config quantization revision
    skip_tokenizer_init speculative_config tokenizer tokenizer_mode tokenizer_revision trust_remote_code
""".split()


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


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_would_change_answers_is_refused(option: str, blobs: Any) -> None:
    with pytest.raises(EngineError, match=option):
        VllmEngine(blobs, {}, options={option: 1})


def test_an_adapter_that_is_none_is_an_engine_error(ask: Any, known: Any, blobs: Any, ask_all: Any) -> None:
    tuned = replace(ask, model=replace(ask.model, adapter=blobs.put(b"no tar")))
    [error] = ask_all(VllmEngine(blobs, {ask.model.slug: known("llava").location}), [tuned])
    assert isinstance(error, MllmsrecError) and not isinstance(error, ImageUnreadable)
    assert "no packed adapter" in str(error)


class StandIn:
    """As much of vLLM's AsyncLLM as the engine touches: answers with the prompt's own words once `gate` is open."""

    started: list[StandIn]
    gate: asyncio.Event

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments, self.model_config = arguments, SimpleNamespace(max_model_len=arguments["max_model_len"])
        manager = SimpleNamespace(processes=[])
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
        self.renderer, self.output_handler, self.errored, self.now = self, None, False, 0

    @classmethod
    def from_engine_args(cls, arguments: dict[str, Any]) -> StandIn:
        cls.started.append(cls(arguments))
        return cls.started[-1]

    async def render_cmpl_async(self, prompts: list[Any]) -> list[Any]:
        return prompts

    async def add_lora(self, request: Any) -> None:
        assert self.arguments["enable_lora"]

    async def generate(self, prompt: Any, sampling: Any, name: str, lora_request: Any) -> Any:
        self.now += 1
        await self.gate.wait()
        self.now -= 1
        said = SimpleNamespace(finish_reason="stop", token_ids=prompt["prompt_token_ids"])
        yield SimpleNamespace(outputs=[said], num_cached_tokens=0)

    def shutdown(self, seconds: float) -> None:
        assert not self.now


@pytest.fixture
def stand_in(monkeypatch: Any) -> type[StandIn]:
    held = {
        "engine.arg_utils": {"AsyncEngineArgs": dict},
        "v1.engine.async_llm": {"AsyncLLM": StandIn},
        "sampling_params": {"SamplingParams": dict, "RequestOutputKind": SimpleNamespace(FINAL_ONLY=2)},
        "lora.request": {"LoRARequest": lambda *each: each},
    }
    for name, values in held.items():
        path = ["vllm", *name.split(".")]
        for end in range(1, len(path) + 1):
            monkeypatch.setitem(sys.modules, ".".join(path[:end]), ModuleType(".".join(path[:end])))
        vars(sys.modules[".".join(path)]).update(values)
    StandIn.started = []
    return StandIn


def rows(ask: Generate, picture: Any, count: int) -> list[Generate]:
    return [replace(ask, messages=(Message("user", (f"red {n}?", picture)),)) for n in range(count)]


def test_few_rows_hold_a_picture_however_large_the_window_and_those_without_are_not_held_back(
    *, ask: Any, known: Any, blobs: Any, colours: Any, stand_in: Any, monkeypatch: Any
) -> None:
    read: list[str] = []
    monkeypatch.setattr(blobs, "get", lambda sha256, get=blobs.get: read.append(sha256) or get(sha256))
    shown = rows(ask, colours["red"], PICTURES_HELD + 70)
    words = [replace(ask, messages=(Message("user", (f"blue {n}?",)),)) for n in range(30)]

    async def main() -> list[Any]:
        stand_in.gate = asyncio.Event()
        engine = VllmEngine(blobs, {ask.model.slug: known("llava").location})
        asked = [asyncio.create_task(engine.answer(each)) for each in (*shown, *words)]
        while not stand_in.started or stand_in.started[0].now < PICTURES_HELD + len(words):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # as long as the others would need to be read too
        assert len(read) == PICTURES_HELD and stand_in.started[0].now == PICTURES_HELD + len(words)
        stand_in.gate.set()
        replies = await asyncio.gather(*asked)
        await engine.close()
        return replies

    replies = asyncio.run(asyncio.wait_for(main(), 120))
    assert all(isinstance(reply, Reply) for reply in replies) and len(read) == len(shown)
    assert len(stand_in.started) == 1


def test_rows_that_hold_pictures_and_wait_for_adapters_or_a_new_start_never_wait_for_each_other(
    *, ask: Any, known: Any, blobs: Any, colours: Any, stand_in: Any, tmp_path: Path
) -> None:
    adapters = []
    for rank in (1, 16):
        (tmp_path / CONFIG).write_text(f'{{"r": {rank}}}')
        (tmp_path / WEIGHTS).write_bytes(b"weights")
        adapters.append(blobs.put(pack(tmp_path, ask.model.slug)))
    plain = rows(ask, colours["red"], 2 * PICTURES_HELD)
    mixed = [replace(each, model=replace(each.model, adapter=(None, *adapters)[n % 3])) for n, each in enumerate(plain)]

    async def main() -> list[Any]:
        stand_in.gate = asyncio.Event()
        stand_in.gate.set()
        engine = VllmEngine(blobs, {ask.model.slug: known("llava").location})
        replies = await asyncio.gather(*map(engine.answer, [*plain, *mixed]))
        await engine.close()
        return replies

    replies = asyncio.run(asyncio.wait_for(main(), 120))
    assert all(isinstance(reply, Reply) for reply in replies) and len(replies) == 4 * PICTURES_HELD
    first, *_, last = stand_in.started
    assert "enable_lora" not in first.arguments and last.arguments["max_lora_rank"] == 16
    assert len(stand_in.started) <= 3  # each start still sees what waits
