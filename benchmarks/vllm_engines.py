"""Captions by vLLM's asynchronous engine beside `LLM.generate`, with and without its cache of processed pictures.

Run: .venv-vllm/bin/python -m benchmarks.vllm_engines [pictures] [rounds], in the environment of `make test-vllm`.
The embedded model in float32; every round has pictures of its own, and the sides take turns in one process. Pictures are
the demo's (96 pixels), or photographs of a catalogue's size (1024 x 768 JPEG). No side has more in flight than the window
of a run: `LLM.generate` is called once per window, since a catalogue's decoded pictures fit no memory. CPU seconds are
this process's and those of its children; shown is the best of each side. All sides must write the same texts.
"""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from mllmsrec_core.ask import Decoding, Generate, Message, Picture
from mllmsrec_core.datasets import demo
from mllmsrec_core.stages.caption import PROMPT
from storage.blobs import Blobs
from storage.files import Files
from tasks.engines.fronts import open_front
from tasks.engines.vllm import VllmEngine
from tasks.models import resolve

PHOTO = (1024, 768)
WINDOW = 256  # rows in flight, the default of a run
THREADS = 4  # that decode, on both sides
REPEATED = 8  # how often a picture is shown where pictures come again
OPTIONS: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 29, "max_num_seqs": 64}
Side = Callable[[list[Generate]], list[str]]


def pictures(blobs: Blobs, count: int, seed: int, photographs: bool) -> list[Picture]:
    """Different pictures of things of the demo's shop."""
    shown = [demo.picture(item.uri) for item in demo.assortment(count, seed=seed)]
    return [Picture(blobs.put(photograph(png) if photographs else png)) for png in shown]


def photograph(png: bytes) -> bytes:
    """The picture at a catalogue's size, with the grain that makes a JPEG as large as a camera's."""
    large = np.asarray(Image.open(io.BytesIO(png)).convert("RGB").resize(PHOTO), dtype=np.int16)
    grain = np.random.default_rng(len(png)).integers(-6, 7, large.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def questions(model: Any, shown: list[Picture], times: int) -> list[Generate]:
    """As many questions as pictures; each picture comes `times` times, in other words."""
    some = shown[:: times or 1]
    words = [PROMPT, *(f"{PROMPT} {number}" for number in range(1, times))]
    return [Generate(model, (Message("user", (text, picture)),), Decoding(60)) for text in words for picture in some]


def cpu() -> float:
    """CPU seconds of this process and its children so far."""
    import psutil

    every = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in every)


@contextmanager
def asynchronous(blobs: Blobs, found: Any, runner: asyncio.Runner, cache_gb: float) -> Iterator[Side]:
    """The vllm engine as the stages have it."""
    locations = {found.model.slug: found.location}
    engine = VllmEngine(blobs, locations, picture_cache_gb=cache_gb, eager=True, options=OPTIONS, max_model_len=1024)

    def answers(asks: list[Generate]) -> list[str]:
        async def main() -> list[str]:
            window = asyncio.Semaphore(WINDOW)

            async def one(ask: Generate) -> str:
                async with window:
                    return (await engine.answer(ask)).value

            return list(await asyncio.gather(*map(one, asks)))

        return runner.run(main())

    yield answers
    runner.run(engine.close())


@contextmanager
def at_once(blobs: Blobs, found: Any) -> Iterator[Side]:
    """Prompts made in threads by the same code, then one call of `LLM.generate`."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    chat = open_front(found.model, {found.model.slug: found.location}, blobs).chat
    llm = LLM(
        found.location, dtype="float32", enforce_eager=True, enable_prefix_caching=True, mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": 1, "video": 0}, max_model_len=1024, **OPTIONS,
    )  # fmt: skip
    how = SamplingParams(max_tokens=60, temperature=0.0, detokenize=False)

    def answers(asks: list[Generate]) -> list[str]:
        return [text for start in range(0, len(asks), WINDOW) for text in window(asks[start : start + WINDOW])]

    def window(asks: list[Generate]) -> list[str]:
        with ThreadPoolExecutor(THREADS) as threads:
            prompts = list(threads.map(lambda ask: chat.prompt(ask.messages, ask.model.max_pixels), asks))
        shown = [
            {"prompt_token_ids": chat.ids(prompt.text), "multi_modal_data": {"image": list(prompt.pictures)}}
            for prompt in prompts
        ]
        drawn = llm.generate(shown, how, use_tqdm=False)
        return [chat.tokenizer.decode(each.outputs[0].token_ids, skip_special_tokens=True).strip() for each in drawn]

    yield answers
    llm.llm_engine.engine_core.shutdown()


def measured(side: Side, asks: list[Generate]) -> tuple[float, float, list[str]]:
    """CPU and wall seconds, and the texts."""
    spent, started = cpu(), time.perf_counter()
    texts = side(asks)
    return cpu() - spent, time.perf_counter() - started, texts


def compared(sides: dict[str, Side], rounds: list[list[Generate]]) -> None:
    """Every side over every round, in turns; the first side is 1."""
    best: dict[str, tuple[float, float]] = {}
    for number, asks in enumerate(rounds):
        order = list(sides) if number % 2 else list(sides)[::-1]
        made = {name: measured(sides[name], asks) for name in order}
        for name, (spent, wall, _) in made.items():
            before = best.get(name, (spent, wall))
            best[name] = (min(before[0], spent), min(before[1], wall))
        first = made[next(iter(sides))][2]
        differ = {name: sum(a != b for a, b in zip(first, texts, strict=True)) for name, (_, _, texts) in made.items()}
        assert not any(differ.values()), differ
    one = best[next(iter(sides))]
    for name, (spent, wall) in best.items():
        print(f"  {name:34} {spent:6.2f} s CPU {spent / one[0]:5.2f}   {wall:6.2f} s wall {wall / one[1]:5.2f}")


def main(count: int = 256, rounds: int = 4) -> None:
    """Print one table for each kind of pictures."""
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here; `make test-vllm` installs it into .venv-vllm")
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    found = resolve("embedded-vlm", max_pixels=1_000_000)
    with tempfile.TemporaryDirectory() as store, asyncio.Runner() as runner:
        blobs = Blobs(Files(store))
        with (
            asynchronous(blobs, found, runner, 0) as plain,
            asynchronous(blobs, found, runner, 4) as cached,
            at_once(blobs, found) as whole,
        ):
            sides = {"asynchronous": plain, "asynchronous, pictures cached": cached, "LLM.generate": whole}
            for photographs, times in ((False, 1), (True, 1), (True, REPEATED)):
                size = "x".join(map(str, PHOTO if photographs else (demo.SIZE, demo.SIZE)))
                print(f"{count} captions, {size} pixels, each picture {times} time(s), best of {rounds} rounds")
                seeds = range(100 * times + 50 * photographs, 100 * times + 50 * photographs + rounds + 1)
                first, *made = [
                    questions(found.model, pictures(blobs, count, seed, photographs), times) for seed in seeds
                ]
                for side in sides.values():
                    side(first[:64])  # warm
                compared(sides, made)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
