"""How the embedded vision-language model is trained: its tower on attributes, its decoder on text, then both on all.

The optimiser is Muon on hidden matrices and AdamW on the rest; with AdamW alone the decoder learnt nothing in the same
time. Every phase is seeded and runs a fixed number of steps. Knows the lessons only as prompt, answer and picture.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from itertools import cycle

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mllmsrec_core.datasets import demo
from tasks.embedded.architecture import flat
from tasks.embedded.lessons import Lesson, Teacher

SHIFT = 6  # pixels by which a training picture may be moved, either way
LESSONS, CHARACTERS = 64, 12_000  # most lessons of a batch, and the length of prompts and answers at which it is full
ROUND = 16  # batches are padded to a multiple of this many tokens: bfloat16 kernels like it


def pixels(products: Sequence[demo.Item]) -> Tensor:
    """Their pictures as uint8 (n, 3, SIZE, SIZE)."""
    drawn = np.stack([np.asarray(demo.draw(product.uri)) for product in products])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def moved(images: Tensor) -> Tensor:
    """A batch as the model sees it, in [-1, 1], each picture moved by a few pixels."""
    padded = functional.pad(images.float() / 127.5 - 1, (SHIFT,) * 4, mode="replicate")
    places = torch.randint(2 * SHIFT + 1, (len(images), 2)).tolist()
    return torch.stack(
        [image[:, y : y + demo.SIZE, x : x + demo.SIZE] for image, (y, x) in zip(padded, places, strict=True)]
    )


class Optimiser:
    """Muon for matrices inside the network, AdamW for embeddings, norms and all else; one schedule for both."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], steps: int, muon: float, adam: float) -> None:
        named = list(parameters)
        inner = [value for name, value in named if value.ndim == 2 and "embed" not in name and "head" not in name]
        ids = {id(value) for value in inner}
        rest = [value for _, value in named if id(value) not in ids]
        self.steps, self.done = steps, 0
        self.parts = [
            (torch.optim.Muon(inner, lr=muon, momentum=0.95, weight_decay=0.01), muon),
            (torch.optim.AdamW(rest, lr=adam, betas=(0.9, 0.98), weight_decay=0.01), adam),
        ]
        self.parameters = inner + rest

    def step(self, loss: Tensor) -> None:
        """One update: 40 steps of warming up, then a cosine down to 2 %."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        warm = min(1.0, (self.done + 1) / 40)
        factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.done / self.steps)))
        for part, rate in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)
        self.done += 1


class Progress:
    """Prints running means now and then; nothing depends on it."""

    def __init__(self, name: str, every: int = 100) -> None:
        self.name, self.every, self.start, self.count = name, every, time.monotonic(), 0
        self.means: dict[str, float] = {}

    def see(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.means[key] = 0.95 * self.means.get(key, value) + 0.05 * value
        self.count += 1
        if self.count % self.every == 0:
            told = " ".join(f"{key} {value:.3f}" for key, value in self.means.items())
            print(f"{self.name} {self.count} {time.monotonic() - self.start:.0f} s {told}", flush=True)


def labels(products: Sequence[demo.Item]) -> dict[str, Tensor]:
    return {
        name: torch.tensor([values.index(product.look[name]) for product in products])
        for name, values in demo.ATTRIBUTES.items()
    }


def tower(
    vision: nn.Module, width: int, products: Sequence[demo.Item], images: Tensor, *, steps: int, size: int
) -> None:
    """Train `vision` to tell attributes; the heads are thrown away.

    It makes of a picture one vector of `width`, or several, of which then each must tell every attribute.
    """
    wanted = labels(products)
    heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in demo.ATTRIBUTES.items()})
    named = [*vision.named_parameters(), *((f"head.{name}", value) for name, value in heads.named_parameters())]
    optimiser, progress = Optimiser(named, steps, muon=0.01, adam=1e-3), Progress("tower", 50)
    for _ in range(steps):
        rows = torch.randint(len(products), (size,))
        with torch.autocast("cpu", torch.bfloat16):
            seen = vision(moved(images[rows])).float()
        losses, right = [], {}
        for name, head in heads.items():
            logits = head(seen).movedim(-1, 1)
            classes = wanted[name][rows].view(-1, *(1,) * (logits.ndim - 2)).expand(len(rows), *logits.shape[2:])
            losses.append(functional.cross_entropy(logits, classes))
            right[name] = (logits.argmax(1) == classes).float().mean().item()
        optimiser.step(torch.stack(losses).sum())
        progress.see(right)


def collate(lessons: Sequence[Lesson], words: PreTrainedTokenizerFast, images: Tensor | None) -> dict[str, Tensor]:
    """A right-padded batch in which only answers count."""
    prompts = words([flat(lesson.messages) for lesson in lessons], add_special_tokens=False)["input_ids"]
    answers = words([f"{lesson.answer}<|end|>" for lesson in lessons], add_special_tokens=False)["input_ids"]
    ids = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    targets = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    batch = {
        "input_ids": pad_sequence(ids, True, words.pad_token_id),
        "labels": pad_sequence(targets, True, -100),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0),
    }
    extra = -batch["input_ids"].shape[1] % ROUND
    fill = {"input_ids": words.pad_token_id, "labels": -100, "attention_mask": 0}
    batch = {name: functional.pad(value, (0, extra), value=fill[name]) for name, value in batch.items()}
    rows = [lesson.picture for lesson in lessons if lesson.picture is not None]
    if rows and images is not None:
        batch["pixel_values"] = moved(images[rows])
    return batch


def draw(teacher: Teacher, kind: str) -> list[Lesson]:
    """A batch of like cost: up to LESSONS short lessons, or fewer long ones."""
    lessons, cost = [], 0
    while len(lessons) < LESSONS and cost < CHARACTERS:
        lessons.append(teacher.draw(kind))
        cost += len(flat(lessons[-1].messages)) + len(lessons[-1].answer)
    return lessons


def study(
    model: LlavaForConditionalGeneration,
    words: PreTrainedTokenizerFast,
    teacher: Teacher,
    *,
    images: Tensor | None,
    kinds: Sequence[str],
    steps: int,
    muon: float,
    adam: float,
) -> None:
    """Train `model` on one kind of lesson after the other, a batch of each, `steps` batches in all."""
    model.train()
    model.set_attn_implementation("eager")  # faster than sdpa at these lengths
    named = dict(model.named_parameters())
    if images is None:
        named = {name: value for name, value in named.items() if "language_model" in name}
    optimiser, progress = Optimiser(named.items(), steps, muon, adam), Progress("study", 100)
    for _, kind in zip(range(steps), cycle(kinds), strict=False):
        batch = collate(draw(teacher, kind), words, images)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        optimiser.step(loss)
        progress.see({kind: loss.item()})
