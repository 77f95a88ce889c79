"""From messages to a model's tensors: the one place where a chat template is rendered, for answering and for training.

Knows the processor and the blob store, and nothing of the network behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from mllmsrec_core.ask import Message, Picture
from mllmsrec_core.errors import AskError, ContextTooLong, EngineError
from storage.blobs import Blobs
from tasks.engines.pictures import decode

TAIL_CHARS = 8  # every prompt of a template ends alike; only this much can merge with the beginning of an answer


@dataclass(frozen=True, eq=False)
class Prompt:
    """A rendered prompt, ending where the answer begins, and its pictures in reading order."""

    text: str
    pictures: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Encoded:
    """Tensors for the prompts at `places` (rows in that order); `failed` says for the other places what is wrong."""

    tensors: dict[str, torch.Tensor]
    places: list[int]
    failed: dict[int, AskError]


class Chat:
    """One model's processor (or, for a text-only model, its tokenizer) and the store its pictures come from."""

    def __init__(self, front: Any, blobs: Blobs, name: str) -> None:
        self.front, self.blobs, self.name = front, blobs, name
        self.tokenizer = getattr(front, "tokenizer", front)
        self.sees = self.tokenizer is not front
        self.picture_token: int | None = getattr(front, "image_token_id", None)
        self._first: dict[tuple[str, Any], dict[str, list[int]]] = {}
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not (getattr(front, "chat_template", None) or self.tokenizer.chat_template):
            raise EngineError(
                f"{name} has no chat template; use an instruction-tuned model, or add chat_template.jinja."
            )

    def render(self, messages: Sequence[Message], answer: str | None = None) -> str:
        """The model's own template over `messages`, ending where the answer begins; with `answer`, ending after it."""
        turns = [{"role": message.role, "content": self._content(message)} for message in messages]
        if answer is not None:
            turns.append({"role": "assistant", "content": self._content(Message("assistant", (answer,)))})
        return self.front.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)

    def prompt(self, messages: Sequence[Message], max_pixels: int | None, answer: str | None = None) -> Prompt:
        """Rendered text and decoded pictures. Raises AskError for a picture that cannot be decoded."""
        shown = [part for message in messages for part in message.parts if isinstance(part, Picture)]
        if shown and not self.sees:
            raise EngineError(f"{self.name} reads no pictures; name a vision-language model, or leave pictures out.")
        self._no_picture_tokens(messages)
        pictures = tuple(decode(self.blobs.get(part.sha256), max_pixels) for part in shown)
        return Prompt(self.render(messages, answer), pictures)

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text: templates write their special tokens themselves."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def marks(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The rendered messages' token ids, different pictures told apart: two prompts begin alike as far as these do.

        A picture counts as one token, whatever the processor makes of it.
        """
        shown = iter([mark(part) for message in messages for part in message.parts if isinstance(part, Picture)])
        ids = self.ids(self.render(messages))
        return tuple(next(shown, token) if token == self.picture_token else token for token in ids)

    def encode(self, prompts: Sequence[Prompt], room: int | None, side: Literal["left", "right"] = "left") -> Encoded:
        """Padded tensors of all prompts of at most `room` tokens (None: any length), pictures counted.

        Prompts of one call have equally many pictures. A prompt that is too long, or that the processor refuses, fails
        alone; the others are encoded as if it had not been there.
        """
        if not prompts:
            return Encoded({}, [], {})
        try:
            tensors = self._tensors(prompts, side)
            failed = _too_long(tensors["attention_mask"], room)
        except Exception as error:
            tensors, failed = {}, self._refused(prompts, side)
            if not failed:
                raise EngineError(f"the processor of {self.name} refuses a batch of {len(prompts)}: {error}") from error
        if not failed:
            return Encoded(tensors, list(range(len(prompts))), {})
        kept = [place for place in range(len(prompts)) if place not in failed]
        again = self.encode([prompts[place] for place in kept], room, side)
        failed |= {kept[place]: error for place, error in again.failed.items()}
        return Encoded(again.tensors, [kept[place] for place in again.places], failed)

    def first_tokens(self, rendered: str, choices: Sequence[tuple[str, Sequence[str]]]) -> dict[str, list[int]]:
        """For each choice the distinct first token ids of its surface forms, as they are cut right after `rendered`.

        A form that merges with the prompt, or begins with a token of blanks only, is left out: its first token says
        nothing of the choice. Raises EngineError when two choices share a token, or a choice has none.
        """
        known = (rendered[-TAIL_CHARS:], tuple((name, tuple(forms)) for name, forms in choices))
        if known not in self._first:
            self._first[known] = self._find_first(rendered, choices)
        return self._first[known]

    def _find_first(self, rendered: str, choices: Sequence[tuple[str, Sequence[str]]]) -> dict[str, list[int]]:
        head = self.ids(rendered)
        found: dict[str, list[int]] = {}
        owner: dict[int, str] = {}
        for name, forms in choices:
            cut = [self.ids(rendered + form) for form in forms]
            after = [ids[len(head)] for ids in cut if len(ids) > len(head) and ids[: len(head)] == head]
            found[name] = sorted({token for token in after if self.tokenizer.decode([token]).strip()})
            if not found[name]:
                raise EngineError(
                    f"choice {name!r}: no form of {list(forms)} begins with a token of its own in {self.name}."
                )
            for token in found[name]:
                if owner.setdefault(token, name) != name:
                    raise EngineError(
                        f"choices {owner[token]!r} and {name!r} both begin with token {token} "
                        f"({self.tokenizer.decode([token])!r}) in {self.name}; give them forms that differ at once."
                    )
        return found

    def _no_picture_tokens(self, messages: Sequence[Message]) -> None:
        """Raises AskError for text that writes the model's picture token: pictures would go to the wrong places."""
        tokens = [str(getattr(self.front, name)) for name in ("image_token", "boi_token") if hasattr(self.front, name)]
        for part in (part for message in messages for part in message.parts if isinstance(part, str)):
            for token in tokens:
                if token in part:
                    raise AskError(
                        f"the prompt's text holds {token!r}, which stands for a picture; clean the text first"
                    )

    def _content(self, message: Message) -> Any:
        """Parts in order as templates of models with eyes want them; plain text for the others."""
        if not self.sees:
            return "".join(part for part in message.parts if isinstance(part, str))
        return [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in message.parts]

    def _tensors(self, prompts: Sequence[Prompt], side: str) -> dict[str, torch.Tensor]:
        texts = [prompt.text for prompt in prompts]
        how: dict[str, Any] = {
            "padding": True,
            "padding_side": side,
            "return_tensors": "pt",
            "add_special_tokens": False,
        }
        if not self.sees:
            return dict(self.tokenizer(texts, **how))
        shown = any(prompt.pictures for prompt in prompts)
        pictures = [list(prompt.pictures) for prompt in prompts] if shown else None
        return dict(self.front(text=texts, images=pictures, **how))

    def _refused(self, prompts: Sequence[Prompt], side: str) -> dict[int, AskError]:
        """The prompts that the processor does not take even alone."""
        failed: dict[int, AskError] = {}
        for place, prompt in enumerate(prompts):
            try:
                self._tensors([prompt], side)
            except Exception as error:
                failed[place] = AskError(f"the processor of {self.name} refuses this prompt: {error}")
        return failed


def mark(picture: Picture) -> int:
    """A number that is no token's and differs between pictures."""
    return -1 - int(picture.sha256[:15], 16)  # 60 bits


def _too_long(mask: torch.Tensor, room: int | None) -> dict[int, AskError]:
    lengths = mask.sum(dim=1).tolist()
    return {
        place: ContextTooLong(f"the prompt has {length} tokens, and the model has room for {room}")
        for place, length in enumerate(lengths)
        if room is not None and length > room
    }
