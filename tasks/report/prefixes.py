"""How much of each stage's prompts repeats how the prompt before began, and how much of them an engine did not read again.

The first is measured on the first questions of a stage, in the order of its rows; the second is what the engine counted
in the run that published the stage. Knows nothing of HTML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllmsrec_core.ask import Message, Picture
from mllmsrec_core.errors import StoreError
from mllmsrec_core.prefixes import shared
from mllmsrec_core.stages import STAGES
from tasks.carry import KEY, names
from tasks.report.shown import Shown
from tasks.spent import LOOKED_AT  # each question may lie in another file of the store


@dataclass(frozen=True)
class Prefixes:
    """One asking stage: how many prompts were looked at, their tokens by rule of thumb, the share that repeats, and the
    share of all prompt tokens that the engine had read before; None where nothing was asked or the engine does not say."""

    stage: str
    n: int
    tokens: int
    ratio: float
    hit_rate: float | None


def prefixes(shown: Shown) -> list[Prefixes]:
    """Of each stage that asks a language model, in order; one whose questions are not in the store is left out."""
    found = []
    for stage in STAGES:
        record = shown.stages.get(stage.name, {})
        pointer = record.get("carried", {}).get("units")
        if stage.ask is None or not pointer:
            continue
        try:
            units = shown.store.tables.read(names(stage)[0], pointer["write_id"])
        except StoreError:
            continue  # collected: the next run publishes them again
        keys = _first_keys(b"".join(units["asks"].head(LOOKED_AT).drop_nulls()))
        asked = shown.store.replies.questions(keys)
        prompts = [_messages(asked[key]) for key in keys if asked.get(key, {}).get("messages")]
        if prompts:
            said = shared(prompts)
            hit_rate = record.get("engine", {}).get("hit_rate")  # older versions kept no such figures
            found.append(Prefixes(stage.name, len(prompts), said.total, said.ratio, hit_rate))
    return found


def _first_keys(joined: bytes) -> list[bytes]:
    keys = [joined[start : start + KEY] for start in range(0, len(joined), KEY)]
    return list(dict.fromkeys(keys))[:LOOKED_AT]


def _messages(ask: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages of a rendered Ask."""
    return tuple(
        Message(one["role"], tuple(part if isinstance(part, str) else Picture(**part) for part in one["parts"]))
        for one in ask["messages"]
    )
