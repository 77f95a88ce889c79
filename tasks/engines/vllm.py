"""The vllm engine: Generate and Choose by vLLM's asynchronous engine, inside this process's reach.

Continuous batching, prefix caching and LoRA per row are vLLM's. It is started with the room that the questions waiting
for it need, and again when later ones need more. The CPU and the CUDA build run by the same lines. Knows nothing of
stages.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mllmsrec_core.ask import Ask, Choose, Generate, Model, Reply, kind, pictures_in
from mllmsrec_core.errors import ContextTooLong, EngineError, Passing
from storage.blobs import Blobs
from tasks.engines.adapters import CONFIG, unpack
from tasks.engines.checkpoint import location_of
from tasks.engines.vllm_prompts import Prepared, Prompts, Question
from tasks.engines.vllm_room import AGAIN, Needs, Shown, room, together
from tasks.engines.vllm_running import MEMORY, STOP_S, Running, TooSmall

# Rows with pictures from decoding to the answer, whatever the window: hosts were killed by 512 large pictures in flight,
# and 128 keep an engine busy.
PICTURES_HELD = 128
PREPARERS = 4  # threads that decode pictures; decoding releases the interpreter
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM knows these limits only (0.32, config/lora.py)
PICTURE_CACHE_GB = 4.0  # vLLM's own default, where pictures come again
# They belong to the Ask or to this engine: an answer would change under an unchanged key, or not be found.
NO_OPTIONS = frozenset({
    "model", "tokenizer", "revision", "tokenizer_revision", "code_revision", "dtype", "quantization", "logprobs_mode",
    "max_model_len", "enable_lora", "max_lora_rank", "limit_mm_per_prompt", "mm_processor_cache_gb",
    "trust_remote_code", "generation_config", "override_generation_config", "hf_overrides", "chat_template",
    "load_format", "config_format", "hf_config_path", "tokenizer_mode", "skip_tokenizer_init", "kv_cache_dtype",
    "calculate_kv_scales", "mm_processor_kwargs", "media_io_kwargs", "lora_dtype", "default_mm_loras",
    "speculative_config", "logits_processors", "disable_sliding_window", "language_model_only", "hf_token",
})  # fmt: skip
# Quiet, nothing reported home, and no fork of a process that has threads.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


class VllmEngine:
    """Answers Generate and Choose.

    `locations` maps a model's slug to its folder or hub id. One model runs at a time: an Ask to another one, or one
    that needs LoRA, more pictures per prompt, a picture cache or more tokens than the running one has, waits until nothing is
    in flight, and vLLM starts again. Its `max_model_len` is what the Asks waiting at the start need, with a margin;
    ours is the most it may become (None: what the model has), and a row that only this bound keeps out fails
    passingly. `picture_cache_gb` is memory for processed pictures; None: 0 at a start before any picture came again,
    4 after it. `options` go to vLLM as they are (`AsyncEngineArgs`). Greedy at temperature 0; above it each row draws
    by a seed made of the Ask's key.
    """

    answers: frozenset[type[Ask]] = frozenset({Generate, Choose})

    def __init__(
        self,
        blobs: Blobs,
        locations: Mapping[str, str],
        *,
        max_model_len: int | None = None,
        picture_cache_gb: float | None = None,
        eager: bool = False,
        options: Mapping[str, Any] = MappingProxyType({}),
        name: str = "vllm",
    ) -> None:
        if wrong := sorted(NO_OPTIONS & set(options)):
            raise EngineError(f"{name}: {', '.join(wrong)} cannot be an option of vLLM here; set it with the model.")
        self.blobs, self.locations, self.name = blobs, locations, name
        self._limit, self._cache_gb, self._eager, self._options = max_model_len, picture_cache_gb, eager, dict(options)
        self._running: Running | None = None
        self._prompts: dict[Model, Prompts] = {}
        self._ranks: dict[str, int] = {}
        self._gate = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._broken: EngineError | None = None  # what failed to open is not tried again by every row that waits
        self._waiting: list[Needs] = []
        self._shown = Shown()
        self._places = asyncio.Semaphore(PICTURES_HELD)
        self._preparing = 0
        self._prepared = asyncio.Event()  # nothing is being prepared
        self._threads = ThreadPoolExecutor(PREPARERS, thread_name_prefix=name)
        self._adapters = tempfile.TemporaryDirectory(prefix="adapters-")
        self._counters = {"prompt_tokens": 0, "reused_tokens": 0, "images": 0}

    async def answer(self, ask: Ask) -> Reply:
        """The model's text, or its raw log-probabilities at the first answer token."""
        if not isinstance(ask, Generate | Choose):
            raise EngineError(f"{self.name} answers generate and choose, not {kind(ask)}; name another engine for it.")
        # Taken before anything a start waits for, and never while the gate is held: a row without a place blocks nobody.
        async with self._places if pictures_in(ask.messages) else contextlib.nullcontext():
            return await self._answered(ask)

    async def _answered(self, ask: Question) -> Reply:
        self._preparing += 1
        self._prepared.clear()
        try:
            prompts, prepared, needs = await self._prepare(ask)
        finally:
            self._preparing -= 1
            if not self._preparing:
                self._prepared.set()  # whoever waits for it runs after this row stands among the waiting
        while True:
            self._check(prompts, prepared, needs.tokens)
            running = await self._enter(ask, prompts, needs)
            started = time.perf_counter()
            try:
                reply = await running.answer(ask, prepared)
            except TooSmall:
                tokens = await self._in_thread(prompts.tokens, prepared)
                needs = replace(needs, tokens=max(tokens, running.needs.tokens + 1))
                continue
            finally:
                running.leave()
            return replace(reply, engine=self.name, seconds=time.perf_counter() - started)

    def counters(self) -> dict[str, int]:
        """Since this engine was made: tokens of the prompts answered (pictures counted), those of them that the prefix
        cache held, and pictures shown."""
        return dict(self._counters)

    @property
    def room(self) -> int:
        """Tokens that the running vLLM has room for in one prompt and its answer; 0 before the first start."""
        return self._running.needs.tokens if self._running else 0

    async def close(self) -> None:
        """End vLLM's process and free its memory."""
        async with self._gate:
            await self._stop()
        self._threads.shutdown(wait=False)
        self._adapters.cleanup()

    def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def _prepare(self, ask: Question) -> tuple[Prompts, Prepared, Needs]:
        """The Ask as vLLM reads it, and what it needs; where vLLM runs already, it will count the pictures' tokens."""
        weights, adapter = replace(ask.model, adapter=None, max_pixels=None), ask.model.adapter
        async with self._opening:
            if self._broken:
                raise self._broken
            if weights not in self._prompts:
                self._prompts[weights] = await self._opened(weights)
            if adapter and adapter not in self._ranks:
                self._ranks[adapter] = await asyncio.to_thread(self._unpacked, adapter)
        prompts = self._prompts[weights]
        prepared = await self._in_thread(prompts.prepare, ask)
        runs = self._running is not None and self._running.needs.weights == weights
        tokens = prepared.least if runs else await self._in_thread(prompts.tokens, prepared)
        self._shown.add(prepared.shown)
        cache = self._cache_gb is None and self._shown.again >= AGAIN
        rank = self._ranks[adapter] if adapter else 0
        return prompts, prepared, Needs(weights, rank, max(1, len(prepared.shown)), tokens, cache)

    async def _opened(self, weights: Model) -> Prompts:
        try:
            if weights.quantisation != "none":
                raise EngineError(
                    f"{self.name} does not serve {weights.quantisation} weights of {weights.slug}; "
                    "set `quantisation = 'none'`, or answer with the transformers engine."
                )
            return await asyncio.to_thread(Prompts, weights, self.locations, self.blobs)
        except EngineError as error:
            self._broken = error
            raise

    def _check(self, prompts: Prompts, prepared: Prepared, tokens: int) -> None:
        """Raises for a row that no start can make room for."""
        most = self._most(prompts)
        if most is None and self._running and self._running.prompts is prompts:
            most = self._running.needs.tokens
        if most is None or tokens <= most:
            return
        read, free = tokens - prepared.written, most - prepared.written
        what = f"the prompt has {read} tokens, and the model has room for {free}"
        if prompts.positions is None or most < prompts.positions:  # the setting keeps it out, not the model
            raise Passing(f"{what}. Raise `max_model_len` and run again.")
        raise ContextTooLong(what)

    def _most(self, prompts: Prompts) -> int | None:
        return min((limit for limit in (self._limit, prompts.positions) if limit is not None), default=None)

    async def _enter(self, ask: Question, prompts: Prompts, needs: Needs) -> Running:
        """The running engine that can answer `ask`, started if need be; the Ask counts as in flight from here."""
        adapter = ask.model.adapter
        self._waiting.append(needs)
        try:
            async with self._gate:
                if self._broken:
                    raise self._broken
                if self._running is None or not self._running.needs.covers(needs):
                    self._running = await self._started(prompts, needs)
                await self._running.wear(adapter, Path(self._adapters.name, adapter or ""))
                self._running.enter()
                return self._running
        finally:
            self._waiting.remove(needs)

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

    async def _started(self, prompts: Prompts, needs: Needs) -> Running:
        """vLLM with all that is needed by what waits, and was so far by the same weights, once nothing is in flight."""
        if self._running is not None:
            await self._running.idle.wait()
        await self._prepared.wait()
        needs = together(needs, self._waiting)
        cache = self._cache_gb is None and self._shown.again > 0
        needs = replace(needs, tokens=room(needs.tokens, self._most(prompts)), cache=cache)
        if self._running is not None:
            needs = self._running.needs.grown(needs)
        await self._stop()
        cancelled = threading.Event()
        try:
            llm = await asyncio.to_thread(self._launch, needs, prompts, cancelled)
        except asyncio.CancelledError:
            cancelled.set()  # the thread goes on, and stops what it started
            raise
        except EngineError as error:
            self._broken = error
            raise
        started = replace(needs, tokens=int(llm.model_config.max_model_len))
        return Running(self.name, started, prompts, llm, self._counters)

    async def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            await running.stop()
            del running
            gc.collect()  # vLLM's objects form cycles, and complain when they are first freed at exit

    def _launch(self, needs: Needs, prompts: Prompts, cancelled: threading.Event) -> Any:
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
        what = f"{needs.weights.slug} and room for {needs.tokens} tokens"
        try:
            llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments(needs, prompts)))
        except Exception as error:  # start-up fails with whatever its child failed with
            raise EngineError(
                f"{self.name} did not start with {what}: {type(error).__name__}: {error}. "
                f"Its log above names the cause. {MEMORY}"
            ) from error
        if cancelled.is_set():
            llm.shutdown(STOP_S)
        return llm

    def _arguments(self, needs: Needs, prompts: Prompts) -> dict[str, Any]:
        location, revision = location_of(needs.weights, self.locations)
        arguments: dict[str, Any] = {
            "model": location,
            "revision": revision,
            "tokenizer_revision": revision,
            "dtype": needs.weights.dtype,
            "max_model_len": needs.tokens or None,
            "enable_prefix_caching": True,
            "logprobs_mode": "raw_logprobs",
            "enforce_eager": self._eager,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if prompts.chat.sees:
            arguments["limit_mm_per_prompt"] = {"image": needs.pictures, "video": 0}
            arguments["mm_processor_cache_gb"] = (
                PICTURE_CACHE_GB * needs.cache if self._cache_gb is None else self._cache_gb
            )
        if needs.rank:
            arguments |= {"enable_lora": True, "max_lora_rank": needs.rank}
        return arguments | self._options
