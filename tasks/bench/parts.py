"""The parts of a stage's work, each timed alone on the same questions, so that it is seen which one bounds it.

Passes through an engine are told apart by a word in front of each prompt where the engine remembers prompts. Knows
nothing of ratios or of how figures are shown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from PIL import Image

from mllmsrec_core.ask import Ask, Choose, Embed, Fetch, Generate, Message, Picture, Reply, key, pictures_in
from mllmsrec_core.errors import AskError
from storage.blobs import Blobs
from storage.store import Store
from tasks.bench.meter import in_turn
from tasks.bench.rehearsal import Asked, Bout
from tasks.engines import Engine
from tasks.engines.pictures import check, decode
from tasks.loop import ENGINE_LOOP

PARTS = ("source", "decode of images", "prefill", "decode", "writer")
CHECKERS, COPIERS = 4, 8  # threads in which the fetch engine decodes and keeps pictures

LOOKED_AT = 32  # pictures handed to a processor at once: a batch of the transformers engine

EngineFor = Callable[[Ask], Engine]
AskAll = Callable[[Sequence[Sequence[Ask]]], None]
Look = Callable[[list[Image.Image]], Any]


class Anew:
    """An engine, asked what it has not read before: one that keeps prompts would answer a second pass from memory."""

    def __init__(self, engine: Engine, word: str) -> None:
        self.engine, self.word, self.name, self.answers = engine, word, engine.name, engine.answers

    async def answer(self, ask: Ask) -> Reply:
        if isinstance(ask, Generate | Choose):
            first, *others = ask.messages
            ask = replace(ask, messages=(Message(first.role, (f"({self.word}) ", *first.parts)), *others))
        return await self.engine.answer(ask)

    async def close(self) -> None:
        """The engine is its owner's to close."""


def pictures(ask: Ask) -> list[Picture]:
    """The pictures a question shows, in order."""
    if isinstance(ask, Generate | Choose):
        return pictures_in(ask.messages)
    return [ask.content] if isinstance(ask, Embed) and isinstance(ask.content, Picture) else []


def bare(units: Sequence[Sequence[Ask]], engine_for: EngineFor, window: int) -> None:
    """Ask every question of every unit and keep nothing: one after another within a unit, each different one once."""
    started: dict[bytes, asyncio.Future[None]] = {}
    named = [[(key(ask), ask) for ask in unit] for unit in units]

    async def one(ask: Ask) -> None:
        try:
            await engine_for(ask).answer(ask)
        except AskError:
            pass  # counted where answers are kept

    async def chain(unit: list[tuple[bytes, Ask]], room: asyncio.Semaphore) -> None:
        async with room:
            for name, ask in unit:
                if name not in started:
                    started[name] = asyncio.ensure_future(one(ask))
                await started[name]

    async def everything() -> None:
        room = asyncio.Semaphore(window)
        await asyncio.gather(*(chain(unit, room) for unit in named))

    ENGINE_LOOP.run(everything())


def parts(
    bout: Bout, blobs: Blobs, fresh: Store, seconds: float, ask_all: AskAll, look: Look | None
) -> dict[str, float]:
    """Seconds of each of PARTS for the different questions of a stage, all of which take `seconds` in a bare loop.

    source: reading the bytes of pictures from `blobs`. decode of images: Pillow, then `look`, a model's processor, where
    it is at hand. prefill: the same prompts with one token to write, less those two. decode: the rest of the bare loop.
    writer: the same answers added to the empty store `fresh` and flushed. Of fetching the source is the rest.
    """
    asked = bout.asked()
    if isinstance(asked[0][0], Fetch):
        return _parts_of_fetching(asked, blobs, fresh, seconds, ask_all)
    shown = [(picture.sha256, _most(ask)) for ask, _ in asked for picture in pictures(ask)]
    contents: list[bytes] = []
    source = timed(lambda: contents.extend(blobs.get(sha256) for sha256, _ in shown))
    decoding = timed(lambda: _decoded(contents, [most for _, most in shown], look))
    writes = any(isinstance(ask, Generate) for ask, _ in asked)
    reading = min(seconds, _reading(asked, ask_all)) if writes else seconds
    found = (source, decoding, max(0.0, reading - source - decoding), seconds - reading, _writing(asked, fresh))
    return dict(zip(PARTS, found, strict=True))


def _reading(asked: Asked, ask_all: AskAll) -> float:
    """As the bare loop is: the best of several rounds."""
    first = [[_first_word(ask)] for ask, _ in asked]
    return in_turn({"": lambda: ask_all(first)})[""][0].seconds


def _parts_of_fetching(asked: Asked, blobs: Blobs, fresh: Store, seconds: float, ask_all: AskAll) -> dict[str, float]:
    contents = [blobs.get(reply.value["sha256"]) for _, reply in asked if reply.value]
    with ThreadPoolExecutor(CHECKERS) as checkers, ThreadPoolExecutor(COPIERS) as copiers:
        checking = timed(lambda: list(checkers.map(check, contents)))
        copying = timed(lambda: list(copiers.map(fresh.blobs.put, contents)))
    whole = [[replace(ask, max_pixels=None)] for ask, _ in asked if isinstance(ask, Fetch)]
    checking += max(0.0, seconds - in_turn({"": lambda: ask_all(whole)})[""][0].seconds)  # making smaller copies
    writing = copying + _writing(asked, fresh)
    return dict(zip(PARTS, (max(0.0, seconds - checking - copying), checking, 0.0, 0.0, writing), strict=True))


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _most(ask: Ask) -> int | None:
    return None if isinstance(ask, Fetch) else ask.model.max_pixels


def _first_word(ask: Ask) -> Ask:
    return replace(ask, decoding=replace(ask.decoding, max_tokens=1)) if isinstance(ask, Generate) else ask


def _decoded(contents: Sequence[bytes], most: Sequence[int | None], look: Look | None) -> None:
    """Every picture as often as it is shown, as engines do it; one that cannot be decoded costs nothing more."""
    images = []
    for n, (content, max_pixels) in enumerate(zip(contents, most, strict=True), 1):
        try:
            images.append(decode(content, max_pixels))
        except AskError:
            pass
        if look and images and (len(images) == LOOKED_AT or n == len(contents)):
            look(images)
            images = []


def _writing(asked: Asked, store: Store) -> float:
    def write() -> None:
        for ask, reply in asked:
            store.replies.add(ask, key(ask), reply)
        store.replies.flush()

    return timed(write)
