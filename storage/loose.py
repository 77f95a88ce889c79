"""Where the rows of a key stand in parts whose keys are in no order: one question, however many parts there are.

Most of the places are kept as two sorted columns, 16 bytes a row; only the newest are Python objects. Knows keys by their
first 8 bytes, so that of the rows it names some may be another key's, and knows nothing of what a row holds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

RECENT_ROWS = 16_384  # in a dict, some 3 MB of them; to sort them in with all before takes ms

_ROW_BITS = 32  # of a place; above them stands the part's number


class Loose:
    """Parts by name, with the first 8 bytes of each of their keys as numbers, in the order of rows."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._known: set[str] = set()
        self._recent: dict[int, list[int]] = {}
        self._n_recent = 0
        self._prefixes, self._places = np.empty(0, np.uint64), np.empty(0, np.uint64)
        self._sorted = self._prefixes.data  # which bisect reads faster than the array

    def add(self, name: str, prefixes: memoryview) -> None:
        """Take in a part, unless it was before."""
        if name in self._known:
            return
        first = len(self._names) << _ROW_BITS
        self._known.add(name)
        self._names.append(name)
        for place, prefix in enumerate(prefixes.tolist(), first):
            self._recent.setdefault(prefix, []).append(place)
        self._n_recent += len(prefixes)
        if self._n_recent >= RECENT_ROWS:
            self._sort_in()

    def find(self, prefix: int) -> Sequence[tuple[str, int]]:
        """Part and row of every row whose key begins so, in no order."""
        recent, older = self._recent.get(prefix), equal(self._sorted, prefix)
        if recent is None and not older:
            return ()  # as nearly always while a stage is new
        places = [*(recent or ()), *(int(self._places[at]) for at in older)]
        return [(self._names[place >> _ROW_BITS], place & (1 << _ROW_BITS) - 1) for place in places]

    def _sort_in(self) -> None:
        recent = [(prefix, place) for prefix, places in self._recent.items() for place in places]
        new = np.array(recent, np.uint64)
        prefixes = np.concatenate([self._prefixes, new[:, 0]])
        order = np.argsort(prefixes, kind="stable")
        self._prefixes, self._places = prefixes[order], np.concatenate([self._places, new[:, 1]])[order]
        self._sorted = self._prefixes.data
        self._recent, self._n_recent = {}, 0


def equal(prefixes: memoryview, prefix: int) -> range:
    """Where the prefix stands among sorted ones."""
    start = stop = bisect_left(prefixes, prefix)
    while stop < len(prefixes) and prefixes[stop] == prefix:
        stop += 1
    return range(start, stop)
