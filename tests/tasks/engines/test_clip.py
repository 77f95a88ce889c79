"""The CLIP engine on a tiny random checkpoint."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mllmsrec_core.ask import Embed, Picture, Reply
from mllmsrec_core.errors import AskError, ContextTooLong, EngineError, ImageUnreadable
from tasks.engines.clip import WEIGHTS, ClipEngine


@pytest.fixture(scope="session")
def base(known: Any) -> Any:
    return known("clip")


@pytest.fixture
def engine(blobs: Any, base: Any) -> Any:
    return lambda **how: ClipEngine(blobs, {base.model.slug: base.location}, **how)


def test_vectors_have_norm_one(engine: Any, base: Any, colours: Any, ask_all: Any) -> None:
    replies = ask_all(engine(), [Embed(base.model, content) for content in ("a red mug", colours["red"])])
    for reply in replies:
        assert len(reply.value) == 32
        assert math.hypot(*reply.value) == pytest.approx(1, abs=1e-5)


def test_texts_and_pictures_keep_their_order(engine: Any, base: Any, colours: Any, ask_all: Any) -> None:
    contents = ["a mug", colours["red"], "a lamp", colours["blue"], "a cap", colours["green"], "a mug"]
    asks = [Embed(base.model, content) for content in contents]
    together, alone = ask_all(engine(), asks), ask_all(engine(batch_size=1), asks)
    for one, other in zip(together, alone, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5)
    assert len({tuple(round(x, 4) for x in reply.value) for reply in together}) == 6  # "a mug" stands twice


def test_a_text_longer_than_the_context_fails_alone_and_is_never_cut(engine: Any, base: Any, ask_all: Any) -> None:
    fits, too_long = "x" * 14, "x" * 15  # a context of 16, start and end included
    first, second = ask_all(engine(), [Embed(base.model, text) for text in (fits, too_long)])
    assert isinstance(first, Reply) and first.tokens_in == 16
    assert isinstance(second, ContextTooLong) and "17 tokens" in str(second)


def test_a_picture_that_cannot_be_decoded_fails_alone(
    engine: Any, base: Any, blobs: Any, colours: Any, ask_all: Any
) -> None:
    broken = Picture(blobs.put(b"no picture"))
    bad, good = ask_all(engine(), [Embed(base.model, broken), Embed(base.model, colours["red"])])
    assert isinstance(bad, ImageUnreadable)
    assert isinstance(good, Reply)


def test_a_folder_without_safetensors_weights_is_refused(blobs: Any, base: Any, ask_all: Any, tmp_path: Any) -> None:
    engine = ClipEngine(blobs, {base.model.slug: str(tmp_path)})
    [error] = ask_all(engine, [Embed(base.model, "a mug")])
    assert isinstance(error, EngineError) and "open_clip_model.safetensors" in str(error)


def test_a_vector_that_is_none_fails_its_row_and_is_never_a_success(
    blobs: Any, base: Any, colours: Any, ask_all: Any, tmp_path: Any
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(base.location, tmp_path / "broken")
    weights = load_file(folder / WEIGHTS)
    save_file(
        {name: one * math.nan if name == "visual.proj" else one for name, one in weights.items()}, folder / WEIGHTS
    )
    asks = [Embed(base.model, content) for content in ("a red mug", colours["red"])]
    text, picture = ask_all(ClipEngine(blobs, {base.model.slug: str(folder)}), asks)
    assert isinstance(text, Reply)
    assert type(picture) is AskError and "no finite vector in float32" in str(picture) and "retry" in str(picture)
