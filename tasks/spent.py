"""What engines had to do for one pass over a stage's rows: tokens read and not read again, pictures, time and memory.

Counted beside the runner, for the stage's record and manifests; no figure here is part of a digest or of what is reused.
Knows nothing of stages or tables.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllmsrec_core.ask import Ask, Choose, Embed, Fetch, Generate, Message, Picture, pictures_in
from mllmsrec_core.prefixes import shared
from tasks.engines import Engine

if TYPE_CHECKING:
    from tasks.runner import Counts

LOOKED_AT = 200  # prompts whose beginnings are compared: some ten users of scoring
STATUS = Path("/proc/self/status")
RUSAGE_BYTES = 1 if sys.platform == "darwin" else 1024  # of a unit of ru_maxrss


class Meter:
    """Gives each Ask its engine, as the function it is made of does, and notes what is asked.

    An engine that counts is believed about what was asked of it between its first Ask here and `note`; nobody else may
    ask it meanwhile. It costs less than a microsecond an Ask.
    """

    def __init__(self, engine_for: Callable[[Ask], Engine]) -> None:
        self._engine_for = engine_for
        self._counting: dict[Engine, dict[str, int]] = {}  # what each said first
        self._first: list[tuple[Message, ...]] = []
        self._images = 0  # asked of engines that do not count

    def __call__(self, ask: Ask) -> Engine:
        engine = self._engine_for(ask)
        if not hasattr(engine, "counters"):
            self._images += _pictures(ask)
        elif engine not in self._counting:
            self._counting[engine] = _counters(engine)
        if len(self._first) < LOOKED_AT and isinstance(ask, Generate | Choose):
            self._first.append(ask.messages)
        return engine

    def note(self, counts: Counts) -> None:
        """Write down in `counts` what this pass asked. Called once, at its end."""
        counts.images = self._images
        for engine, before in self._counting.items():
            made = {name: value - before.get(name, 0) for name, value in _counters(engine).items()}
            counts.images += made.get("images", 0)
            if "reused_tokens" in made:
                counts.read_tokens += made.get("prompt_tokens", 0)
                counts.reused_tokens += made["reused_tokens"]
        alike = shared(self._first)
        counts.compared_tokens, counts.shared_tokens = alike.total, alike.total - alike.unique


def _counters(engine: Any) -> dict[str, int]:
    return engine.counters()


def _pictures(ask: Ask) -> int:
    """How many pictures an Ask is about."""
    if isinstance(ask, Generate | Choose):
        return len(pictures_in(ask.messages))
    return int(isinstance(ask, Fetch) or (isinstance(ask, Embed) and isinstance(ask.content, Picture)))


def engine_figures(counts: Counts) -> dict[str, Any]:
    """What the record and the manifests say under `engine`, of what this run asked; None is what nobody knows.

    `prompt_tokens` by the replies; `reused_tokens` of them were not computed since their beginning had been, and
    `hit_rate` is their share by the engine's own count. `shared_ratio` is the share of the first prompts' tokens, by rule
    of thumb, that repeats how the prompt asked just before began: what an engine could reuse. `images` were in the
    questions. The rates, of tokens read and written, are over `seconds`, from the first question to the last answer,
    opening the engine included. `peak_memory_mb` is the most this process ever held, in millions of bytes.
    """
    seconds = counts.asking_seconds
    known = bool(counts.read_tokens)
    return {
        "prompt_tokens": counts.tokens_in,
        "reused_tokens": counts.reused_tokens if known else None,
        "hit_rate": _ratio(counts.reused_tokens, counts.read_tokens),
        "shared_ratio": _ratio(counts.shared_tokens, counts.compared_tokens),
        "images": counts.images,
        "seconds": round(seconds, 3),
        "tokens_per_s": _ratio(counts.tokens_in + counts.tokens_out, seconds, 1),
        "images_per_s": _ratio(counts.images, seconds, 1),
        "peak_memory_mb": peak_memory_mb(),
    }


def peak_memory_mb() -> int:
    """The most memory this process has held so far, in millions of bytes; its children's is their own."""
    if STATUS.exists():  # where ru_maxrss begins with what the process held that started this one
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) * 1024 / 1e6)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RUSAGE_BYTES / 1e6)


def _ratio(part: float, whole: float, digits: int = 6) -> float | None:
    return round(part / whole, digits) if whole else None
