"""Whose fault an error inside a library is."""

from __future__ import annotations

import errno

import pytest
import torch

from tasks.engines.refusals import lasting, out_of_memory, refused_by_vllm


class VLLMClientError(Exception):
    """As newer releases of vLLM have it: no ValueError."""


class EngineGenerateError(Exception):
    """What vLLM makes of anything it did not expect."""


def of(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, by_processor, by_vllm",
    [
        (ValueError("no"), True, True),
        (KeyError("no"), True, False),
        (ZeroDivisionError("no"), True, False),
        (TypeError("no"), True, False),
        (VLLMClientError("no"), True, True),
        (of(ValueError("apply"), TypeError("no")), True, True),
        (of(EngineGenerateError(), ValueError("no")), True, True),
        (AttributeError("no"), False, False),
        (RuntimeError("no"), False, False),
        (OSError(errno.EMFILE, "Too many open files"), False, False),
        (of(ValueError("apply"), OSError(errno.EMFILE, "Too many open files")), False, False),
        (of(EngineGenerateError(), RuntimeError("no")), False, False),
        (MemoryError(), False, False),
    ],
)
def test_only_what_is_raised_over_values_all_the_way_down_is_the_rows(
    error: Exception, by_processor: bool, by_vllm: bool
) -> None:
    assert (lasting(error), refused_by_vllm(error)) == (by_processor, by_vllm)
    assert out_of_memory(error) == isinstance(error, MemoryError)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        of(ValueError("apply"), MemoryError()),
    ],
)
def test_memory_that_ran_out_is_known_under_each_of_its_names(error: Exception) -> None:
    assert out_of_memory(error) and not lasting(error) and not refused_by_vllm(error)


def test_words_of_a_prompt_are_no_want_of_memory() -> None:
    assert not out_of_memory(ValueError("the prompt 'Out of memory', a novel, is refused"))
