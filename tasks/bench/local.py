"""What can be compared only on a model that transformers holds in this process: MLLM-MSR's way, and reuse of beginnings.

Both sides use the same network object, dtype, device and threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mllmsrec_core.ask import Ask, Choose, Generate, Model
from tasks.bench.findings import Finding, LeftOut, ratio
from tasks.bench.meter import Cost, in_turn
from tasks.bench.original import CAPTION_BATCH, SCORE_BATCH, SCORE_TOKENS, Original
from tasks.bench.parts import AskAll
from tasks.bench.rehearsal import Bout
from tasks.engines.scripted import MODEL as SCRIPTED
from tasks.engines.transformers import TransformersEngine
from tasks.work import Work

UNITS = {"caption": "captions", "preference": "preference steps", "score": "scored pairs"}
ORIGINAL = "ours : MLLM-MSR's way"
WRITING_ON = f"{ORIGINAL} where no answer ends by itself"
REUSE = "beginnings of prompts read once : each prompt read whole"


class Local:
    """The network that answers a stage's questions."""

    def __init__(self, engine: TransformersEngine, model: Model, bout: Bout, batch_size: int) -> None:
        self.engine, self.stage, self.batch_size = engine, bout.stage.name, batch_size
        self.units: list[list[Any]] = [[ask for ask, reply in unit if not reply.error] for unit in bout.units]
        self.asks: list[Any] = [ask for ask, reply in bout.asked() if not reply.error]
        loaded = engine._open(model)
        self.reader, self.front, self.cool = loaded.reader, loaded.chat.front, loaded.chat.forget
        self.way = Original(loaded.network, loaded.chat)

    def look(self, pictures: Sequence[Any]) -> Any:
        """From pictures to what the network reads of them."""
        return self.front.image_processor(images=list(pictures), return_tensors="pt")

    def original(self) -> Callable[[], Any] | None:
        """The stage's questions in MLLM-MSR's way; None where it has no such stage."""
        ways = {
            "caption": lambda: self.way.captions(self.asks),
            "preference": lambda: self.way.preferences(self.units),
            "score": lambda: self.way.scores(self.asks),
        }
        return ways.get(self.stage)

    def against_original(self, ours: Cost, theirs: Cost) -> Iterator[Finding]:
        """The ratio, and how much of it each difference makes; of scores also where no answer ends by itself."""
        unit, n = UNITS[self.stage], len(self.asks)
        yield ratio(ORIGINAL, self.stage, unit, n, ours, theirs, self._because(ours, theirs))
        if self.stage == "score":
            full = in_turn({"": lambda: self.way.scores(self.asks, least=SCORE_TOKENS)}, rounds=1)[""][0]
            why = f"as of a model that goes on after yes or no: all {SCORE_TOKENS} tokens are written, one is read"
            yield ratio(WRITING_ON, self.stage, unit, n, ours, full, why)

    def _because(self, ours: Cost, theirs: Cost) -> str:
        size = self.batch_size
        if self.stage == "preference":
            return f"many users at a time in batches of up to {size} instead of one prompt; finished rows leave their batch"
        if self.stage == "caption":
            rungs = {f"batches of {size} instead of {CAPTION_BATCH}": lambda: self.way.captions(self.asks, size)}
            rest = "what all prompts begin with read once, finished rows leave their batch"
        else:
            rungs = {
                f"1 token written instead of up to {SCORE_TOKENS}": lambda: self.way.scores(self.asks, tokens=1),
                f"batches of {size} instead of {SCORE_BATCH}": lambda: self.way.scores(self.asks, size, 1),
            }
            rest = "beginnings and pictures read once"
        steps, before = [], theirs
        for name, cost in [*((name, cost) for name, (cost, _) in in_turn(rungs).items()), (rest, ours)]:
            steps.append(f"{name} {before.seconds / cost.seconds:.2f} ({before.cpu / cost.cpu:.2f})")
            before = cost
        return "; ".join(steps)

    def reuse(self, ask_all: AskAll) -> Finding:
        """What it brings to read once what prompts begin alike with."""
        computed: dict[bool, int] = {}

        def read(share: bool) -> None:
            self.engine.share = self.reader.share = share
            before = self.engine.tokens_computed
            ask_all([[ask] for ask in self.asks])
            computed[share] = self.engine.tokens_computed - before

        try:
            costs = in_turn({"on": lambda: read(True), "off": lambda: read(False)})
        finally:
            self.engine.share = self.reader.share = True
        because = f"{computed[True]:,} tokens computed instead of {computed[False]:,}"
        return ratio(REUSE, self.stage, UNITS["score"], len(self.asks), costs["on"][0], costs["off"][0], because)


def opened(work: Work, bout: Bout) -> Local | None:
    """The local network behind a stage's questions; None where another engine, or none, answers them."""
    ask = bout.asked()[0][0]
    if not isinstance(ask, Generate | Choose) or ask.model.name == SCRIPTED.name:
        return None
    engine = work.engine_for(ask)
    local = isinstance(engine, TransformersEngine)
    return Local(engine, ask.model, bout, work.config.settings.batch_size) if local else None


def without(work: Work, stage: str, ask: Ask, against_original: bool) -> Iterator[Finding]:
    """What is said instead of the ratios."""
    name = SCRIPTED.name if getattr(ask, "model", SCRIPTED).name == SCRIPTED.name else work.config.settings.engine
    why = f"it needs a model that transformers holds in this process, and {name} answers here"
    if stage == "score":
        yield LeftOut(f"{stage}: {REUSE}", why)
    if stage in UNITS and against_original:
        yield LeftOut(f"{stage}: {ORIGINAL}", why)
