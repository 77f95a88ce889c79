"""Contracts are kept or named, and prompts hold no field that a stage cannot fill."""

from __future__ import annotations

from typing import Annotated

import dataframely as dy
import polars as pl
import pytest
from pydantic import ValidationError

from mllmsrec_core.errors import ContractError
from mllmsrec_core.stage import AskParams, Params, conform, fields
from mllmsrec_core.stages import STAGES


class Words(dy.Schema):
    word = dy.String(primary_key=True)
    count = dy.Int64(min=0)


class Template(Params):
    prompt: Annotated[str, fields("user", "item")] = "{user} {item}"


def test_a_conforming_frame_has_the_contracts_columns_in_order_and_is_sorted_by_its_key():
    frame = conform(
        pl.DataFrame({"count": pl.Series([2, 1], dtype=pl.Int8), "more": [0, 0], "word": ["b", "a"]}), Words
    )
    assert frame.to_dict(as_series=False) == {"word": ["a", "b"], "count": [1, 2]}
    assert frame.schema == {"word": pl.String, "count": pl.Int64}


@pytest.mark.parametrize(
    "broken",
    [
        {"word": ["a", "a"], "count": [1, 2]},
        {"word": ["a"], "count": [-1]},
        {"word": [None], "count": [1]},
        {"word": ["a"]},
        {"word": ["a"], "count": ["many"]},
    ],
    ids=["key twice", "too small", "null", "no column", "wrong type"],
)
def test_a_table_that_breaks_its_contract_is_named(broken):
    with pytest.raises(ContractError, match=r"test_stage\.Words"):
        conform(pl.DataFrame(broken), Words)


@pytest.mark.parametrize("prompt", ["no fields", "{item}", "{item} of {user}: {{literal}}", '{{"a": {item}}}'])
def test_a_prompt_may_leave_out_fields_and_hold_braces_of_its_own(prompt):
    assert Template(prompt=prompt).prompt == prompt


@pytest.mark.parametrize(
    "prompt", ["{users}", "{0}", "{}", "{item.__class__}", "{item[0]}", "{item!r}", "{item:>9}", "{item", "item}"]
)
def test_a_prompt_with_any_other_field_is_refused_with_the_known_ones(prompt):
    with pytest.raises(ValidationError, match=r"\{user\} and \{item\}; write \{\{ and \}\}"):
        Template(prompt=prompt)


def test_every_prompt_a_stage_fills_in_is_checked_before_a_run():
    for stage in STAGES:
        for name, field in stage.params.model_fields.items():
            if name.endswith("prompt") and "{" in str(field.default):
                with pytest.raises(ValidationError, match="nonsense"):
                    stage.params.model_validate({name: "{nonsense}"})


def test_the_share_of_errors_is_a_share():
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValidationError):
            AskParams(max_error_rate=wrong)


def test_stages_read_only_what_an_earlier_one_writes():
    written: set[str] = set()
    for stage in STAGES:
        assert set(stage.reads) <= written, stage.name
        assert not written & set(stage.writes), stage.name
        written |= set(stage.writes)
