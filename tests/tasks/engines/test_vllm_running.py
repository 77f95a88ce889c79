"""What a failure of a running vLLM means; tests/vllm has the rest."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mllmsrec_core.ask import Decoding, Generate, Message
from mllmsrec_core.errors import AskError, EngineError, Passing
from tasks.engines.vllm_prompts import Prompts
from tasks.engines.vllm_room import Needs
from tasks.engines.vllm_running import Running, TooSmall

COUNTERS = {"prompt_tokens": 0, "reused_tokens": 0, "images": 0}


class VLLMValidationError(Exception):
    """As newer releases of vLLM have it: no ValueError."""


def of(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.fixture
def failing(known: Any, blobs: Any) -> Callable[..., Exception]:
    """`failing(error, errored=False)`: what `answer` raises where vLLM raises `error`."""
    base = known("llava")

    def run(error: Exception, errored: bool = False) -> Exception:
        async def raises(prompts: Any) -> None:
            raise error

        manager = SimpleNamespace(processes=[])
        core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
        llm = SimpleNamespace(
            renderer=SimpleNamespace(render_cmpl_async=raises), errored=errored, engine_core=core,
            output_handler=None, shutdown=lambda seconds: None,
        )  # fmt: skip
        prompts = Prompts(base.model, {base.model.slug: base.location}, blobs)
        ask = Generate(base.model, (Message("user", ("red?",)),), Decoding(8))

        async def main() -> Any:
            running = Running("vllm", Needs(base.model, tokens=100), prompts, llm, dict(COUNTERS))
            [outcome] = await asyncio.gather(running.answer(ask, prompts.prepare(ask)), return_exceptions=True)
            await running.stop()
            return outcome

        return asyncio.run(main())

    return run


@pytest.mark.parametrize(
    "error", [ValueError("no such prompt"), VLLMValidationError("no"), of(ValueError("apply"), TypeError("no"))]
)
def test_a_prompt_that_vllm_refuses_fails_for_good(error: Exception, failing: Any) -> None:
    outcome = failing(error)
    assert type(outcome) is AskError and "refuses this prompt" in str(outcome)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        AttributeError("'NoneType' object has no attribute 'x'"),
        RuntimeError("broken"),
        TypeError("broken"),
        of(ValueError("apply"), OSError(errno.EMFILE, "Too many open files")),
    ],
)
def test_any_other_failure_of_vllm_is_asked_again(error: Exception, failing: Any) -> None:
    outcome = failing(error)
    assert isinstance(outcome, Passing) and "The next run asks again" in str(outcome)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA error: out of memory"), of(ValueError("apply"), MemoryError())]
)
def test_memory_that_ran_out_ends_the_run_with_a_remedy(error: Exception, failing: Any) -> None:
    outcome = failing(error)
    assert isinstance(outcome, EngineError) and "no memory left" in str(outcome) and "max_num_seqs" in str(outcome)


def test_a_dead_vllm_ends_the_run_whatever_it_said(failing: Any) -> None:
    assert isinstance(failing(ValueError("no such prompt"), errored=True), EngineError)


def test_a_prompt_longer_than_the_room_asks_for_a_larger_one(failing: Any) -> None:
    said = "The decoder prompt (length 9012) is longer than the maximum model length of 1024."
    assert isinstance(failing(ValueError(said)), TooSmall)
