"""What engines share whose model runs in another process: seeds of draws, and choices read off log-probabilities.

Knows no model and no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from mllmsrec_core.ask import Choose, Generate, Reply, key

Form = TypeVar("Form", int, int | str)
SEED_BYTES = 6  # every JSON reader keeps so large a number exact


def seed_of(ask: Generate | Choose) -> int:
    """A seed that depends on the Ask alone, so that a drawn text does not depend on its neighbours."""
    return int.from_bytes(key(ask)[:SEED_BYTES], "big")


def log_sum(values: Sequence[float]) -> float:
    """The logarithm of the sum of exponentials; -inf where every value is. `values` is not empty."""
    top = max(values)
    return top if top == -math.inf else top + math.log(sum(math.exp(value - top) for value in values))


def chosen(logs: Mapping[Form, float], forms: Mapping[str, Sequence[Form]], tokens_in: int) -> Reply:
    """The Reply to a Choose: by choice the log-sum-exp over its forms, all of which are in `logs`."""
    sums = {name: log_sum([logs[form] for form in each]) for name, each in forms.items()}
    mass = math.exp(log_sum(list(sums.values())))
    return Reply({"logprobs": sums, "mass": mass}, tokens_in=tokens_in, tokens_out=1)
