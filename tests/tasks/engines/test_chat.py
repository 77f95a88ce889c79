"""What a processor's failure means for the prompts in its hands; test_reader.py has what it makes of good ones."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from mllmsrec_core.ask import Message
from mllmsrec_core.errors import AskError, EngineError, Passing
from tasks.engines.chat import Chat, Prompt
from tasks.engines.fronts import open_front


class Failing:
    """The processor of a checkpoint, which raises when it sees the word `odd`."""

    def __init__(self, front: Any, error: Exception) -> None:
        self._front, self._error = front, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._front, name)

    def __call__(self, *, text: Iterable[str], **how: Any) -> Any:
        if any("odd" in one for one in text):
            raise self._error
        return self._front(text=list(text), **how)


@pytest.fixture
def encode(known: Any, blobs: Any) -> Callable[[Exception], Any]:
    """`encode(error)`: a good prompt, an odd one and a good one, encoded together."""
    base = known("llava")
    front = open_front(base.model, {base.model.slug: base.location}, blobs).chat.front

    def run(error: Exception) -> Any:
        chat = Chat(Failing(front, error), blobs, "llava")
        prompts: list[Prompt] = [chat.prompt((Message("user", (text,)),), None) for text in ("red?", "odd?", "blue?")]
        return chat.encode(prompts, None)

    return run


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), IndexError("no"), ZeroDivisionError("no")])
def test_a_prompt_that_the_processor_refuses_fails_alone_and_for_good(error: Exception, encode: Any) -> None:
    encoded = encode(error)
    assert encoded.places == [0, 2] and type(encoded.failed[1]) is AskError


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), AttributeError("no"), RuntimeError("no")]
)
def test_a_prompt_on_which_the_processor_failed_otherwise_is_asked_again(error: Exception, encode: Any) -> None:
    encoded = encode(error)
    assert encoded.places == [0, 2]
    assert isinstance(encoded.failed[1], Passing) and type(error).__name__ in str(encoded.failed[1])


def test_no_prompt_is_blamed_for_memory_that_ran_out(encode: Any) -> None:
    with pytest.raises(EngineError, match="lower `max_pixels`"):
        encode(MemoryError())
    with pytest.raises(torch.OutOfMemoryError):  # the batcher halves the batch
        encode(torch.OutOfMemoryError("CUDA out of memory"))
