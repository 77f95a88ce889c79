"""MLLM-MSR's way as it is worked out here gives the answers that ours gives: it is the same work."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from mllmsrec_core.ask import Choose, Decoding, Generate, Picture
from mllmsrec_core.stages.score import YES_NO
from tasks.bench.original import CAPTION_BATCH, SCORE_BATCH, Original, padded
from tasks.engines.transformers import TransformersEngine

TEXTS = [
    "Is the mug red?",
    "Is it?",
    "The mug, the cap and the lamp: which of them is striped?",
    "no",
    "Yes or no?",
] * 2
assert len(TEXTS) > CAPTION_BATCH > SCORE_BATCH


@pytest.fixture
def found(known):
    return known("llava")


@pytest.fixture
def engine(found, blobs):
    return TransformersEngine(blobs, {found.model.slug: found.location}, batch_size=4, device="cpu")


@pytest.fixture
def original(engine, found):
    loaded = engine._open(found.model)
    return Original(loaded.network, loaded.chat)


@pytest.fixture
def prompts(colours, says):
    pictures = list(colours.values())
    return [says(f"{text} {n}", pictures[n % len(pictures)]) for n, text in enumerate(TEXTS)]


def written(replies):
    return [getattr(reply, "value", "") or "" for reply in replies]


def test_captions_are_ours(engine, original, found, prompts, ask_all):
    asks = [Generate(found.model, messages, Decoding(12)) for messages in prompts]
    theirs = original.captions(asks)
    assert theirs == written(ask_all(engine, asks))
    assert len(set(theirs)) > 1
    assert original.captions(asks, batch=3) == theirs


def test_preference_steps_are_ours_user_by_user(engine, original, found, says, ask_all):
    asks = [Generate(found.model, says(text, str(n)), Decoding(12)) for n, text in enumerate(TEXTS)]
    theirs = original.preferences([asks[:3], asks[3:4], asks[4:]])
    assert theirs == written(ask_all(engine, asks))


def test_scores_are_ours_however_much_is_written_behind_them(engine, original, found, prompts, ask_all):
    asks = [Choose(found.model, messages, YES_NO) for messages in prompts]
    ours = [reply.value["logprobs"] for reply in ask_all(engine, asks)]
    for how in ({}, {"tokens": 1, "batch": 32}, {"least": 30}):
        theirs = original.scores(asks, **how)
        assert [pytest.approx(row, abs=1e-3) for row in ours] == theirs
    assert max(row["yes"] for row in ours) - min(row["yes"] for row in ours) > 0.01, "they could be told apart"


def test_a_picture_is_padded_in_black_around_its_middle():
    made = padded(Image.new("RGB", (2, 4), "white"), (6, 4))
    assert made.size == (6, 4)
    assert [made.getpixel((x, 0))[0] for x in range(6)] == [0, 0, 255, 255, 0, 0]


def test_pictures_of_one_batch_become_equally_large(original, found, blobs, says):
    asks = []
    for shape in ((40, 20), (20, 60)):
        buffer = io.BytesIO()
        Image.new("RGB", shape, "red").save(buffer, "PNG")
        asks.append(Generate(found.model, says(Picture(blobs.put(buffer.getvalue()))), Decoding(1)))
    assert {prompt.pictures[0].size for prompt in original._prompts(asks)} == {(40, 60)}
