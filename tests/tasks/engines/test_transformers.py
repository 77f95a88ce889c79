"""The transformers engine on tiny random checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mllmsrec_core.ask import Choose, Decoding, Generate, Message, Picture, Reply, Train, digest
from mllmsrec_core.errors import AskError, ContextTooLong, EngineError, ImageUnreadable
from mllmsrec_core.recipe import Recipe
from tasks.engines.chat import Chat
from tasks.engines.checkpoint import open_checkpoint
from tasks.engines.train import TrainEngine
from tasks.engines.transformers import TransformersEngine

YES_NO = (("yes", ("yes", "Yes", " yes", " Yes")), ("no", ("no", "No", " no", " No")))
GREEDY = Decoding(10)


@pytest.fixture(scope="session")
def base(known: Any) -> Any:
    return known("llava")


@pytest.fixture
def engine(blobs: Any, base: Any) -> Any:
    return lambda **how: TransformersEngine(blobs, {base.model.slug: base.location}, **how)


@pytest.fixture
def prompts(says: Any, colours: Any) -> list[tuple[Message, ...]]:
    """Of many lengths, with no, one or two pictures."""
    red, blue = colours["red"], colours["blue"]
    return [
        says(*(("Is the mug red? " * (1 + i % 4) + str(i)), red, blue)[: 1 + i % 3])
        for i in range(18)
    ]  # fmt: skip


def said(outcomes: Any) -> list[str]:
    """Texts, with the class of the failure where a random model wrote none."""
    return [outcome.value if isinstance(outcome, Reply) else type(outcome).__name__ for outcome in outcomes]


def test_greedy_texts_are_the_same_alone_and_in_a_batch(engine: Any, base: Any, prompts: Any, ask_all: Any) -> None:
    asks = [Generate(base.model, prompt, GREEDY) for prompt in prompts]
    together, alone = ask_all(engine(batch_size=16), asks), ask_all(engine(batch_size=1), asks)
    assert said(together) == said(alone)
    assert len(set(said(together))) > 9  # the random model says different things


def test_sampled_texts_depend_on_the_ask_and_its_seed_alone(engine: Any, base: Any, prompts: Any, ask_all: Any) -> None:
    def asks(seed: int) -> list[Generate]:
        return [Generate(base.model, prompt, Decoding(8, temperature=1.0, top_p=0.9, seed=seed)) for prompt in prompts]

    together, alone = ask_all(engine(), asks(1)), ask_all(engine(batch_size=1), asks(1))
    other = ask_all(engine(), asks(2))
    assert said(together) == said(alone)
    assert said(together) != said(other)


def test_choices_are_the_same_alone_and_in_a_batch(engine: Any, base: Any, prompts: Any, ask_all: Any) -> None:
    asks = [Choose(base.model, prompt, YES_NO) for prompt in prompts]
    together, alone = ask_all(engine(), asks), ask_all(engine(batch_size=1), asks)
    for one, other in zip(together, alone, strict=True):
        assert one.value["logprobs"] == pytest.approx(other.value["logprobs"], abs=1e-4)


def test_a_choice_is_the_log_softmax_at_the_last_prompt_position(
    engine: Any, base: Any, says: Any, ask_all: Any
) -> None:
    [reply] = ask_all(engine(), [Choose(base.model, says("Is the mug red?"), YES_NO)])
    front, network = open_checkpoint(base.model, {base.model.slug: base.location}, "cpu")
    words = front.tokenizer
    ids = words("<|user|>Is the mug red?<|end|><|assistant|>", return_tensors="pt").input_ids
    with torch.no_grad():
        row = network(input_ids=ids).logits[0, -1].double().log_softmax(-1)
    expected = {}
    for name, forms in YES_NO:
        first = {words(form, add_special_tokens=False).input_ids[0] for form in forms}
        first = {token for token in first if words.decode([token]).strip()}
        expected[name] = math.log(sum(row[token].exp().item() for token in first))
    assert reply.value["logprobs"] == pytest.approx(expected, abs=1e-4)
    assert reply.value["mass"] == pytest.approx(sum(math.exp(value) for value in expected.values()), abs=1e-5)
    assert reply.tokens_in == ids.shape[1]


def test_pictures_and_their_order_change_the_answer(
    engine: Any, base: Any, says: Any, colours: Any, ask_all: Any
) -> None:
    red, blue = colours["red"], colours["blue"]
    parts = [("what?", red, blue), ("what?", blue, red), (red, "what?", blue)]
    replies = ask_all(engine(), [Choose(base.model, says(*each), YES_NO) for each in parts])
    assert len({reply.value["mass"] for reply in replies}) == 3


def test_tokens_are_counted_without_padding_and_with_pictures(
    engine: Any, base: Any, says: Any, colours: Any, ask_all: Any
) -> None:
    asks = [
        Generate(base.model, says(*parts), GREEDY)
        for parts in (("yes",), ("yes yes yes yes",), ("yes", colours["red"]), ("yes", colours["red"], colours["blue"]))
    ]
    replies = ask_all(engine(), asks)
    short, long, one, two = (reply.tokens_in for reply in replies)
    assert (one, two) == (short + 4, short + 8)  # 32 pixels in patches of 16
    assert long > short
    assert all(1 <= reply.tokens_out <= 10 and reply.seconds > 0 for reply in replies)


@pytest.mark.parametrize("share", [True, False])
def test_counters_add_up_to_what_was_read_and_what_was_computed(
    *, share: bool, engine: Any, base: Any, says: Any, colours: Any, ask_all: Any
) -> None:
    asks = [Choose(base.model, says("Is this one of the mugs? " * 3, colours[one]), YES_NO) for one in ("red", "blue")]
    made = engine(share=share)
    ask_all(made, asks, close=False)  # the first batch that shares is computed twice, to compare
    first, computed = made.counters(), made.tokens_computed
    replies = ask_all(made, [*asks, *(Choose(base.model, ask.messages, YES_NO[::-1]) for ask in asks)], close=False)
    counted = {name: n - first[name] for name, n in made.counters().items()}
    assert counted["images"] == 4
    assert counted["prompt_tokens"] == sum(reply.tokens_in for reply in replies)
    assert counted["reused_tokens"] == counted["prompt_tokens"] - (made.tokens_computed - computed)
    assert (counted["reused_tokens"] > 0.3 * counted["prompt_tokens"]) == share
    before = made.counters()
    ask_all(made, [Generate(base.model, asks[0].messages, GREEDY)])
    after = made.counters()  # the models are freed
    assert after["prompt_tokens"] - before["prompt_tokens"] == replies[0].tokens_in
    assert (after["reused_tokens"], after["images"]) == (before["reused_tokens"], before["images"] + 1)


def test_attention_is_that_of_torch_unless_told_otherwise(base: Any) -> None:
    _, network = open_checkpoint(base.model, {base.model.slug: base.location}, "cpu")
    assert network.config._attn_implementation == "sdpa"


def test_a_picture_that_cannot_be_decoded_fails_alone(
    *, engine: Any, base: Any, blobs: Any, says: Any, colours: Any, ask_all: Any
) -> None:
    broken = Picture(blobs.put(b"no picture"))
    asks = [Choose(base.model, says("red?", picture), YES_NO) for picture in (colours["red"], broken, colours["blue"])]
    first, bad, last = ask_all(engine(), asks)
    assert isinstance(bad, ImageUnreadable)
    assert isinstance(first, Reply) and isinstance(last, Reply)


def test_a_prompt_without_room_for_its_answer_fails_alone(engine: Any, base: Any, says: Any, ask_all: Any) -> None:
    asks = [Generate(base.model, says(text), GREEDY) for text in ("yes", "x" * 244, "no", "x" * 243)]
    first, bad, last, fits = ask_all(engine(), asks)  # 256 positions, 3 of them special tokens, 10 for the answer
    assert isinstance(bad, ContextTooLong) and "247 tokens" in str(bad)
    assert isinstance(first, Reply) and isinstance(last, Reply)
    assert fits.tokens_in == 246


def test_text_that_writes_a_picture_token_fails_alone(engine: Any, base: Any, says: Any, ask_all: Any) -> None:
    bad, good = ask_all(engine(), [Choose(base.model, says(text), YES_NO) for text in ("<image>", "image")])
    assert "stands for a picture" in str(bad)
    assert isinstance(good, Reply)


def test_choices_that_begin_alike_are_an_engine_error(engine: Any, base: Any, says: Any, ask_all: Any) -> None:
    [error] = ask_all(engine(), [Choose(base.model, says("red?"), (("yes", ("yes",)), ("yep", ("yes!",))))])
    assert isinstance(error, EngineError)
    assert "both begin with" in str(error)


def test_max_pixels_changes_what_the_model_sees(engine: Any, base: Any, blobs: Any, says: Any, ask_all: Any) -> None:
    import io

    from PIL import Image

    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    picture = Picture(blobs.put(buffer.getvalue()))
    models = [replace(base.model, max_pixels=limit) for limit in (None, 64 * 64, 100)]
    full, same, small = ask_all(engine(), [Choose(model, says("red?", picture), YES_NO) for model in models])
    assert full.value["mass"] == pytest.approx(same.value["mass"])
    assert abs(full.value["mass"] - small.value["mass"]) > 1e-4


def test_an_adapter_changes_answers_and_taking_it_off_restores_them(
    *, engine: Any, base: Any, blobs: Any, prompts: Any, says: Any, ask_all: Any, tmp_path: Any
) -> None:
    from mllmsrec_core.ask import Example

    examples = [Example(says(f"red? {i}"), "yes") for i in range(16)]
    recipe = Recipe(strategy="lora", rank=4, lr=1e-2, epochs=2, batch_size=8).to_json()
    trainer = TrainEngine(blobs, {base.model.slug: base.location}, scratch=str(tmp_path / "scratch"))
    [trained] = ask_all(trainer, [Train(base.model, recipe, digest("yes"), examples)])
    tuned = replace(base.model, adapter=trained.value["sha256"])
    ask = prompts[0]
    worn = engine()
    before, on, off = (
        ask_all(worn, [Choose(model, ask, YES_NO)], close=False)[0] for model in (base.model, tuned, base.model)
    )
    assert on.value["logprobs"]["yes"] > before.value["logprobs"]["yes"] + 0.1
    assert off.value == before.value
    [together_base, together_on] = ask_all(worn, [Choose(model, ask, YES_NO) for model in (base.model, tuned)])
    assert (together_base.value, together_on.value) == (before.value, on.value)


def test_a_text_only_model_answers_texts_and_refuses_pictures(
    known: Any, blobs: Any, says: Any, colours: Any, ask_all: Any
) -> None:
    words = known("llama")
    engine = TransformersEngine(blobs, {words.model.slug: words.location})
    [reply] = ask_all(engine, [Choose(words.model, says("red?"), YES_NO)], close=False)
    assert 0 < reply.value["mass"] < 1
    [error] = ask_all(engine, [Choose(words.model, says("red?", colours["red"]), YES_NO)])
    assert isinstance(error, EngineError) and "reads no pictures" in str(error)


def test_four_bit_weights_answer_close_to_full_ones(known: Any, blobs: Any, prompts: Any, ask_all: Any) -> None:
    full, small = known("llava"), known("llava", quantisation="nf4")
    engine = TransformersEngine(blobs, {full.model.slug: full.location})
    asks = [Choose(each.model, prompt, YES_NO) for each in (full, small) for prompt in prompts[:6]]
    replies = ask_all(engine, asks)
    gaps = [abs(a.value["logprobs"]["yes"] - b.value["logprobs"]["yes"]) for a, b in zip(replies[:6], replies[6:])]  # noqa: B905
    assert 0 < max(gaps) < 3


def test_weights_that_are_not_there_are_an_engine_error_with_a_remedy(
    blobs: Any, base: Any, says: Any, ask_all: Any, tmp_path: Any
) -> None:
    for locations, words in (({}, "resolve the model"), ({base.model.slug: str(tmp_path)}, "cannot be loaded")):
        [error] = ask_all(TransformersEngine(blobs, locations), [Choose(base.model, says("red?"), YES_NO)])
        assert isinstance(error, EngineError) and words in str(error)


def test_surface_forms_of_blanks_only_are_left_out(base: Any, blobs: Any) -> None:
    front, _ = open_checkpoint(base.model, {base.model.slug: base.location}, "cpu")
    chat = Chat(front, blobs, "llava")
    rendered = chat.render((Message("user", ("red?",)),))
    found = chat.first_tokens(rendered, (("tab", ("yes",)), ("other", (" \u00e9", "no"))))
    assert all(chat.tokenizer.decode([token]).strip() for tokens in found.values() for token in tokens)


def test_a_checkpoint_that_lacks_weights_is_an_engine_error(
    *, base: Any, blobs: Any, says: Any, ask_all: Any, tmp_path: Any
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(base.location, tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = TransformersEngine(blobs, {base.model.slug: str(folder)})
    [error] = ask_all(engine, [Choose(base.model, says("red?"), YES_NO)])
    assert isinstance(error, EngineError) and "no weights for" in str(error)


def test_probabilities_that_are_none_fail_their_rows_and_are_never_a_success(
    *, base: Any, blobs: Any, says: Any, ask_all: Any, tmp_path: Any
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(base.location, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight") and "language" in name)
    save_file(weights | {name: weights[name] * math.nan}, folder / "model.safetensors", metadata={"format": "pt"})
    engine = TransformersEngine(blobs, {base.model.slug: str(folder)})
    asks = [Choose(base.model, says(text), YES_NO) for text in ("red?", "blue?")]
    drawn = Decoding(10, temperature=1.0, top_p=0.9)
    for error in ask_all(engine, [*asks, *(Generate(base.model, says("red?"), how) for how in (GREEDY, drawn))]):
        assert type(error) is AskError and "no finite probabilities in float32" in str(error)
        assert "bfloat16" in str(error) and "retry" in str(error)
