"""What engines share that answer Generate and Choose: seeds of draws, and choices read off log-probabilities.

Knows no model and no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from mllmsrec_core.ask import Choose, Generate, Model, Reply, key
from mllmsrec_core.errors import AskError

Form = TypeVar("Form", int, int | str)
SEED_BYTES = 6  # every JSON reader keeps so large a number exact


def seed_of(ask: Generate | Choose) -> int:
    """A seed that depends on the Ask alone, so that a drawn text does not depend on its neighbours."""
    return int.from_bytes(key(ask)[:SEED_BYTES], "big")


def log_sum(values: Sequence[float]) -> float:
    """The logarithm of the sum of exponentials; -inf where every value is. `values` is not empty."""
    top = max(values)
    return top if top == -math.inf else top + math.log(sum(math.exp(value - top) for value in values))


def chosen(
    logs: Mapping[Form, float], forms: Mapping[str, Sequence[Form]], tokens_in: int, model: Model, where: str
) -> Reply:
    """The Reply to a Choose: by choice the log-sum-exp over its forms, all of which are in `logs`.

    Raises AskError as `probable` does.
    """
    sums = {name: log_sum([logs[form] for form in each]) for name, each in forms.items()}
    probable(sums, model, where)
    mass = math.exp(log_sum(list(sums.values())))
    return Reply({"logprobs": sums, "mass": mass}, tokens_in=tokens_in, tokens_out=1)


def probable(sums: Mapping[str, float], model: Model, where: str) -> None:
    """Raises AskError where these log-probabilities of choices are none: one is no number, or all are impossible.

    Such an answer would stand in the store as a success for ever. One choice alone may well be impossible.
    """
    values = list(sums.values())
    if any(math.isnan(value) or value == math.inf for value in values) or all(value == -math.inf for value in values):
        said = ", ".join(f"{name} {value}" for name, value in sums.items())
        raise AskError(f"{where}: {no_numbers('probabilities', model)} ({said})")


def no_numbers(what: str, model: Model) -> str:
    """What to say, and to do, where a network has overflowed: float16 ends at 65,504."""
    return (
        f"{model.slug} gives no finite {what} in {model.dtype}; set `dtype`, and a server's with it, to bfloat16 or float32 "
        "(where it is, look at the weights and the device), then `mllmsrec retry --class ask_failed`"
    )
