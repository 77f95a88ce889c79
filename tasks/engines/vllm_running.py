"""One vLLM that runs: what is in flight in it, its adapters, and what each of its failures means.

Knows nothing of when to start or stop it.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from mllmsrec_core.ask import Choose, Generate, Reply
from mllmsrec_core.errors import AskError, EngineError, MllmsrecError, Passing
from tasks.engines.answers import chosen, seed_of
from tasks.engines.refusals import beneath, out_of_memory, refused_by_vllm
from tasks.engines.vllm_prompts import Prepared, Prompts, Question
from tasks.engines.vllm_room import Needs

SHOWN_CHARS = 300  # of vLLM's complaint about a row
# vLLM's children do not notice that their parent was killed, and would keep the device's memory for ever. This reads a
# pipe that closes with the parent, and then kills them.
WATCH = (
    "import contextlib, os, signal, sys\nsys.stdin.read()\nfor pid in sys.argv[1:]:\n"
    "    with contextlib.suppress(ProcessLookupError):\n        os.kill(int(pid), signal.SIGKILL)"
)
STOP_S = 30.0  # a child that has not ended by then is killed
TOO_LONG = re.compile(r"maximum (context|model) length")
MEMORY = (
    "If memory ran out, lower `max_model_len`, or `gpu_memory_utilization` or `max_num_seqs` in the engine's options."
)


class TooSmall(Exception):
    """A running vLLM has too little room for a prompt that was not measured before."""


class Running:
    """One started AsyncLLM, the Asks in flight in it and the adapters it has loaded."""

    llm: Any  # None once it is stopped

    def __init__(self, name: str, needs: Needs, prompts: Prompts, llm: Any, counters: dict[str, int]) -> None:
        self.name, self.needs, self.prompts, self.llm = name, needs, prompts, llm
        self.idle = asyncio.Event()
        self.idle.set()
        self._in_flight = 0
        self._loaded: dict[str, Any] = {}
        self._wearing: str | None = None
        self._counters = counters
        self._watch = _watch(llm)

    def enter(self) -> None:
        self._in_flight += 1
        self.idle.clear()

    def leave(self) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self.idle.set()

    async def stop(self) -> None:
        """End the child. Asks still in flight see a dead engine."""
        llm, self.llm = self.llm, None  # errors of past rows may hold this object, and must not hold vLLM's
        if not self._in_flight and llm.output_handler is not None:
            llm.output_handler.cancel()  # it would report the end of the child as a failure
        await asyncio.to_thread(llm.shutdown, STOP_S)
        llm.shutdown = lambda *_, **__: None  # it would shut itself down again at exit, when modules are gone
        self._watch.kill()
        await asyncio.to_thread(self._watch.communicate)

    async def wear(self, adapter: str | None, folder: Path) -> None:
        """Make `adapter` the one that rows in flight may have, once no row with another is left.

        vLLM's CPU kernels (0.32) index adapters by -1 for a row without one, which puts the last one on it.
        """
        if adapter == self._wearing:
            return
        await self.idle.wait()
        if adapter and adapter not in self._loaded:
            self._loaded[adapter] = await self._load(adapter, folder)
        self._wearing = adapter

    async def _load(self, adapter: str, folder: Path) -> Any:
        """vLLM says here, and not in the middle of a batch, when an adapter does not fit."""
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        request = LoRARequest(adapter, len(self._loaded) + 1, str(folder))
        try:
            await self.llm.add_lora(request)
        except Exception as error:
            if self.llm is None or self.llm.errored:
                raise self._dead(error) from error
            raise EngineError(
                f"adapter {adapter[:12]} does not fit {self.prompts.chat.name} in vLLM: {error}. "
                "Use the base model it was trained on, and targets in its language model only."
            ) from error
        return request

    async def answer(self, ask: Question, prepared: Prepared) -> Reply:
        """Raises TooSmall where the prompt with its pictures and its answer has no room here."""
        try:
            [ready] = await self.llm.renderer.render_cmpl_async([prepared.for_vllm()])
            read = len(ready["prompt_token_ids"])  # pictures counted
            if read + prepared.written > self.needs.tokens:  # vLLM would cut the answer short
                raise TooSmall
            adapter = self._loaded.get(ask.model.adapter or "")
            drawn = await self._drawn(ready, self._sampling(ask, prepared.forms), adapter)
        except (MllmsrecError, TooSmall):
            raise
        except Exception as error:
            raise self._failure(error) from error
        self._count(read, drawn.num_cached_tokens or 0, len(prepared.shown))
        [answer] = drawn.outputs
        if isinstance(ask, Generate):
            tokens = list(answer.token_ids)
            return Reply(self.prompts.text(tokens), tokens_in=read, tokens_out=len(tokens))
        logs = {token: entry.logprob for token, entry in answer.logprobs[0].items()}
        return chosen(logs, prepared.forms, read, ask.model, self.name)

    def _count(self, read: int, reused: int, shown: int) -> None:
        for name, count in (("prompt_tokens", read), ("reused_tokens", reused), ("images", shown)):
            self._counters[name] += count

    def _sampling(self, ask: Question, forms: Mapping[str, list[int]]) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams  # type: ignore[import-not-found]

        shared: dict[str, Any] = {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        if isinstance(ask, Choose):
            tokens = sorted({token for ids in forms.values() for token in ids})
            return SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=tokens, **shared)
        how = ask.decoding
        if how.temperature == 0:
            return SamplingParams(max_tokens=how.max_tokens, temperature=0.0, **shared)
        return SamplingParams(
            max_tokens=how.max_tokens, temperature=how.temperature, top_p=how.top_p, seed=seed_of(ask), **shared
        )

    async def _drawn(self, prompt: Any, sampling: Any, adapter: Any) -> Any:
        """vLLM's last word on a prompt."""
        outputs = [each async for each in self.llm.generate(prompt, sampling, uuid4().hex, lora_request=adapter)]
        if not outputs or outputs[-1].outputs[0].finish_reason not in ("stop", "length"):
            raise Passing(f"{self.name} gave up on this row; see its log. The next run asks again.")
        return outputs[-1]

    def _failure(self, error: Exception) -> Exception:
        """What is wrong with the row is an AskError or TooSmall, a dead engine an EngineError, all else may pass."""
        *_, cause = beneath(error)  # vLLM wraps what it did not expect
        if self.llm is None or self.llm.errored:
            return self._dead(error)
        if out_of_memory(error):
            return self._dead(cause, "has no memory left")
        said = f"{type(cause).__name__}: {str(cause)[:SHOWN_CHARS]}"
        if not refused_by_vllm(error):
            return Passing(f"{self.name} failed on this row: {said}. The next run asks again.")
        if TOO_LONG.search(str(error)) or TOO_LONG.search(str(cause)):
            return TooSmall()
        return AskError(f"vLLM refuses this prompt: {said}")

    def _dead(self, error: BaseException, how: str = "died") -> EngineError:
        said = str(error).rstrip(".") or type(error).__name__
        return EngineError(
            f"{self.name} with {self.prompts.chat.name} {how}: {said}. Its log names the cause. {MEMORY} "
            "Everything answered before is kept; repeat the command."
        )


def _watch(llm: Any) -> subprocess.Popen[bytes]:
    """A process that kills vLLM's when this one is gone, however it went."""
    children = [str(process.pid) for process in llm.engine_core.resources.engine_manager.processes]
    command = [sys.executable, "-c", WATCH, *children]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603
