"""What a run would ask, found by walking every chain with the answers already known and placeholders for the rest.

Placeholders flow into the next stage's inputs, so one pass prices the whole pipeline without a model. A stage whose
inputs are published is exact as long as its chains have one open question each; a chain's later questions depend on
answers that do not exist, and a stage behind a due stage may find its inputs unchanged after all: both give intervals.
Where answers still to come decide how many questions there are (claims of captions), the upper end is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from mllmsrec_core.ask import Ask, Choose, Embed, Fetch, Generate, Reply, Train, digest, key
from mllmsrec_core.stage import Inputs, Row, Stage

PENDING = "(not asked yet)"
CHARS_PER_TOKEN = 4  # English under common byte-pair vocabularies
TOKENS_PER_PICTURE = 300  # between 73 and 554 for Qwen2.5-VL; measured rates replace it where a run has been made


@dataclass
class Due:
    """Questions of one stage: known already, open for sure, open at most; and what the open ones hold."""

    rows: int = 0
    known: int = 0
    low: int = 0
    high: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


def placeholder(ask: Ask, dimensions: int = 1) -> Reply:
    """A stand-in answer of the right shape, which no later Ask can share a key with."""
    match ask:
        case Fetch():
            return Reply({"sha256": digest("pending", ask.uri, ask.version), "width": 1, "height": 1})
        case Generate():
            return Reply(f"{PENDING} {key(ask).hex()[:12]}")
        case Choose():
            return Reply({"logprobs": {name: -math.log(len(ask.choices)) for name, _ in ask.choices}, "mass": 1.0})
        case Embed():
            return Reply([1.0 / math.sqrt(dimensions)] * dimensions)
        case Train():
            return Reply({"sha256": digest("pending", ask.digest, ask.recipe), "curves": []})


def price(ask: Ask) -> tuple[int, int]:
    """Tokens in, and at most out, by rule of thumb."""
    if not isinstance(ask, Generate | Choose):
        return 0, 0
    parts = [part for message in ask.messages for part in message.parts]
    tokens = sum(len(part) // CHARS_PER_TOKEN if isinstance(part, str) else TOKENS_PER_PICTURE for part in parts)
    return tokens, ask.decoding.max_tokens if isinstance(ask, Generate) else 1


def walk(
    stage: Stage, inputs: Inputs, rows: pl.DataFrame, known: Callable[[Ask, bytes], Reply | None], certain: bool
) -> tuple[list[Row], Due]:
    """Finished rows with placeholders in them, and what is due. `certain`: everything the stage reads is published."""
    due, finished, open_keys, dimensions = Due(rows=len(rows)), [], set(), 1
    for row in rows.iter_rows(named=True):
        assert stage.ask is not None
        chain, reply, first = stage.ask(inputs, row), None, True
        while True:
            try:
                ask = next(chain) if reply is None else chain.send(reply)
            except StopIteration as end:
                finished.extend(end.value)
                break
            reply = known(ask, name := key(ask))
            if reply is not None:
                due.known += 1
                dimensions = len(reply.value) if isinstance(ask, Embed) and reply.value else dimensions
                continue
            reply = placeholder(ask, dimensions)
            if name not in open_keys:
                open_keys.add(name)
                due.high += 1
                due.low += certain and first
                tokens_in, tokens_out = price(ask)
                due.tokens_in += tokens_in
                due.tokens_out += tokens_out
            first = False
    return finished, due


def cause(now: dict, before: dict | None, retry: bool = False, coverage: float = 1.0) -> str:
    """Why a stage is due, in words: the parts of its fingerprint that differ from what the environment shows."""
    if before is None:
        return "never run"
    reasons = ["retry"] if retry else []
    reasons += [
        _named(stage, name) for stage, params in now["params"].items() for name in _changed(params, before, stage)
    ]
    reasons += ["model"] if now["model"] != before["model"] else []
    moved = [table for table in now["inputs"] if now["inputs"][table] != before["inputs"].get(table)]
    reasons += [f"upstream {', '.join(moved)}"] if moved else []
    words = {"source": "data", "sample": "sample", "corrections": "correction", "forgotten": "forgotten users"}
    reasons += [word for name, word in words.items() if now.get(name) != before.get(name)]
    reasons += ["code"] if now["code"] != before["code"] else []
    reasons += [f"{1 - coverage:.0%} not reached last time"] if coverage < 1 else []
    return "; ".join(reasons) or "rows that failed for now are tried again, or its tables are gone"


def _named(stage: str, name: str) -> str:
    return f"{'prompt' if 'prompt' in name or name == 'questions' else 'param'} {stage}.{name}"


def _changed(params: dict, before: dict, stage: str) -> list[str]:
    old = before["params"].get(stage, {})
    return [name for name, value in params.items() if old.get(name) != value]
