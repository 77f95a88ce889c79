"""A network read from left to right, with what it has read kept: beginnings once, finished rows no longer.

Prompts that begin alike are read level by level (`mllmsrec_core.prefixes`): each level's state is handed on to all that
stand on it. Where a network's state cannot be handed on so (sliding windows, recurrent layers), or where a first batch
shows that its answers would differ, transformers' own `generate` does the work. Knows nothing of Asks or templates.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mllmsrec_core.prefixes import Segment, levels

LEAST_SAVED = (
    8  # tokens for which one more pass is worth it: the demo's scoring loses 1 % by it, and saves 46 of 124 passes
)
ATTENTION = ("sdpa", "eager")  # those that take a mask with holes
# Half the summed difference of two next-word distributions: rounding in float32, and in 16 bits.
CLOSE = {torch.float32: 1e-4}
CLOSE_IN_HALF = 0.1
Tensors = dict[str, torch.Tensor]
Draw = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
log = logging.getLogger(__name__)


class Reader:
    """One network. `tokens` counts what it has computed so far, prompts and answers, without padding.

    `picture_token` is the id that stands for a piece of a picture in a prompt, None for a model without eyes.
    Tensors are left-padded and as a processor makes them, on the network's device.
    """

    def __init__(self, network: Any, picture_token: int | None, name: str, share: bool = True) -> None:
        self.network, self.picture_token, self.name, self.share = network, picture_token, name, share
        self.tokens = 0
        self._takes = set(inspect.signature(network.forward).parameters)
        self._plain = not self._hands_on()
        self._tried: set[bool] = set()  # without and with pictures: whether a first batch was compared

    def next_words(self, tensors: Tensors, marks: Sequence[tuple[int, ...]] | None) -> torch.Tensor:
        """Logits behind each prompt, float32, rows in order.

        `marks` are the prompts' tokens, with pieces of different pictures told apart; None where a prompt holds
        several pictures, and then nothing is shared.
        """
        if self._plain or not self.share or marks is None or not self._splits(tensors):
            return self._generated(tensors)
        logits = self._shared(tensors, marks)
        return logits if self._agrees(tensors, logits) else self._generated(tensors)

    def write(self, tensors: Tensors, most: int, stops: Sequence[int], draw: Draw | None) -> list[list[int]]:
        """Up to `most` token ids behind each prompt, the first of `stops` included; a finished row leaves the batch.

        `draw(scores, rows)` replaces the scores of the prompts `rows`, the largest of which is taken.
        """
        if self._plain or not self._splits(tensors):
            return self._written(tensors, most, stops, draw)
        mask, positions, cache = tensors["attention_mask"], self._positions(tensors), self._cache()
        logits = self._step(tensors["input_ids"], mask, positions, cache, self._others(tensors))
        if not self._agrees(tensors, logits):
            return self._written(tensors, most, stops, draw)
        positions = positions[..., -1:]
        texts: list[list[int]] = [[] for _ in range(len(mask))]
        live = list(range(len(mask)))
        while True:
            scores = draw(logits, live) if draw else logits
            words = scores.argmax(dim=-1)
            for row, word in zip(live, words.tolist(), strict=True):
                texts[row].append(word)
            going = [n for n, row in enumerate(live) if texts[row][-1] not in stops]
            if not going or len(texts[live[0]]) == most:
                return texts
            if len(going) < len(live):
                kept = torch.tensor(going, device=mask.device)
                cache.batch_select_indices(kept)
                words, mask, positions = words[kept], mask[kept], positions[..., kept, :]
                live = [live[n] for n in going]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            positions = positions + 1
            logits = self._step(words[:, None], mask, positions, cache, {})

    # --- beginnings ---------------------------------------------------------------------------------------------

    def _shared(self, tensors: Tensors, marks: Sequence[tuple[int, ...]]) -> torch.Tensor:
        ids, positions = tensors["input_ids"], self._positions(tensors)
        cache, mask = self._cache(), ids.new_zeros(1, 0)
        found: dict[int, torch.Tensor] = {}
        for level in levels(marks, LEAST_SAVED):
            parents = torch.tensor([segment.parent or 0 for segment in level], device=ids.device)
            cache.batch_select_indices(parents)
            here = _cut(tensors["attention_mask"], level, marks)
            mask = torch.cat([mask[parents], here], dim=1)
            others = self._others(tensors, level, marks)
            logits = self._step(_cut(ids, level, marks), mask, _cut(positions, level, marks), cache, others)
            found |= {row: logits[n] for n, segment in enumerate(level) for row in segment.ends}
        return torch.stack([found[row] for row in range(len(marks))])

    def _step(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any, others: Tensors
    ) -> torch.Tensor:
        """Read `ids` on top of `cache`, which grows by them; logits at the last place of each row."""
        self.tokens += int(mask[:, -ids.shape[1] :].sum())
        made = self.network(
            input_ids=ids,
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **others,
        )
        return made.logits[:, -1].float()

    def _others(
        self, tensors: Tensors, level: Sequence[Segment] | None = None, marks: Sequence[tuple[int, ...]] = ()
    ) -> Tensors:
        """Whatever else the network takes: of whole prompts, or of the segments of a level."""
        ids = tensors["input_ids"]
        rest = {name: value for name, value in tensors.items() if name not in ("input_ids", "attention_mask")}
        along = {name: value for name, value in rest.items() if value.shape == ids.shape and name in self._takes}
        beside = {name: value for name, value in rest.items() if value.shape != ids.shape}
        if level is None:
            return along | beside
        shown = _cut(ids, level, marks) == self.picture_token if beside else ids.new_zeros(0, 1)
        rows = [level[n].row for n in shown.any(dim=1).nonzero().flatten().tolist()]
        return {name: _cut(value, level, marks) for name, value in along.items()} | (
            _of(beside, rows, len(ids)) if rows else {}
        )

    def _positions(self, tensors: Tensors) -> torch.Tensor:
        """Where each token stands; models that place pieces of pictures in a plane have three numbers for it."""
        mask, inner = tensors["attention_mask"], getattr(self.network, "model", self.network)
        if "image_grid_thw" in tensors and hasattr(inner, "get_rope_index"):
            takes = inspect.signature(inner.get_rope_index).parameters
            return inner.get_rope_index(**{name: value for name, value in tensors.items() if name in takes})[0]
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)

    # --- whether it can be done ---------------------------------------------------------------------------------

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.network.config.get_text_config(decoder=True))

    def _hands_on(self) -> bool:
        """Whether every layer keeps all it has read, and a mask may have holes."""
        from transformers.cache_utils import DynamicLayer

        whole = all(type(layer) is DynamicLayer for layer in self._cache().layers)
        needed = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
        return whole and needed <= self._takes and self.network.config._attn_implementation in ATTENTION

    def _splits(self, tensors: Tensors) -> bool:
        """Whether it is known which part of each tensor belongs to which prompt."""
        ids = tensors["input_ids"]
        beside = {name: value for name, value in tensors.items() if value.shape != ids.shape}
        try:
            _of(beside, [], len(ids))
        except ValueError:
            return False
        return not beside or self.picture_token is not None

    def _agrees(self, tensors: Tensors, logits: torch.Tensor) -> bool:
        """Whether `logits` are those of `generate` for the first and the last prompt of a first batch, as all later."""
        ids = tensors["input_ids"]
        along = {name: value for name, value in tensors.items() if value.shape == ids.shape}
        pictures = len(along) < len(tensors)
        if pictures not in self._tried:
            self._tried.add(pictures)
            rows = sorted({0, len(logits) - 1})
            along = {name: value[rows] for name, value in along.items()}
            beside = _of({name: value for name, value in tensors.items() if name not in along}, rows, len(ids))
            ours, theirs = logits[rows].softmax(dim=-1), self._generated(along | beside).softmax(dim=-1)
            apart = (ours - theirs).abs().sum(dim=-1).max().item() / 2
            self._plain = not apart <= CLOSE.get(self.network.dtype, CLOSE_IN_HALF)
            if self._plain:
                log.warning("%s: state cannot be handed on (answers differ by %.1e); each prompt is read whole",
                            self.name, apart)  # fmt: skip
        return not self._plain

    # --- transformers' own way ------------------------------------------------------------------------------------

    def _generated(self, tensors: Tensors) -> torch.Tensor:
        # One step of `generate` reads the last position with every model's own positions, and only that position.
        self.tokens += int(tensors["attention_mask"].sum())
        step = self.network.generate(
            **tensors, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return step.logits[0].float()

    def _written(self, tensors: Tensors, most: int, stops: Sequence[int], draw: Draw | None) -> list[list[int]]:
        from transformers import LogitsProcessorList

        everyone = range(len(tensors["input_ids"]))
        drawn: Any = LogitsProcessorList([lambda _, scores: draw(scores, everyone)] if draw else [])
        made = self.network.generate(**tensors, max_new_tokens=most, do_sample=False, logits_processor=drawn)
        rows = made[:, tensors["input_ids"].shape[1] :].tolist()
        ends = [next((n + 1 for n, word in enumerate(row) if word in stops), len(row)) for row in rows]
        self.tokens += int(tensors["attention_mask"].sum()) + sum(ends) - len(ends)
        return [row[:end] for row, end in zip(rows, ends, strict=True)]


def _cut(tensor: torch.Tensor, level: Sequence[Segment], marks: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Of left-padded rows (second to last dimension) the tokens of each segment, left-padded with zeros."""
    width, longest = tensor.shape[-1], max(segment.end - segment.start for segment in level)
    cut = tensor.new_zeros(*tensor.shape[:-2], len(level), longest)
    for n, segment in enumerate(level):
        shift = width - len(marks[segment.row])
        cut[..., n, longest - (segment.end - segment.start) :] = tensor[
            ..., segment.row, shift + segment.start : shift + segment.end
        ]
    return cut


def _of(pictures: Tensors, rows: Sequence[int], n: int) -> Tensors:
    """The pictures of some of `n` prompts, each of which has one. Raises ValueError where that is not how they lie."""
    grid = pictures.get("image_grid_thw")
    pieces = grid.prod(dim=1).tolist() if grid is not None else []
    found: Tensors = {}
    for name, value in pictures.items():
        if len(value) == n:
            found[name] = value[list(rows)]
        elif len(pieces) == n and len(value) == sum(pieces):
            found[name] = torch.cat([value[:0], *(value.split(pieces)[row] for row in rows)])
        else:
            raise ValueError(f"{name} has {len(value)} rows, which are not the pictures of {n} prompts")
    return found
