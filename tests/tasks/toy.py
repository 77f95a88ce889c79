"""A stage of chains and an engine to ask, small enough to be killed over and over; also run in processes of its own."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dataframely as dy
import polars as pl

from mllmsrec_core.ask import Ask, Decoding, Embed, Generate, Message, Reply, key
from mllmsrec_core.errors import ContextTooLong, Passing
from mllmsrec_core.stage import AskParams, Chain, Inputs, Row, Stage
from storage.store import Store
from tasks.engines.scripted import MODEL, ScriptedEngine
from tasks.run_stage import run_stage
from tasks.runner import How

INTERRUPTED = 9  # the exit code of a process that Ctrl-C or SIGTERM ended


class Toys(dy.Schema):
    name = dy.String(primary_key=True)
    text = dy.String(nullable=True)
    x = dy.Float64(nullable=True)
    ask = dy.Binary(nullable=True)
    error = dy.String(nullable=True)
    stale_since = dy.Datetime(time_unit="us", time_zone="UTC", nullable=True)


def say(*words: object) -> Generate:
    return Generate(MODEL, (Message("user", (" ".join(map(str, words)),)),), Decoding(9))


def frame(rows: list[tuple[str, int]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"name": pl.String, "n": pl.Int64}, orient="row")


def ask(inputs: Inputs, row: Row) -> Chain:
    """`n` questions, each of which holds the answer before; then a vector of the last answer."""
    said, question, error = row["name"], None, None
    for _ in range(row["n"]):
        question = say(said)
        reply = yield question
        said, error = reply.value or said, error or reply.error
    vector = yield Embed(MODEL, said)
    x = sum(vector.value) if vector.value else None
    return [
        {"name": row["name"], "text": said, "x": x, "ask": question and key(question), "error": error or vector.error}
    ]


def stage(ask: Callable[[Inputs, Row], Chain] = ask, longest_first: str | None = None) -> Stage:
    return Stage(
        name="toy",
        params=AskParams,
        reads=(),
        writes={"toys": Toys},
        rows=lambda inputs: inputs["rows"],
        ask=ask,
        tables=lambda inputs, done: {"toys": done},
        longest_first=longest_first,
    )


def inputs(rows: pl.DataFrame, max_error_rate: float = 1.0) -> Inputs:
    return Inputs({"rows": rows}, {"toy": AskParams(max_error_rate=max_error_rate)})


class Watched(ScriptedEngine):
    """Scripted answers that take some turns of the loop. Words in the question choose what goes wrong."""

    def __init__(self, store: Store, turns: int = 3) -> None:
        super().__init__(store.blobs)
        self.turns = turns
        self.started: list[Ask] = []
        self.answered: list[Ask] = []
        self.in_flight = self.peak = 0

    async def answer(self, ask: Ask) -> Reply:
        self.started.append(ask)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            for _ in range(1 + key(ask)[0] % self.turns):
                await asyncio.sleep(0)
            words = ask.messages[0].parts[0] if isinstance(ask, Generate) else ""
            if "too long" in words:
                raise ContextTooLong("2,000 tokens do not fit")
            if "busy" in words:
                raise Passing("429")
            reply = Reply(" \n", tokens_out=2) if "silent" in words else await super().answer(ask)
            self.answered.append(ask)
            return reply
        finally:
            self.in_flight -= 1


class Logged(ScriptedEngine):
    """Scripted answers, each after a short while and written down by its key just before it is handed over."""

    def __init__(self, store: Store, log: Path, seconds: float) -> None:
        super().__init__(store.blobs)
        self.log, self.seconds = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY), seconds

    async def answer(self, ask: Ask) -> Reply:
        await asyncio.sleep(self.seconds * (1 + key(ask)[0] / 255))
        reply = await super().answer(ask)
        os.write(self.log, key(ask).hex().encode() + b"\n")
        return reply


def work(url: str, log: str, seconds: float, flush_rows: int, n: int) -> None:
    """One process: runs `n` chains to the end and then writes the table's digest beside the log."""
    store = Store(url, flush_rows)
    engine = Logged(store, Path(log), seconds)
    rows = frame([(f"user {i}", i % 5) for i in range(n)])
    try:
        record = run_stage(store, stage(longest_first="n"), inputs(rows), {"n": n}, lambda _: engine, How(window=16))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    Path(log + ".digest").write_text(record["tables"]["toys"]["digest"])


def work_on_what_is_known(url: str, log: str, n: int) -> None:
    """One process whose rows need no engine: `n` rows of some milliseconds each."""

    def nothing(inputs: Inputs, row: Row) -> Chain:
        Path(log).touch()
        time.sleep(0.002)
        yield from ()
        return [{"name": row["name"], "text": "", "x": 0.0, "ask": None, "error": None}]

    rows = inputs(frame([(f"user {i}", i) for i in range(n)]))
    try:
        run_stage(Store(url), stage(nothing), rows, {}, lambda _: ScriptedEngine(None), How())  # type: ignore[arg-type]
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
