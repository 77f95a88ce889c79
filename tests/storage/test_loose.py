"""Places are found as in a plain dict, whether they were sorted in already or not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import loose
from storage.loose import Loose

PREFIXES = st.integers(0, 5) | st.integers(2**64 - 5, 2**64 - 1)
PARTS = st.lists(st.lists(PREFIXES, max_size=9), max_size=9)


def opened(parts: list[list[int]]) -> Loose:
    made = Loose()
    for number, prefixes in enumerate(parts):
        made.add(f"part {number}", np.array(prefixes, np.uint64).data)
    return made


@pytest.mark.parametrize("recent", [1, 4, 1_000])
@given(parts=PARTS)
def test_every_row_of_a_prefix_is_found_once_in_its_part(recent, parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loose, "RECENT_ROWS", recent)
        made = opened(parts)
    for prefix in {*(one for part in parts for one in part), 3}:
        wanted = [(f"part {p}", row) for p, part in enumerate(parts) for row, one in enumerate(part) if one == prefix]
        assert Counter(made.find(prefix)) == Counter(wanted)


def test_a_part_that_is_added_again_is_there_once():
    made = opened([[7, 8]])
    made.add("part 0", np.array([7, 8], np.uint64).data)
    assert made.find(7) == [("part 0", 0)]


def test_few_places_stay_python_objects_however_many_rows_there_are():
    made, numbers = Loose(), np.random.default_rng(0).integers(0, 2**63, (50, 2_000)).astype(np.uint64)
    for number, part in enumerate(numbers):
        made.add(str(number), part.data)
        assert len(made._recent) < loose.RECENT_ROWS
    assert all(made.find(int(part[5])) == [(str(number), 5)] for number, part in enumerate(numbers))
