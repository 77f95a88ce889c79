"""From messages to a model's tensors: the one place where a chat template is rendered, for answering and for training.

Knows the processor and the blob store, and nothing of the network behind them.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from PIL import Image

from mllmsrec_core.ask import Message, Picture, pictures_in
from mllmsrec_core.errors import AskError, ContextTooLong, EngineError, Passing
from storage.blobs import Blobs
from tasks.engines.pictures import decode
from tasks.engines.refusals import lasting, out_of_memory

KEPT_TEXTS = 512  # prompts whose words are kept from being put in order to being encoded: twice the default window
TAIL_CHARS = 8  # every prompt of a template ends alike; only this much can merge with the beginning of an answer


@dataclass(frozen=True, eq=False)
class Prompt:
    """A rendered prompt, ending where the answer begins, and its pictures in reading order."""

    text: str
    pictures: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Encoded:
    """Tensors for the prompts at `places` (rows in that order); `failed` says for the other places what is wrong.

    Where pictures are encoded once, `shown` says for each row which of them it shows; None: each row has its own.
    """

    tensors: dict[str, torch.Tensor]
    places: list[int]
    failed: dict[int, AskError]
    shown: list[int] | None = None


class Chat:
    """One model's processor (or, for a text-only model, its tokenizer) and the store its pictures come from."""

    def __init__(self, front: Any, blobs: Blobs, name: str) -> None:
        self.front, self.blobs, self.name = front, blobs, name
        self.tokenizer = getattr(front, "tokenizer", front)
        self.sees = self.tokenizer is not front
        self.picture_token: int | None = getattr(front, "image_token_id", None)
        self._first: dict[tuple[str, Any], dict[str, list[int]]] = {}
        self._words = lru_cache(KEPT_TEXTS)(lambda text: tuple(self.ids(text)))
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

    def prompt(
        self,
        messages: Sequence[Message],
        max_pixels: int | None,
        answer: str | None = None,
        decoded: MutableMapping[tuple[str, int | None], Image.Image] | None = None,
    ) -> Prompt:
        """Rendered text and decoded pictures. Raises AskError for a picture that cannot be decoded.

        A picture in `decoded` is taken from there, and one that is not is put there.
        """
        shown = pictures_in(messages)
        if shown and not self.sees:
            raise EngineError(f"{self.name} reads no pictures; name a vision-language model, or leave pictures out.")
        self._no_picture_tokens(messages)
        decoded = {} if decoded is None else decoded
        return Prompt(self.render(messages, answer), tuple(self._decoded(p, max_pixels, decoded) for p in shown))

    def _decoded(self, part: Picture, max_pixels: int | None, decoded: MutableMapping[Any, Image.Image]) -> Image.Image:
        image = decoded.get((part.sha256, max_pixels))
        if image is None:
            image = decoded[part.sha256, max_pixels] = decode(self.blobs.get(part.sha256), max_pixels)
        return image

    def forget(self) -> None:
        """Keep no words of prompts, as where none was read before."""
        self._words.cache_clear()

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text: templates write their special tokens themselves."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def marks(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The rendered messages' token ids, different pictures told apart: two prompts begin alike as far as these do.

        A picture counts as one token, whatever the processor makes of it.
        """
        shown = iter([mark(picture) for picture in pictures_in(messages)])
        ids = self._words(self.render(messages))
        return tuple(next(shown, token) if token == self.picture_token else token for token in ids)

    def encode(
        self,
        prompts: Sequence[Prompt],
        room: int | None,
        side: Literal["left", "right"] = "left",
        once: bool = False,
    ) -> Encoded:
        """Padded tensors of all prompts of at most `room` tokens (None: any length), pictures counted.

        With `once` and one picture a prompt, a picture that several prompts show (the same object) may stand in the
        tensors once: see `Encoded.shown`. Padding is then on the left.

        Prompts of one call have equally many pictures. A prompt that is too long, or that the processor refuses, fails
        alone; the others are encoded as if it had not been there. Raises EngineError, or torch's own where a smaller
        batch may do, when memory runs out, which says nothing of any prompt.
        """
        if not prompts:
            return Encoded({}, [], {})
        shown = None
        try:
            tensors, shown = (once and self._once(prompts)) or (self._tensors(prompts, side), None)
            failed = _too_long(tensors["attention_mask"], room)
        except (EngineError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            tensors, failed = {}, self._refused(prompts, side)
            if not failed:
                raise EngineError(f"the processor of {self.name} refuses a batch of {len(prompts)}: {error}") from error
        if not failed:
            return Encoded(tensors, list(range(len(prompts))), {}, shown)
        kept = [place for place in range(len(prompts)) if place not in failed]
        again = self.encode([prompts[place] for place in kept], room, side, once)
        failed |= {kept[place]: error for place, error in again.failed.items()}
        return Encoded(again.tensors, [kept[place] for place in again.places], failed, again.shown)

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
        try:
            return dict(self.front(text=texts, images=pictures, **how))
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or not out_of_memory(error):
                raise
            raise EngineError(
                f"no memory for the pictures of {len(prompts)} prompts to {self.name} ({type(error).__name__}: {error}); "
                "lower `max_pixels`, `batch_size` or `window`. Everything answered before is kept; repeat the command."
            ) from error

    def _once(self, prompts: Sequence[Prompt]) -> tuple[dict[str, torch.Tensor], list[int]] | None:
        """Tensors with each picture once, and which of them each row shows; None where that would be no gain.

        The processor sees one prompt for each picture. The others are cut by the tokenizer, with as many pieces as it
        made of the picture; where its own prompts are not made so, the answer is None.
        """
        if self.picture_token is None or any(len(prompt.pictures) != 1 for prompt in prompts):
            return None
        firsts: dict[int, tuple[int, Prompt]] = {}
        shown = [firsts.setdefault(id(one.pictures[0]), (len(firsts), one))[0] for one in prompts]
        if len(firsts) == len(prompts):
            return None
        made = self._tensors([prompt for _, prompt in firsts.values()], "left")
        ids, mask = made.pop("input_ids"), made.pop("attention_mask")
        pieces = (ids == self.picture_token).sum(dim=1).tolist()
        mine = self._spelt([prompt for _, prompt in firsts.values()], pieces)
        along = {name for name, value in made.items() if value.shape == ids.shape}
        as_made = torch.equal(mine["input_ids"], ids) and torch.equal(mine["attention_mask"], mask)
        if not as_made or any(not torch.equal(made[name], (ids == self.picture_token).to(ids)) for name in along):
            return None
        spelt = self._spelt(prompts, [pieces[place] for place in shown])
        marked = (spelt["input_ids"] == self.picture_token).to(ids)
        return spelt | {name: marked if name in along else value for name, value in made.items()}, shown

    def _spelt(self, prompts: Sequence[Prompt], pieces: Sequence[int]) -> dict[str, torch.Tensor]:
        """Left-padded ids and mask, the picture of each prompt as so many pieces."""
        rows: list[list[int]] = []
        for prompt, n in zip(prompts, pieces, strict=True):
            words = self._words(prompt.text)
            rows.append([word for one in words for word in ([one] * n if one == self.picture_token else [one])])
        width, fill = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = torch.tensor([[fill] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def _refused(self, prompts: Sequence[Prompt], side: str) -> dict[int, AskError]:
        """The prompts that the processor does not take even alone."""
        failed: dict[int, AskError] = {}
        for place, prompt in enumerate(prompts):
            try:
                self._tensors([prompt], side)
            except (EngineError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                failed[place] = self._failure(error)
        return failed

    def _failure(self, error: Exception) -> AskError:
        if lasting(error):
            return AskError(f"the processor of {self.name} refuses this prompt: {error}")
        what = f"the processor of {self.name} failed on this prompt: {type(error).__name__}: {error}"
        return Passing(f"{what}. The next run asks again.")


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
