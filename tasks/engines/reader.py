"""A network read from left to right, with what it has read kept: beginnings once, finished rows no longer.

Prompts that begin alike are read level by level (`mllmsrec_core.prefixes`): each level's state is handed on to all that
stand on it. Where a network's state cannot be handed on so (sliding windows, recurrent layers), or where a first batch
shows that its answers would differ, transformers' own `generate` does the work. Knows nothing of Asks or templates.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mllmsrec_core.prefixes import Segment, common, levels

PASS = 16  # tokens as which a pass counts beside those it computes; 4 to 96 make no difference on one CPU thread
LEAST_SAVED = tuple(PASS * n for n in (1, 4, 16))  # of ways to share from deep to shallow; the cheapest is taken
ATTENTION = ("sdpa", "eager")  # those that take a mask with holes
# Half the summed difference of two next-word distributions: rounding in float32, and in 16 bits.
CLOSE = {torch.float32: 1e-4}
CLOSE_IN_HALF = 0.1
NO_WORD = -1  # where the scores are no numbers, and their largest would be whatever stands first in the vocabulary
Tensors = dict[str, torch.Tensor]
Draw = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
log = logging.getLogger(__name__)


class Reader:
    """One network. `tokens` counts what it has computed so far, prompts and answers, without padding; `reused` those of
    prompts that it did not compute, because they were computed for another prompt of the batch.

    `picture_token` is the id that stands for a piece of a picture in a prompt, None for a model without eyes.
    Tensors are left-padded and as a processor makes them, on the network's device.
    """

    def __init__(self, network: Any, picture_token: int | None, name: str, share: bool = True) -> None:
        self.network, self.picture_token, self.name, self.share = network, picture_token, name, share
        self.tokens = self.reused = 0
        self._takes = set(inspect.signature(network.forward).parameters)
        self._plain = not self._hands_on()
        self._tried: set[tuple[bool, bool]] = set()  # with pictures, shared: of what a first batch was compared

    def next_words(
        self, tensors: Tensors, marks: Sequence[tuple[int, ...]] | None, shown: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Logits behind each prompt, float32, rows in order.

        `marks` are the prompts' tokens, with pieces of different pictures told apart; None where a prompt holds
        several pictures, and then nothing is shared. `shown` says which of the pictures in `tensors` each prompt
        shows; None: each its own.
        """
        shown = range(len(tensors["input_ids"])) if shown is None else shown
        if self._plain or not self.share or marks is None or not self._splits(tensors, shown):
            return self._generated(_whole(tensors, shown))
        before = self.tokens
        logits = self._shared(tensors, marks, shown)
        saved = sum(map(len, marks)) - (self.tokens - before)
        if not self._agrees(tensors, logits, shown, saved > 0):
            return self._generated(_whole(tensors, shown))
        self.reused += saved
        return logits

    def write(
        self,
        tensors: Tensors,
        most: int,
        stops: Sequence[int],
        draw: Draw | None,
        marks: Sequence[tuple[int, ...]] | None = None,
    ) -> list[list[int]]:
        """Up to `most` token ids behind each prompt, the first of `stops` included; a finished row leaves the batch.
        A row whose scores turn out to be no numbers ends with NO_WORD.

        `draw(scores, rows)` replaces the scores of the prompts `rows`, the largest of which is taken. With `marks`, as
        of `next_words`, what all prompts begin with is read once.
        """
        own = range(len(tensors["input_ids"]))
        if self._plain or not self._splits(tensors, own):
            return self._written(tensors, most, stops, draw)
        positions, before = self._positions(tensors, own), self.tokens
        stem = _stem(marks) if marks is not None and self.share else []
        if marks is not None and stem:
            *_, (logits, mask, cache) = self._read(tensors, marks, own, stem)
        else:
            mask, cache = tensors["attention_mask"], self._cache()
            logits = self._step(tensors["input_ids"], mask, positions, cache, self._others(tensors))
        saved = int(tensors["attention_mask"].sum()) - (self.tokens - before)
        if not self._agrees(tensors, logits, own, saved > 0):
            return self._written(tensors, most, stops, draw)
        self.reused += saved
        positions = positions[..., -1:]
        texts: list[list[int]] = [[] for _ in range(len(mask))]
        live = list(range(len(mask)))
        while True:
            scores = draw(logits, live) if draw else logits
            words = scores.argmax(dim=-1).where(_numbers(logits), NO_WORD)
            for row, word in zip(live, words.tolist(), strict=True):
                texts[row].append(word)
            going = [n for n, row in enumerate(live) if texts[row][-1] not in (*stops, NO_WORD)]
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

    def _shared(self, tensors: Tensors, marks: Sequence[tuple[int, ...]], shown: Sequence[int]) -> torch.Tensor:
        found: dict[int, torch.Tensor] = {}
        planned = min((levels(marks, least) for least in LEAST_SAVED), key=_price)
        for level, (logits, _, _) in zip(planned, self._read(tensors, marks, shown, planned), strict=True):
            found |= {row: logits[n] for n, segment in enumerate(level) for row in segment.ends}
        return torch.stack([found[row] for row in range(len(marks))])

    def _read(
        self,
        tensors: Tensors,
        marks: Sequence[tuple[int, ...]],
        shown: Sequence[int],
        planned: Sequence[Sequence[Segment]],
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, Any]]:
        """Logits behind each segment, level by level, and the mask and state that the next level stands on."""
        ids, positions = tensors["input_ids"], self._positions(tensors, shown)
        cache, mask = self._cache(), ids.new_zeros(1, 0)
        for level in planned:
            parents = torch.tensor([segment.parent or 0 for segment in level], device=ids.device)
            _stand(cache, parents)
            here = _cut(tensors["attention_mask"], level, marks)
            mask = torch.cat([mask[parents], here], dim=1)
            others = self._others(tensors, level, marks, shown)
            logits = self._step(_cut(ids, level, marks), mask, _cut(positions, level, marks), cache, others)
            yield logits, mask, cache

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
        self,
        tensors: Tensors,
        level: Sequence[Segment] | None = None,
        marks: Sequence[tuple[int, ...]] = (),
        shown: Sequence[int] = (),
    ) -> Tensors:
        """Whatever else the network takes: of whole prompts, or of the segments of a level."""
        ids = tensors["input_ids"]
        rest = {name: value for name, value in tensors.items() if name not in ("input_ids", "attention_mask")}
        along = {name: value for name, value in rest.items() if value.shape == ids.shape and name in self._takes}
        beside = {name: value for name, value in rest.items() if value.shape != ids.shape}
        if level is None:
            return along | beside
        seen = _cut(ids, level, marks) == self.picture_token if beside else ids.new_zeros(0, 1)
        rows = [shown[level[n].row] for n in seen.any(dim=1).nonzero().flatten().tolist()]
        return {name: _cut(value, level, marks) for name, value in along.items()} | (
            _of(beside, rows, max(shown) + 1) if rows else {}
        )

    def _positions(self, tensors: Tensors, shown: Sequence[int]) -> torch.Tensor:
        """Where each token stands; models that place pieces of pictures in a plane have three numbers for it."""
        mask, inner = tensors["attention_mask"], getattr(self.network, "model", self.network)
        if "image_grid_thw" in tensors and hasattr(inner, "get_rope_index"):
            takes = inspect.signature(inner.get_rope_index).parameters
            tensors = tensors | {"image_grid_thw": tensors["image_grid_thw"][list(shown)]}
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

    def _splits(self, tensors: Tensors, shown: Sequence[int]) -> bool:
        """Whether it is known which part of each tensor belongs to which prompt."""
        ids = tensors["input_ids"]
        beside = {name: value for name, value in tensors.items() if value.shape != ids.shape}
        try:
            _of(beside, [], max(shown) + 1)
        except ValueError:
            return False
        return not beside or self.picture_token is not None

    def _agrees(self, tensors: Tensors, logits: torch.Tensor, shown: Sequence[int], shared: bool) -> bool:
        """Whether `logits` are those of `generate` for the first and the last prompt of a first batch, as all later.

        There is a first batch without and with pictures, and of each one in which something was `shared`.
        """
        ids = tensors["input_ids"]
        along = {name: value for name, value in tensors.items() if value.shape == ids.shape}
        how = len(along) < len(tensors), shared
        if how not in self._tried:
            self._tried |= {how, (how[0], False)}
            rows = sorted({0, len(logits) - 1})
            along = {name: value[rows] for name, value in along.items()}
            beside = {name: value for name, value in tensors.items() if name not in along}
            beside = _of(beside, [shown[row] for row in rows], max(shown) + 1)
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

        everyone, known = range(len(tensors["input_ids"])), list[torch.Tensor]()

        def look(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            known.append(_numbers(scores))
            return draw(scores, everyone) if draw else scores

        looking: Any = LogitsProcessorList([look])
        made = self.network.generate(**tensors, max_new_tokens=most, do_sample=False, logits_processor=looking)
        words = made[:, tensors["input_ids"].shape[1] :]
        rows = words.where(torch.stack(known, dim=1), NO_WORD).tolist()
        stops = (*stops, NO_WORD)
        ends = [next((n + 1 for n, word in enumerate(row) if word in stops), len(row)) for row in rows]
        self.tokens += int(tensors["attention_mask"].sum()) + sum(ends) - len(ends)
        return [row[:end] for row, end in zip(rows, ends, strict=True)]


def _numbers(scores: torch.Tensor) -> torch.Tensor:
    """Which rows have a likeliest word: none where something overflowed to infinity or to no number."""
    return scores.amax(dim=-1).isfinite()


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


def _stand(cache: Any, parents: torch.Tensor) -> None:
    """Let the rows of the state become those of `parents`; a single one is not copied before it must be."""
    if cache.get_seq_length() == 0:
        return
    if len(cache.layers[0].keys) > 1:
        return cache.batch_select_indices(parents)
    for layer in cache.layers:
        layer.keys = layer.keys.expand(len(parents), -1, -1, -1)
        layer.values = layer.values.expand(len(parents), -1, -1, -1)


def _price(planned: Sequence[Sequence[Segment]]) -> int:
    """Tokens computed, padding and passes among them."""
    return sum(PASS + len(level) * max(segment.end - segment.start for segment in level) for level in planned)


def _stem(marks: Sequence[tuple[int, ...]]) -> list[list[Segment]]:
    """What all prompts begin with, then the rest of each; empty where that saves nothing. Nobody ends with the stem."""
    low, high = min(marks), max(marks)
    end = min(common(low, high), min(map(len, marks)) - 1)
    while end > 0 and low[end - 1] == low[end] < 0:  # a picture stays in one piece
        end -= 1
    apart = [Segment(row, 0, len(words), None) for row, words in enumerate(marks)]
    stem = [Segment(0, 0, end, None)]
    rest = [Segment(row, end, len(words), 0, [row]) for row, words in enumerate(marks)]
    return [stem, rest] if end > 0 and _price([stem, rest]) < _price([apart]) else []


def _whole(tensors: Tensors, shown: Sequence[int]) -> Tensors:
    """The same with a picture for each prompt again."""
    ids = tensors["input_ids"]
    if not len(shown) or list(shown) == list(range(len(ids))):
        return tensors
    along = {name: value for name, value in tensors.items() if value.shape == ids.shape}
    beside = {name: value for name, value in tensors.items() if name not in along}
    return along | _of(beside, list(shown), max(shown) + 1)


def _of(pictures: Tensors, rows: Sequence[int], n: int) -> Tensors:
    """Some of `n` pictures, in any order. Raises ValueError where they do not lie one after another."""
    grid = pictures.get("image_grid_thw")
    pieces = grid.prod(dim=1).tolist() if grid is not None else []
    found: Tensors = {}
    for name, value in pictures.items():
        if len(value) == n:
            found[name] = value[list(rows)]
        elif len(pieces) == n and len(value) == sum(pieces):
            found[name] = torch.cat([value[:0], *(value.split(pieces)[row] for row in rows)])
        else:
            raise ValueError(f"{name} has {len(value)} rows, which are not {n} pictures")
    return found
