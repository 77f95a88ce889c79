"""Deterministic answers without a model: a dry run of the whole pipeline in seconds, for tests and for profiles in the making.

Every answer is a function of the Ask's key alone. Its model is called `scripted`, so its answers can never be taken for
a real model's.
"""

from __future__ import annotations

import asyncio
import math
from hashlib import sha256

from mllmsrec_core.ask import Ask, Choose, Embed, Generate, Model, Reply, Train, key
from storage.blobs import Blobs

MODEL = Model("scripted", "1")
_WORDS = "amber brisk calm deep early faint gentle hollow idle jolly keen light mellow narrow open plain".split()
_DIMENSIONS = 16


class ScriptedEngine:
    """Answers every kind but Fetch, which needs no model and stays real."""

    name = "scripted"
    answers: frozenset[type[Ask]] = frozenset({Generate, Choose, Embed, Train})

    def __init__(self, blobs: Blobs, seconds: float = 0.0) -> None:
        self.blobs, self.seconds = blobs, seconds

    async def answer(self, ask: Ask) -> Reply:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        noise = sha256(key(ask)).digest()
        match ask:
            case Generate():
                text = "A " + " ".join(_WORDS[byte % len(_WORDS)] for byte in noise[:5]) + " thing."
                return Reply(text, tokens_in=_words(ask.messages), tokens_out=7, engine=self.name)
            case Choose():
                weights = [1 + byte for byte in noise[: len(ask.choices)]]
                logprobs = {name: math.log(w / sum(weights)) for (name, _), w in zip(ask.choices, weights, strict=True)}
                tokens = _words(ask.messages)
                return Reply({"logprobs": logprobs, "mass": 1.0}, tokens_in=tokens, tokens_out=1, engine=self.name)
            case Embed():
                vector = [byte - 127.5 for byte in noise[:_DIMENSIONS]]
                norm = math.sqrt(sum(x * x for x in vector))
                return Reply([x / norm for x in vector], tokens_in=1, engine=self.name)
            case Train():
                adapter = self.blobs.put(b"scripted adapter " + noise)
                curve = [{"step": step, "loss": round(1 / step, 4), "lr": 0.001} for step in range(1, 6)]
                return Reply({"sha256": adapter, "curves": curve}, tokens_in=len(ask.examples), engine=self.name)
        raise TypeError(f"the scripted engine does not answer {type(ask).__name__}")

    async def close(self) -> None:
        """Nothing to free."""


def _words(messages: tuple) -> int:
    return sum(len(part.split()) for message in messages for part in message.parts if isinstance(part, str))
