"""A question as vLLM reads it: token ids, pictures named by content, and how many tokens it takes.

Prompts and first answer tokens are made by the code that the transformers engine uses. Needs no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from mllmsrec_core.ask import Choose, Generate, Model, pictures_in
from mllmsrec_core.errors import EmptyReply
from storage.blobs import Blobs
from tasks.engines.chat import Prompt
from tasks.engines.fronts import open_front

Question = Generate | Choose


@dataclass(frozen=True, eq=False)
class Prepared:
    """A question ready for vLLM. `ids` count each picture as one token; `forms` are the first tokens of each choice."""

    prompt: Prompt
    ids: list[int]
    forms: dict[str, list[int]]
    shown: tuple[str, ...]  # sha256 of its pictures
    written: int  # most tokens of an answer
    max_pixels: int | None

    @property
    def least(self) -> int:
        """At least so many tokens has the prompt with its answer; exact where it shows no picture."""
        return len(self.ids) + self.written

    def for_vllm(self) -> dict[str, Any]:
        """Pictures are named by content and size, so that equal ones are processed and encoded once."""
        if not self.shown:
            return {"prompt_token_ids": self.ids}
        return {
            "prompt_token_ids": self.ids,
            "multi_modal_data": {"image": list(self.prompt.pictures)},
            "multi_modal_uuids": {"image": [f"{sha256}-{self.max_pixels}" for sha256 in self.shown]},
        }


class Prompts:
    """One model's chat and how many positions it has (None: it does not say), for several threads at once.

    Raises EngineError when the checkpoint's files cannot be found or read.
    """

    def __init__(self, model: Model, locations: Mapping[str, str], blobs: Blobs) -> None:
        self.chat, self.positions = open_front(model, locations, blobs)
        self._tokenizing = Lock()  # a fast tokenizer cannot be borrowed by two threads at once

    def prepare(self, ask: Question) -> Prepared:
        """Render, decode and tokenise. Raises AskError for a picture that cannot be decoded."""
        shown = tuple(picture.sha256 for picture in pictures_in(ask.messages))
        prompt = self.chat.prompt(ask.messages, ask.model.max_pixels)
        with self._tokenizing:
            ids = self.chat.ids(prompt.text)
            forms = self.chat.first_tokens(prompt.text, ask.choices) if isinstance(ask, Choose) else {}
        written = ask.decoding.max_tokens if isinstance(ask, Generate) else 1
        return Prepared(prompt, ids, forms, shown, written, ask.model.max_pixels)

    def tokens(self, prepared: Prepared) -> int:
        """Tokens of prompt and answer together; pictures are processed only to be counted.

        Raises AskError for a prompt that the processor refuses.
        """
        if not prepared.shown:
            return prepared.least
        with self._tokenizing:
            encoded = self.chat.encode([prepared.prompt], None)
        for error in encoded.failed.values():
            raise error
        return int(encoded.tensors["attention_mask"].sum()) + prepared.written

    def text(self, tokens: list[int]) -> str:
        """What these tokens say. Raises EmptyReply where they say nothing."""
        with self._tokenizing:
            text = self.chat.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if not text:
            raise EmptyReply(f"{self.chat.name} wrote nothing ({len(tokens)} tokens, none of them text)")
        return text
