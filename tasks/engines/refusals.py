"""What an error inside a library says of the row in its hands: that the row is wrong, or nothing.

A row that is refused for what it is will be refused again. A machine short of memory or of open files, and a fault of
the library's own, say nothing of the row: it is asked again.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

REFUSALS = (ValueError, TypeError, LookupError, ArithmeticError)  # what Python raises over values
VLLMS = frozenset({"VLLMClientError", "VLLMValidationError"})  # are no ValueErrors in newer releases
NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory", re.I)  # CUDA's and torch's words


def lasting(error: BaseException) -> bool:
    """Whether a library refused the row itself. What it wrapped decides: a full disk in a ValueError is no refusal."""
    *_, root = beneath(error)
    return isinstance(root, REFUSALS) or _by_vllm(root)


def refused_by_vllm(error: BaseException) -> bool:
    """The same of vLLM, which raises ValueErrors or its own; a bare TypeError is a fault of its code."""
    return lasting(error) and any(isinstance(each, ValueError) or _by_vllm(each) for each in beneath(error))


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out beneath `error`, the machine's or a device's."""
    return any(
        isinstance(each, MemoryError)
        or type(each).__name__ == "OutOfMemoryError"  # torch's, which need not be imported for it
        or (isinstance(each, OSError) and each.errno == errno.ENOMEM)
        or (isinstance(each, RuntimeError) and NO_MEMORY.search(str(each)) is not None)
        for each in beneath(error)
    )


def beneath(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then what it was raised from, down to the first cause."""
    while error is not None:
        yield error
        error = error.__cause__


def _by_vllm(error: BaseException) -> bool:
    return any(base.__name__ in VLLMS for base in type(error).__mro__)
