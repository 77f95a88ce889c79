"""Recipes for adapters."""

from __future__ import annotations

import re

import pytest

from mllmsrec_core.errors import UsageError
from mllmsrec_core.recipe import TARGETS, Recipe


def test_a_recipe_survives_its_json() -> None:
    recipe = Recipe(strategy="lora", rank=8, lr=2e-4)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_what_is_left_out_takes_its_default() -> None:
    assert Recipe.from_json('{"rank": 4}') == Recipe(rank=4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object"),
        ('{"rnak": 4}', "did you mean `rank`"),
        ('{"rank": 0}', "`rank` is 0"),
        ('{"rank": true}', "`rank` is True"),
        ('{"strategy": "full"}', "lora, qlora"),
        ('{"dropout": 1}', "`dropout`"),
        ('{"targets": "("}', "regular expression"),
        ('{"lr": "1e-3"}', "`lr`"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        Recipe.from_json(text)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.language_model.layers.0.self_attn.q_proj", True),
        ("model.text_model.layers.11.mlp.down_proj", True),
        ("model.layers.3.mlp.gate_proj", True),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", False),
        ("model.visual.blocks.0.mlp.gate_proj", False),
        ("model.vision_model.encoder.layers.0.self_attn.v_proj", False),
        ("lm_head", False),
    ],
)
def test_the_default_targets_are_the_language_model_of_any_architecture(name: str, wanted: bool) -> None:
    assert bool(re.fullmatch(TARGETS, name)) is wanted
