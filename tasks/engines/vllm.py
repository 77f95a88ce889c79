"""The vllm engine: Generate and Choose by vLLM's asynchronous engine, inside this process's reach.

Continuous batching, prefix caching and LoRA per row are vLLM's; prompts, pictures and first answer tokens are made by
the same code as the transformers engine's. The CPU and the CUDA build run by the same lines. Knows nothing of stages.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

from mllmsrec_core.ask import Ask, Choose, Generate, Model, Picture, Reply, kind
from mllmsrec_core.errors import AskError, ContextTooLong, EmptyReply, EngineError, MllmsrecError, Passing
from storage.blobs import Blobs
from tasks.engines.adapters import CONFIG, unpack
from tasks.engines.answers import chosen, seed_of
from tasks.engines.checkpoint import location_of
from tasks.engines.fronts import Front, open_front

Question = Generate | Choose
PREPARERS = 4  # threads that decode pictures; decoding releases the interpreter
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM knows these limits only (0.32, config/lora.py)
PICTURE_CACHE_GB = 4.0  # vLLM's own default
# They belong to the Ask or to this engine: an answer would change under an unchanged key, or not be found.
NO_OPTIONS = frozenset({
    "model", "tokenizer", "revision", "tokenizer_revision", "code_revision", "dtype", "quantization", "logprobs_mode",
    "max_model_len", "enable_lora", "max_lora_rank", "limit_mm_per_prompt", "mm_processor_cache_gb",
    "trust_remote_code", "generation_config", "override_generation_config", "hf_overrides", "chat_template",
})  # fmt: skip
# Quiet, nothing reported home, and no fork of a process that has threads.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
SHOWN_CHARS = 300  # of vLLM's complaint about a row
# vLLM's children do not notice that their parent was killed, and would keep the device's memory for ever. This reads a
# pipe that closes with the parent, and then kills them.
WATCH = "import os, signal, sys\nsys.stdin.read()\nfor pid in sys.argv[1:]:\n    os.kill(int(pid), signal.SIGKILL)"
STOP_S = 30.0  # a child that has not ended by then is killed
TOO_LONG = re.compile(r"maximum (context|model) length")
MEMORY = (
    "If memory ran out, lower `max_model_len`, or `gpu_memory_utilization` or `max_num_seqs` in the engine's options."
)


@dataclass(frozen=True)
class _Needs:
    """What a running engine must have been started with: weights, LoRA layers of this rank, pictures per prompt."""

    weights: Model
    rank: int = 0  # 0: no adapter
    pictures: int = 1

    def covers(self, other: _Needs) -> bool:
        return self.weights == other.weights and self.rank >= other.rank and self.pictures >= other.pictures

    def grown(self, other: _Needs) -> _Needs:
        """What covers both; other weights start anew."""
        if self.weights != other.weights:
            return other
        return replace(self, rank=max(self.rank, other.rank), pictures=max(self.pictures, other.pictures))


class VllmEngine:
    """Answers Generate and Choose.

    `locations` maps a model's slug to its folder or hub id. One model runs at a time: an Ask to another one, or one
    that needs LoRA or more pictures per prompt than the running one has room for, waits until nothing is in flight,
    and vLLM starts again. `max_model_len` bounds prompt and answer together, in tokens; a row that only this bound
    keeps out fails passingly. `picture_cache_gb` is memory for processed pictures; 0 where no picture comes twice.
    `options` go to vLLM as they are (`AsyncEngineArgs`). Greedy at temperature 0; above it each row draws by a seed
    made of the Ask's key.
    """

    answers: frozenset[type[Ask]] = frozenset({Generate, Choose})

    def __init__(
        self,
        blobs: Blobs,
        locations: Mapping[str, str],
        *,
        max_model_len: int | None = None,
        picture_cache_gb: float = PICTURE_CACHE_GB,
        eager: bool = False,
        options: Mapping[str, Any] = MappingProxyType({}),
        name: str = "vllm",
    ) -> None:
        if wrong := sorted(NO_OPTIONS & set(options)):
            raise EngineError(f"{name}: {', '.join(wrong)} cannot be an option of vLLM here; set it with the model.")
        self.blobs, self.locations, self.name = blobs, locations, name
        self._limit, self._cache_gb, self._eager, self._options = max_model_len, picture_cache_gb, eager, dict(options)
        self._running: _Running | None = None
        self._fronts: dict[Model, Front] = {}
        self._gate = asyncio.Lock()
        self._broken: EngineError | None = None  # a start that failed is not tried again by every row that waits
        self._ranks: dict[str, int] = {}
        self._adapters = tempfile.TemporaryDirectory(prefix="adapters-")

    async def answer(self, ask: Ask) -> Reply:
        """The model's text, or its raw log-probabilities at the first answer token."""
        if not isinstance(ask, Generate | Choose):
            raise EngineError(f"{self.name} answers generate and choose, not {kind(ask)}; name another engine for it.")
        running = await self._enter(ask)
        started = time.perf_counter()
        try:
            reply = await running.answer(ask)
        finally:
            running.leave()
        return replace(reply, engine=self.name, seconds=time.perf_counter() - started)

    async def close(self) -> None:
        """End vLLM's process and free its memory."""
        async with self._gate:
            await self._stop()
        self._adapters.cleanup()

    async def _enter(self, ask: Question) -> _Running:
        """The running engine that can answer `ask`, started if need be; the Ask counts as in flight from here."""
        adapter = ask.model.adapter
        async with self._gate:
            if self._broken:
                raise self._broken
            if adapter and adapter not in self._ranks:
                self._ranks[adapter] = await asyncio.to_thread(self._unpacked, adapter)
            needs = self._needs(ask)
            if self._running is None or not self._running.needs.covers(needs):
                self._running = await self._started(needs)
            await self._running.wear(adapter, Path(self._adapters.name, adapter or ""))
            self._running.enter()
            return self._running

    def _needs(self, ask: Question) -> _Needs:
        pictures = sum(isinstance(part, Picture) for message in ask.messages for part in message.parts)
        weights = replace(ask.model, adapter=None, max_pixels=None)
        rank = self._ranks[ask.model.adapter] if ask.model.adapter else 0
        return _Needs(weights, rank, max(1, pictures))

    def _unpacked(self, adapter: str) -> int:
        """The rank that vLLM must have room for; the adapter lies in its folder from here on."""
        folder = Path(self._adapters.name, adapter)
        unpack(self.blobs.get(adapter), folder)
        rank = int(json.loads((folder / CONFIG).read_text())["r"])
        if rank > RANKS[-1]:
            raise EngineError(
                f"adapter {adapter[:12]} has rank {rank}, and vLLM serves at most {RANKS[-1]}; train a smaller."
            )
        return next(room for room in RANKS if room >= rank)

    async def _started(self, needs: _Needs) -> _Running:
        """vLLM with all that was needed so far by the same weights, once nothing is in flight any more."""
        if self._running is not None:
            needs = self._running.needs.grown(needs)
            await self._running.idle.wait()
        await self._stop()
        try:
            return await asyncio.to_thread(self._start, needs)
        except EngineError as error:
            self._broken = error
            raise

    async def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            await running.stop()
            del running
            gc.collect()  # vLLM's objects form cycles, and complain when they are first freed at exit

    def _start(self, needs: _Needs) -> _Running:
        model = needs.weights
        if model.quantisation != "none":
            raise EngineError(
                f"{self.name} does not serve {model.quantisation} weights of {model.slug}; "
                "set `quantisation = 'none'`, or answer with the transformers engine."
            )
        if model not in self._fronts:
            self._fronts[model] = open_front(model, self.locations, self.blobs)
        front = self._fronts[model]
        return _Running(self.name, needs, front, self._launch(needs, front))

    def _launch(self, needs: _Needs, front: Front) -> Any:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
            from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]
        except ImportError as error:
            raise EngineError(
                f"vLLM cannot be imported ({error}); install it with `pip install -e '.[vllm]'` on a machine with a GPU, "
                "or answer with the transformers engine."
            ) from error
        slug = needs.weights.slug
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments(needs, front)))
        except Exception as error:  # start-up fails with whatever its child failed with
            raise EngineError(
                f"{self.name} did not start with {slug}: {type(error).__name__}: {error}. Its log above names the cause. "
                f"{MEMORY}"
            ) from error

    def _arguments(self, needs: _Needs, front: Front) -> dict[str, Any]:
        location, revision = location_of(needs.weights, self.locations)
        limits = [limit for limit in (self._limit, front.positions) if limit is not None]
        arguments: dict[str, Any] = {
            "model": location,
            "revision": revision,
            "tokenizer_revision": revision,
            "dtype": needs.weights.dtype,
            "max_model_len": min(limits, default=None),
            "enable_prefix_caching": True,
            "logprobs_mode": "raw_logprobs",
            "enforce_eager": self._eager,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if front.chat.sees:
            arguments["limit_mm_per_prompt"] = {"image": needs.pictures, "video": 0}
            arguments["mm_processor_cache_gb"] = self._cache_gb
        if needs.rank:
            arguments |= {"enable_lora": True, "max_lora_rank": needs.rank}
        return arguments | self._options


class _Running:
    """One started AsyncLLM, the Asks in flight in it and the adapters it has loaded."""

    llm: Any  # None once it is stopped

    def __init__(self, name: str, needs: _Needs, front: Front, llm: Any) -> None:
        self.name, self.needs, self.chat, self.llm = name, needs, front.chat, llm
        self.room = int(llm.model_config.max_model_len)
        self.bounded = front.positions is None or self.room < front.positions  # by a setting, not by the model
        self.idle = asyncio.Event()
        self.idle.set()
        self._in_flight = 0
        self._loaded: dict[str, Any] = {}
        self._wearing: str | None = None
        self._tokenizing = threading.Lock()  # a fast tokenizer cannot be borrowed by two threads at once
        self._threads = ThreadPoolExecutor(PREPARERS, thread_name_prefix=name)
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
        self._watch.kill()
        await asyncio.to_thread(self._watch.communicate)
        self._threads.shutdown(wait=False)

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
                f"adapter {adapter[:12]} does not fit {self.chat.name} in vLLM: {error}. "
                "Use the base model it was trained on, and targets in its language model only."
            ) from error
        return request

    async def answer(self, ask: Question) -> Reply:
        prompt, forms = await asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, ask)
        written = ask.decoding.max_tokens if isinstance(ask, Generate) else 0
        try:
            [ready] = await self.llm.renderer.render_cmpl_async([prompt])
            read = len(ready["prompt_token_ids"])  # pictures counted
            if read + written > self.room:  # transformers refuses it too; vLLM would cut the answer short
                raise self._too_long(f"the prompt has {read} tokens, and the model has room for {self.room - written}")
            drawn = await self._drawn(ready, self._sampling(ask, forms), self._loaded.get(ask.model.adapter or ""))
        except MllmsrecError:
            raise
        except Exception as error:
            raise self._failure(error) from error
        if isinstance(ask, Generate):
            return self._text(list(drawn.token_ids), read)
        logs = {token: entry.logprob for token, entry in drawn.logprobs[0].items()}
        return chosen(logs, forms, read)

    def _prepare(self, ask: Question) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """What vLLM reads, and the first tokens of each choice; in a worker thread."""
        shown = [part.sha256 for message in ask.messages for part in message.parts if isinstance(part, Picture)]
        prompt = self.chat.prompt(ask.messages, ask.model.max_pixels)
        with self._tokenizing:
            ids = self.chat.ids(prompt.text)
            forms = self.chat.first_tokens(prompt.text, ask.choices) if isinstance(ask, Choose) else {}
        asked: dict[str, Any] = {"prompt_token_ids": ids}
        if shown:  # named by content, so that equal pictures are processed and encoded once
            asked["multi_modal_data"] = {"image": list(prompt.pictures)}
            asked["multi_modal_uuids"] = {"image": [f"{sha256}-{ask.model.max_pixels}" for sha256 in shown]}
        return asked, forms

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
        drawn = outputs[-1].outputs[0] if outputs else None
        if drawn is None or drawn.finish_reason not in ("stop", "length"):
            raise Passing(f"{self.name} gave up on this row; see its log. The next run asks again.")
        return drawn

    def _failure(self, error: Exception) -> MllmsrecError:
        """What is wrong with the row is an AskError, a dead engine an EngineError."""
        if self.llm is None or self.llm.errored:
            return self._dead(error)
        cause = error.__cause__ or error  # vLLM wraps what it did not expect
        if TOO_LONG.search(str(cause)):
            return self._too_long(str(cause))
        return AskError(f"vLLM refuses this prompt: {type(cause).__name__}: {str(cause)[:SHOWN_CHARS]}")

    def _too_long(self, what: str) -> AskError:
        if self.bounded:
            return Passing(f"{what}. Raise `max_model_len` and run again.")
        return ContextTooLong(what)

    def _dead(self, error: BaseException) -> EngineError:
        return EngineError(
            f"{self.name} with {self.chat.name} died: {error}. Its log names the cause. {MEMORY} "
            "Everything answered before is kept; repeat the command."
        )

    def _text(self, tokens: list[int], read: int) -> Reply:
        with self._tokenizing:
            text = self.chat.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if not text:
            raise EmptyReply(f"{self.chat.name} wrote nothing ({len(tokens)} tokens, none of them text)")
        return Reply(text, tokens_in=read, tokens_out=len(tokens))


def _watch(llm: Any) -> subprocess.Popen[bytes]:
    """A process that kills vLLM's when this one is gone, however it went."""
    children = [str(process.pid) for process in llm.engine_core.resources.engine_manager.processes]
    command = [sys.executable, "-c", WATCH, *children]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603
