"""Seeds, sums of log-probabilities and the Reply made of them."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.ask import Decoding, Generate, Message, Model
from tasks.engines.answers import chosen, log_sum, seed_of

LOGS = st.lists(st.floats(-50, 0), min_size=1, max_size=20)


@given(LOGS)
def test_the_sum_of_logarithms_is_the_logarithm_of_the_sum(values: list[float]) -> None:
    assert log_sum(values) == pytest.approx(math.log(sum(map(math.exp, values))), abs=1e-9)


@given(LOGS, st.floats(-5_000, 0))
def test_very_unlikely_tokens_stay_apart(values: list[float], shift: float) -> None:
    assert log_sum([value + shift for value in values]) == pytest.approx(log_sum(values) + shift, abs=1e-6)


def test_what_cannot_happen_has_no_weight() -> None:
    assert log_sum([-math.inf, -1.0]) == -1.0
    assert log_sum([-math.inf, -math.inf]) == -math.inf


def test_a_choice_sums_its_forms_and_the_mass_sums_the_choices() -> None:
    logs = {1: math.log(0.5), 2: math.log(0.125), 3: math.log(0.25), 4: math.log(0.1)}
    reply = chosen(logs, {"yes": [1, 2], "no": [3]}, tokens_in=7)
    assert reply.value["logprobs"] == pytest.approx({"yes": math.log(0.625), "no": math.log(0.25)})
    assert reply.value["mass"] == pytest.approx(0.875)
    assert (reply.tokens_in, reply.tokens_out) == (7, 1)


def test_a_seed_belongs_to_its_question_and_survives_json() -> None:
    ask = Generate(Model("m", "1"), (Message("user", ("red?",)),), Decoding(8, temperature=1.0))
    seeds = {seed_of(replace(ask, decoding=replace(ask.decoding, seed=seed))) for seed in range(50)}
    assert len(seeds) == 50
    assert max(seeds) < 2**53
    assert seed_of(ask) == seed_of(replace(ask))
