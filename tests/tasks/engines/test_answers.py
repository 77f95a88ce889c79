"""Seeds, sums of log-probabilities and the Reply made of them."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.ask import Decoding, Generate, Message, Model
from mllmsrec_core.errors import AskError
from tasks.engines.answers import chosen, log_sum, seed_of

MODEL = Model("m", "1", dtype="float16")
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
    reply = chosen(logs, {"yes": [1, 2], "no": [3]}, 7, MODEL, "here")
    assert reply.value["logprobs"] == pytest.approx({"yes": math.log(0.625), "no": math.log(0.25)})
    assert reply.value["mass"] == pytest.approx(0.875)
    assert (reply.tokens_in, reply.tokens_out) == (7, 1)


@pytest.mark.parametrize("yes, no", [(math.nan, -1.0), (-1.0, math.nan), (-math.inf, -math.inf), (math.inf, -1.0)])
def test_what_is_no_probability_fails_its_row_and_is_never_a_success(yes: float, no: float) -> None:
    with pytest.raises(AskError, match="http://here: m@1 gives no finite probabilities in float16") as caught:
        chosen({1: yes, 2: no, 3: yes}, {"yes": [1, 3], "no": [2]}, 7, MODEL, "http://here")
    assert "bfloat16 or float32" in str(caught.value) and "mllmsrec retry --class ask_failed" in str(caught.value)


def test_one_impossible_choice_beside_a_possible_one_is_an_answer() -> None:
    reply = chosen({1: -math.inf, 2: -1.0}, {"yes": [1], "no": [2]}, 7, MODEL, "here")
    assert reply.value == {"logprobs": {"yes": -math.inf, "no": -1.0}, "mass": pytest.approx(math.exp(-1))}


def test_a_seed_belongs_to_its_question_and_survives_json() -> None:
    ask = Generate(Model("m", "1"), (Message("user", ("red?",)),), Decoding(8, temperature=1.0))
    seeds = {seed_of(replace(ask, decoding=replace(ask.decoding, seed=seed))) for seed in range(50)}
    assert len(seeds) == 50
    assert max(seeds) < 2**53
    assert seed_of(ask) == seed_of(replace(ask))
