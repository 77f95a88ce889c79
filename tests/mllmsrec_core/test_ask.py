"""A key names exactly one question: equal content has an equal key, and every field counts."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.ask import (
    Choose,
    Decoding,
    Embed,
    Example,
    Fetch,
    Generate,
    Message,
    Model,
    Picture,
    Train,
    key,
    kind,
    model_of,
    render,
)

MODEL = Model("org/name", "0123456789abcdef", max_pixels=500)
MESSAGES = (Message("system", ("Be brief.",)), Message("user", ("What is this?", Picture("ab" * 32))))
GENERATE = Generate(MODEL, MESSAGES, Decoding(20))
CHOOSE = Choose(MODEL, MESSAGES, (("yes", ("yes", " Yes")), ("no", ("no",))))
EMBED = Embed(MODEL, "a red mug")
FETCH = Fetch("s3://shop/1.jpg", "etag")
TRAIN = Train(MODEL, '{"rank":8}', "digest", (Example(MESSAGES, "yes"),))
ASKS = (GENERATE, CHOOSE, EMBED, FETCH, TRAIN)

# Raising KEY_VERSION is the only way to change these on purpose: every stored answer is found by them.
GOLDEN = {
    "generate": "20f263f7662fab063911c994c18d6d4feeb1676a7d789201687ae9ff9d35c574",
    "choose": "6c33295c0e7df6148d145fd041663cdc4a3cca64d0e96374ba4fb23c9aa7f351",
    "embed": "a5f649a49b8714fa76fb1443c7f50b65274ec9d1c5e6e24d221d38717c260b79",
    "fetch": "bd0f13241a62d5b98731403a3d66575023b7cd1e35ecd3e1e853f49e283dd8f3",
    "train": "11482323c6c9706f2f569f41a3e75ad7be5fe9be12bc10674f7d3f4fe468bdc1",
}

OTHER = {
    "name": "other",
    "revision": "fedcba9876543210",
    "dtype": "bfloat16",
    "quantisation": "nf4",
    "max_pixels": 501,
    "adapter": "cd" * 32,
    "role": "assistant",
    "parts": ("other",),
    "max_tokens": 21,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "uri": "s3://shop/2.jpg",
    "version": "other",
    "sha256": "ef" * 32,
    "messages": (Message("user", ("What?",)),),
    "choices": (("yes", ("yes",)), ("no", ("no",))),
    "content": "a blue mug",
    "recipe": '{"rank":9}',
    "digest": "other",
}


def variants(value: Any) -> list[Any]:
    """`value` with each of its fields changed in turn, also inside."""
    found = []
    for field in fields(value):
        old = getattr(value, field.name)
        if not field.compare:
            continue
        if isinstance(old, Model | Decoding):
            found += [replace(value, **{field.name: new}) for new in variants(old)]
        else:
            found.append(replace(value, **{field.name: OTHER[field.name]}))
    return found


@pytest.mark.parametrize("ask", ASKS, ids=kind)
def test_every_changed_field_gives_another_key(ask):
    changed = variants(ask)
    keys = {key(ask)} | {key(other) for other in changed}
    assert len(keys) == len(changed) + 1


@pytest.mark.parametrize("ask", ASKS, ids=kind)
def test_keys_are_what_they_were_when_the_first_answers_were_stored(ask):
    assert key(ask).hex() == GOLDEN[kind(ask)]


def test_a_fetch_without_a_limit_is_the_question_it_was_before_there_were_limits():
    assert render(FETCH) == '{"key_version":1,"kind":"fetch","uri":"s3://shop/1.jpg","version":"etag"}'
    limited = replace(FETCH, max_pixels=1_000_000)
    assert key(limited).hex() == "0c1c8a1713176b4f2d173947c04367739fe8ebddbcbeff28d45917293dc59d46"


def test_kinds_with_the_same_fields_never_share_a_key():
    assert len({key(ask) for ask in ASKS}) == len(ASKS)


def test_text_that_spells_a_picture_is_not_a_picture():
    asks = [Embed(MODEL, "ab"), Embed(MODEL, Picture("ab")), Embed(MODEL, '{"sha256":"ab"}')]
    assert len({key(ask) for ask in asks}) == 3


def test_parts_are_not_glued_together():
    glued = (Message("user", ("ab",)), Message("user", ("a", "b")), Message("user", ("a",)))
    assert len({key(replace(GENERATE, messages=(message,))) for message in glued}) == 3


texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)
decodings = st.builds(Decoding, st.integers(1, 99), st.sampled_from([0, 0.0, 1, 1.0, 0.5]), st.sampled_from([1, 1.0]))
asks = st.builds(lambda text, decoding: Generate(MODEL, (Message("user", (text,)),), decoding), texts, decodings)


@given(asks, asks)
def test_two_questions_are_equal_exactly_when_their_keys_are(one, two):
    assert (one == two) == (key(one) == key(two)) == (render(one) == render(two))


@given(asks)
def test_a_copy_made_of_other_objects_has_the_same_key(ask):
    copy = Generate(replace(ask.model), tuple(Message(m.role, tuple(m.parts)) for m in ask.messages), ask.decoding)
    assert key(copy) == key(ask)


def test_examples_travel_outside_the_key_and_their_digest_inside():
    more = (*TRAIN.examples, Example(MESSAGES, "no"))
    assert key(replace(TRAIN, examples=more)) == key(replace(TRAIN, validation=more)) == key(TRAIN)
    assert key(replace(TRAIN, digest="other")) != key(TRAIN)
    assert "answer" not in render(TRAIN)


def test_models_have_folder_names_and_pictures_come_from_a_source():
    assert model_of(GENERATE) == "org--name@0123456789ab"
    assert model_of(FETCH) == "source"
