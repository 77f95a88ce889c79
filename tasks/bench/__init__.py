"""How fast a profile's stages go on its own models, engine and data, what bounds each, and against what.

Everything happens in a temporary store on local disk, which is removed: nothing is published, and the profile's store is
not even opened. All figures come from one process in one run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from mllmsrec_core.ask import Ask, Choose, Fetch
from storage.store import Store
from tasks.bench.findings import Figures, Finding, LeftOut, Ratio, ratio
from tasks.bench.meter import Cost, cores, in_turn
from tasks.bench.parts import PARTS, Anew, bare, parts, pictures
from tasks.bench.rehearsal import UNTRAINED, Bout, rehearse
from tasks.config import Config
from tasks.engines import Engine
from tasks.runner import Counts, How, run_rows
from tasks.work import Engines, Work, open_work

__all__ = ["PARTS", "Figures", "Finding", "LeftOut", "Ratio", "bench"]

REMEMBERING = ("vllm", "openai")  # engines that answer a prompt they have read before from memory


def bench(config: Config, rows: int, against_original: bool = False) -> Iterator[Finding]:
    """Measure every stage that asks, on at most `rows` of its rows; findings come as they are made."""
    with tempfile.TemporaryDirectory(prefix="mllmsrec-bench-") as folder:
        settings = config.settings.model_copy(update={"store": str(Path(folder, "store")), "storage_options": {}})
        work = open_work(Config(settings, config.params).to_json())
        try:
            for bout in rehearse(work, rows):
                yield from _findings(work, Passes(work, Path(folder), bout), bout, against_original)
        finally:
            work.engine_for.drop()
    if settings.engine in REMEMBERING:
        yield LeftOut(f"what {settings.engine} itself uses", "memory and processor time are of this process alone")
    yield LeftOut(UNTRAINED, "nothing is trained here, and scores are asked of the base model")


class Passes:
    """The ways through one stage's questions. Each writes into an empty store of its own."""

    def __init__(self, work: Work, folder: Path, bout: Bout) -> None:
        self.work, self.folder, self.bout = work, folder, bout
        self.asks = [[ask for ask, _ in unit] for unit in bout.units]
        self.cool: Callable[[], Any] = lambda: None  # called before each pass: nothing is known from the one before
        self._number = count()

    def run(self) -> Counts:
        """All rows through the runner."""
        self.cool()
        store, bout = self.fresh(), self.bout
        how = How(self.work.config.settings.window)
        return run_rows(bout.stage, bout.inputs, bout.rows, store, self._engines(store), how)[1]

    def bare(self, units: Sequence[Sequence[Ask]] | None = None) -> None:
        """The same questions, or others, in a bare loop over the same engine."""
        self.cool()
        bare(self.asks if units is None else units, self._engines(self.fresh()), self.work.config.settings.window)

    def fresh(self) -> Store:
        """An empty store beside that of the rehearsal."""
        settings, name = self.work.config.settings, f"{self.bout.stage.name}-{next(self._number)}"
        return Store(str(self.folder / name), settings.flush_rows, settings.flush_seconds)

    def _engines(self, store: Store) -> Callable[[Ask], Engine]:
        """Models stay open from pass to pass; pictures are fetched into this pass's store."""
        opened, word = self.work.engine_for, f"pass {next(self._number)}"
        fetching = Engines(store, opened.settings, opened.locations, opened.image_roots)
        anew = opened.settings.engine in REMEMBERING

        def engine_for(ask: Ask) -> Engine:
            engine = (fetching if isinstance(ask, Fetch) else opened)(ask)
            return Anew(engine, word) if anew else engine

        return engine_for


def _findings(work: Work, passes: Passes, bout: Bout, against_original: bool) -> Iterator[Finding]:
    """One stage's figures, then its ratios."""
    from tasks.bench import local

    asked, name = bout.asked(), bout.stage.name
    model = local.opened(work, bout)
    if model:
        passes.cool = model.cool
    original = model.original() if model and against_original else None
    sides: dict[str, Callable[[], Any]] = {"runner": passes.run, "bare": passes.bare}
    costs = in_turn(sides | ({"original": original} if original else {}))
    (ours, counts), (plain, _) = costs["runner"], costs["bare"]
    alone = parts(bout, work.store.blobs, passes.fresh(), plain.seconds, passes.bare, model.look if model else None)
    yield _figures(bout, ours, counts, alone)
    yield ratio("runner : bare loop over the same engine", name, "questions", len(asked), ours, plain)
    if not model:
        yield from local.without(work, name, asked[0][0], against_original)
        return
    if original:
        yield from model.against_original(ours, costs["original"][0])
    if isinstance(asked[0][0], Choose):
        yield model.reuse(passes.bare)


def _figures(bout: Bout, cost: Cost, counts: Counts, alone: dict[str, float]) -> Figures:
    shown = sum(len(pictures(ask)) + isinstance(ask, Fetch) for ask, _ in bout.asked())
    done = (len(bout.rows), shown, counts.tokens_in, counts.tokens_out)
    return Figures(
        bout.stage.name,
        len(bout.rows),
        counts.asked,
        counts.failed,
        cost.seconds,
        *(n / cost.seconds for n in done),
        memory_mb=cost.memory_mb,
        device_mb=cost.device_mb,
        cores=cost.cpu / cost.seconds,
        of_cores=cores(),
        bound_by=max(PARTS, key=lambda part: alone[part]),
        parts=alone,
    )
