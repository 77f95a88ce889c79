"""What a running vLLM must have been started with for the questions that wait, as arithmetic: needs no vLLM."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from mllmsrec_core.ask import Model

# The first questions stand for those behind them: a quarter more room than they take, and never little, so that a
# longer row, or the next stage, seldom needs a new start.
MARGIN = 1.25
LEAST = 2048  # tokens
# Pictures processed in vain before a new start with a cache for them is worth it: a start takes about a minute on a
# GPU, a photograph some 10 ms.
AGAIN = 5000
# Different pictures: as many of 2 MB, processed, as the cache of 4 GB holds. One that comes again later would miss it.
RECENT = 2000


@dataclass(frozen=True)
class Needs:
    """Weights, LoRA layers of this rank, pictures per prompt, tokens of a prompt with its answer, a picture cache."""

    weights: Model
    rank: int = 0  # 0: no adapter
    pictures: int = 1
    tokens: int = 1
    cache: bool = False

    def covers(self, other: Needs) -> bool:
        """Whether an engine started for these needs can answer a question with the `other` ones."""
        return self.grown(other) == self

    def grown(self, other: Needs) -> Needs:
        """What covers both; other weights start anew."""
        if self.weights != other.weights:
            return other
        return Needs(
            self.weights,
            max(self.rank, other.rank),
            max(self.pictures, other.pictures),
            max(self.tokens, other.tokens),
            self.cache or other.cache,
        )


def together(needs: Needs, waiting: Iterable[Needs]) -> Needs:
    """What covers `needs` and all that wait for the same weights."""
    return reduce(Needs.grown, (other for other in waiting if other.weights == needs.weights), needs)


def room(tokens: int, most: int | None) -> int:
    """How many tokens to start with when the longest of the waiting questions takes `tokens`: a power of two.

    At most `most`; 0 where that is unknown, and vLLM has to find out by itself.
    """
    if most is None:
        return 0
    return min(most, max(LEAST, 1 << (int(tokens * MARGIN) - 1).bit_length()))


class Shown:
    """Which pictures were shown of late, and how many came again."""

    def __init__(self) -> None:
        self.again = 0
        self._seen: OrderedDict[str, None] = OrderedDict()

    def add(self, pictures: Iterable[str]) -> None:
        """Count pictures, given by sha256, that were among the last `RECENT` different ones."""
        for picture in set(pictures):
            self.again += picture in self._seen
            self._seen[picture] = None
            self._seen.move_to_end(picture)
        while len(self._seen) > RECENT:
            self._seen.popitem(last=False)
