"""MLLM-MSR's way of asking, worked out again from a description of its released code, on one of our open models.

Captions: batches of 8 in the order given, pictures padded in black to the largest of the batch, everybody waits for the
longest text. Preferences: one user at a time, one step after another, one prompt at a time. Scores: batches of 6, every
prompt read whole, up to 30 tokens written to read the logits of the first. Left out, as ours or theirs alone would
change the question: float16 under autocast, flash attention, sampling, six processes on six devices. Knows nothing of
rows, stores or time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from mllmsrec_core.ask import Choose, Generate
from tasks.engines.chat import Chat, Encoded, Prompt

CAPTION_BATCH = 8  # image_summary.py of the released code
SCORE_BATCH = 6  # test_with_llava_sft.py, as the next
SCORE_TOKENS = 30


class Original:
    """A network and its chat, asked as MLLM-MSR does. Prompts, pixels, limits, dtype and threads are the caller's.

    Questions that the processor refuses are left out. `batch` and `tokens` other than the original's show what each
    of its choices costs.
    """

    def __init__(self, network: Any, chat: Chat) -> None:
        self.network, self.chat = network, chat

    def captions(self, asks: Sequence[Generate], batch: int = CAPTION_BATCH) -> list[str]:
        """One text per question, in order."""
        return [text for some in _batches(asks, batch) for text in self._texts(some)]

    def preferences(self, units: Sequence[Sequence[Generate]]) -> list[str]:
        """One text per step of each user, in order; a step's question holds the answer before it already."""
        return [text for unit in units for ask in unit for text in self._texts([ask])]

    def scores(
        self, asks: Sequence[Choose], batch: int = SCORE_BATCH, tokens: int = SCORE_TOKENS, least: int = 0
    ) -> list[dict[str, float]]:
        """The log-probability of each choice as the next word, in order.

        A batch ends early where all its answers do, but not before `least` tokens.
        """
        found = []
        for some in _batches(asks, batch):
            prompts = self._prompts(some)
            how = {"min_new_tokens": least, "output_logits": True, "return_dict_in_generate": True}
            encoded, made = self._generated(prompts, tokens, **how)
            logs = torch.log_softmax(made.logits[0].float(), dim=-1).cpu()
            for place, row in zip(encoded.places, logs, strict=True):
                ids = self.chat.first_tokens(prompts[place].text, some[place].choices)
                found.append({name: torch.logsumexp(row[of], dim=0).item() for name, of in ids.items()})
        return found

    def _texts(self, asks: Sequence[Generate]) -> list[str]:
        encoded, made = self._generated(self._prompts(asks), asks[0].decoding.max_tokens)
        written = made[:, encoded.tensors["input_ids"].shape[1] :]
        return [text.strip() for text in self.chat.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _prompts(self, asks: Sequence[Generate | Choose]) -> list[Prompt]:
        prompts = [self.chat.prompt(ask.messages, ask.model.max_pixels) for ask in asks]
        shown = [picture for prompt in prompts for picture in prompt.pictures]
        if not shown:
            return prompts
        size = max(picture.width for picture in shown), max(picture.height for picture in shown)
        return [replace(prompt, pictures=tuple(padded(p, size) for p in prompt.pictures)) for prompt in prompts]

    def _generated(self, prompts: Sequence[Prompt], tokens: int, **how: Any) -> tuple[Encoded, Any]:
        encoded = self.chat.encode(prompts, None)
        tensors = {name: self._moved(value) for name, value in encoded.tensors.items()}
        with torch.no_grad():
            return encoded, self.network.generate(**tensors, max_new_tokens=tokens, do_sample=False, **how)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.network.device, self.network.dtype if tensor.is_floating_point() else tensor.dtype)


def padded(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in the middle of a black one of `size`, width and height."""
    black = Image.new("RGB", size)
    black.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return black


def _batches(asks: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (asks[start : start + size] for start in range(0, len(asks), size))
