"""What an engine is: something that answers some kinds of Ask.

An engine batches whatever waits for it. A bad row raises AskError and fails alone; EngineError ends the run. Engines know
nothing of stages or tables; they read pictures and adapters from the blob store, and find weights by a model's slug.
"""

from __future__ import annotations

from typing import Protocol

from mllmsrec_core.ask import Ask, Reply


class Engine(Protocol):
    """Answers Asks of the kinds in `answers`; many calls of `answer` are in flight at once on one event loop."""

    name: str
    answers: frozenset[type[Ask]]

    async def answer(self, ask: Ask) -> Reply:
        """The Reply to one Ask. Raises AskError for a bad row and EngineError when the engine itself is broken."""
        ...

    async def close(self) -> None:
        """Free the model's memory. Called once."""
        ...


class Counting(Protocol):
    """An engine that says what it has computed."""

    def counters(self) -> dict[str, int]:
        """Totals over the engine's life, which never shrink: `prompt_tokens` of the prompts it read, pictures counted;
        `reused_tokens`, those of them that were not computed because their beginning had been; `images` shown.

        A count the engine does not know is left out. May be called at any time, also after `close`.
        """
        ...
