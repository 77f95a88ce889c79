"""Reading beginnings once changes what is computed and not what is answered."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mllmsrec_core.ask import Choose, Decoding, Generate, Message, Picture
from tasks.engines.chat import Chat
from tasks.engines.checkpoint import open_checkpoint
from tasks.engines.reader import NO_WORD, Reader
from tasks.engines.transformers import TransformersEngine
from tasks.models import resolve

YES_NO = (("yes", ("yes", "Yes", " yes", " Yes")), ("no", ("no", "No", " no", " No")))
USERS = ("likes red mugs and striped lamps, ", "likes blue caps, " * 3, "")
ITEMS = tuple(text * 3 for text in ("Yes, a striped lamp.", "No, a plain lamp.", "a mug, ", "a mug, red "))


def user_first(shown: tuple[Picture, ...]) -> list[tuple[Message, ...]]:
    return [
        (Message("user", (f"{user}is {item} one of them?", *((shown[n % len(shown)],) if shown else ()))),)
        for user in USERS
        for n, item in enumerate(ITEMS)
    ]


def image_first(shown: tuple[Picture, ...]) -> list[tuple[Message, ...]]:
    return [
        (Message("user", (*((shown[n % len(shown)],) if shown else ()), f"{item} {user} yes?")),)
        for n, item in enumerate(ITEMS)
        for user in USERS
    ]


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Path:
    """A Qwen2.5-VL of 0.2 million parameters: pictures of any size, whose pieces are placed in a plane."""
    from transformers import (
        AutoTokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    folder = tmp_path_factory.mktemp("qwen")
    words = AutoTokenizer.from_pretrained(checkpoints / "llama")
    words.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"]})
    template = words.chat_template.replace("<image>", "<|vision_start|><|image_pad|>")
    shape = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shape, min_pixels=28 * 28, max_pixels=112 * 112),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**shape),
        chat_template=template,
    ).save_pretrained(folder)
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    torch.manual_seed(3)
    text = {
        "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.15, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "fullatt_block_indexes": [1], "window_size": 56, **{k: v for k, v in shape.items() if k != "merge_size"},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], eos_token_id=words.eos_token_id,
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def asked(blobs: Any, ask_all: Any) -> Any:
    """`asked(model, asks, share=...)`: replies, and tokens computed by an engine that has answered them before.

    Before, because a network's first batch is computed both ways to compare them.
    """

    def ask(found: Any, asks: list[Any], **how: Any) -> tuple[list[Any], int]:
        engine = TransformersEngine(blobs, {found.model.slug: found.location}, **how)
        ask_all(engine, asks, close=False)
        before = engine.tokens_computed
        return ask_all(engine, asks), engine.tokens_computed - before

    return ask


@pytest.fixture
def model(checkpoints: Path, qwen: Path) -> Any:
    from tasks import embedded

    places = {"embedded": Path(embedded.__file__).parent / "vlm", "qwen": qwen}
    return lambda name: resolve(str(places.get(name, checkpoints / name)))


@pytest.mark.parametrize("prompts", [user_first, image_first])
@pytest.mark.parametrize(
    ("name", "pictures"),
    [("llama", False), ("llava", False), ("llava", True), ("embedded", True), ("qwen", False), ("qwen", True)],
)
def test_beginnings_are_computed_once_and_answers_stay(
    *, name: str, pictures: bool, prompts: Any, model: Any, asked: Any, colours: Any
) -> None:
    shown = (colours["red"], colours["blue"]) if pictures else ()
    asks = [Choose(model(name).model, messages, YES_NO) for messages in prompts(shown)]
    apart, whole = asked(model(name), asks, share=False)
    together, once = asked(model(name), asks)
    for one, other in zip(together, apart, strict=True):
        assert one.value["logprobs"] == pytest.approx(other.value["logprobs"], abs=1e-4)
        assert one.tokens_in == other.tokens_in
    assert whole == sum(reply.tokens_in for reply in apart)
    assert once < 0.9 * whole


def test_small_batches_change_no_answer(model: Any, asked: Any, colours: Any) -> None:
    asks = [Choose(model("llava").model, messages, YES_NO) for messages in user_first((colours["red"],))]
    for size in (1, 3):
        replies, _ = asked(model("llava"), asks, batch_size=size)
        plain, _ = asked(model("llava"), asks, share=False)
        for one, other in zip(replies, plain, strict=True):
            assert one.value["logprobs"] == pytest.approx(other.value["logprobs"], abs=1e-4)


@pytest.mark.parametrize("name", ["llava", "embedded", "qwen"])
@pytest.mark.parametrize("prompts", [user_first, image_first])
def test_a_picture_that_many_prompts_show_is_encoded_once_and_prompts_are_what_the_processor_makes_of_them(
    *, name: str, prompts: Any, model: Any, blobs: Any, colours: Any
) -> None:
    found = model(name)
    chat = Chat(open_checkpoint(found.model, {found.model.slug: found.location}, "cpu")[0], blobs, name)
    decoded: dict[Any, Any] = {}
    asked = prompts((colours["red"], colours["blue"]))
    made = [chat.prompt(messages, None, decoded=decoded) for messages in asked]
    whole, once = chat.encode(made, None), chat.encode(made, None, once=True)
    assert whole.shown is None and once.shown is not None
    assert len(decoded) == 2 and set(once.shown) == {0, 1}
    assert once.tensors.keys() == whole.tensors.keys()
    for key, value in whole.tensors.items():
        if value.shape == whole.tensors["input_ids"].shape:
            assert torch.equal(once.tensors[key], value)
        else:
            pictures = once.tensors[key].chunk(2)
            assert torch.equal(torch.cat([pictures[place] for place in once.shown]), value)


def test_a_prompt_without_room_fails_alone_where_pictures_are_encoded_once(
    model: Any, blobs: Any, says: Any, colours: Any
) -> None:
    found = model("llava")
    chat = Chat(open_checkpoint(found.model, {found.model.slug: found.location}, "cpu")[0], blobs, "llava")
    decoded: dict[Any, Any] = {}
    texts = ("yes", "x" * 90, "no", "maybe")
    made = [chat.prompt(says(text, colours["red"]), None, decoded=decoded) for text in texts]
    encoded = chat.encode(made, 50, once=True)
    assert (encoded.places, encoded.shown, list(encoded.failed)) == ([0, 2, 3], [0, 0, 0], [1])
    assert len(encoded.tensors["input_ids"]) == 3


def test_prompts_of_several_pictures_are_read_whole(model: Any, asked: Any, says: Any, colours: Any) -> None:
    pairs = [says("look", colours[a], colours[b], "red?") for a in colours for b in colours]
    replies, tokens = asked(model("llava"), [Choose(model("llava").model, pair, YES_NO) for pair in pairs])
    assert tokens == sum(reply.tokens_in for reply in replies)
    assert len({reply.value["mass"] for reply in replies}) == len(pairs)


def test_pieces_of_pictures_keep_their_places_while_a_text_is_written(
    *, model: Any, asked: Any, blobs: Any, says: Any, colours: Any
) -> None:
    found = model("qwen")
    asks = [Generate(found.model, says(colours["red"], "Is the mug red? " * n), Decoding(12)) for n in range(1, 5)]
    replies, _ = asked(found, asks)
    front, network = open_checkpoint(found.model, {found.model.slug: found.location}, "cpu")
    chat = Chat(front, blobs, "qwen")
    tensors = chat.encode([chat.prompt(ask.messages, None) for ask in asks], None).tensors
    with torch.inference_mode():
        rows = network.generate(**tensors, max_new_tokens=12, do_sample=False)[:, tensors["input_ids"].shape[1] :]
    assert [one.value for one in replies] == [text.strip() for text in chat.tokenizer.batch_decode(rows, True)]


def tensors(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


ROWS = [[9, 10, 11, 12, 13, 14, 15, 16, 17, 18, last] for last in (20, 21, 22)]


def test_a_network_whose_state_says_too_little_is_read_whole(checkpoints: Path, caplog: Any) -> None:
    from transformers import LlamaForCausalLM

    class Peeks(LlamaForCausalLM):
        """Its answer also depends on how much it is given at once, as that of a network with a two-way mask does."""

        def forward(  # type: ignore[override]
            self,
            input_ids: Any,
            attention_mask: Any = None,
            position_ids: Any = None,
            past_key_values: Any = None,
            use_cache: Any = None,
            logits_to_keep: int = 0,
            **how: Any,
        ) -> Any:
            state = {"past_key_values": past_key_values, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
            made = super().forward(input_ids, attention_mask, position_ids, **state, **how)
            made.logits[..., 7] += input_ids.shape[1] / 4
            return made

    network: Any = Peeks.from_pretrained(checkpoints / "llama").eval()
    network.generation_config.pad_token_id = 0
    reader = Reader(network, None, "peeks")
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        logits = reader.next_words(tensors(ROWS), [tuple(row) for row in ROWS])
        expected = torch.cat([network(input_ids=torch.tensor([row])).logits[:, -1] for row in ROWS])
    assert torch.allclose(logits, expected, atol=1e-4)
    assert "each prompt is read whole" in caplog.text
    before = reader.tokens
    with torch.inference_mode():
        reader.next_words(tensors(ROWS), [tuple(row) for row in ROWS])
    assert reader.tokens - before == 33

    fresh = Reader(network, None, "peeks")
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        caplog.clear()
        fresh.next_words(tensors(ROWS[:1]), [tuple(ROWS[0])])
        assert not caplog.text, "nothing was handed on yet"
        logits = fresh.next_words(tensors(ROWS), [tuple(row) for row in ROWS])
    assert torch.allclose(logits, expected, atol=1e-4)
    assert "each prompt is read whole" in caplog.text


def test_a_network_with_a_window_is_read_whole(checkpoints: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    reader = Reader(MistralForCausalLM(config).eval(), None, "mistral")
    with torch.inference_mode():
        logits = reader.next_words(tensors(ROWS), [tuple(row) for row in ROWS])
        texts = reader.write(tensors(ROWS), 5, [1], None)
    assert reader.tokens == 33 + 33 + sum(len(text) - 1 for text in texts)
    assert logits.argmax(dim=-1).tolist() == [text[0] for text in texts]


@pytest.fixture
def llama(checkpoints: Path) -> Reader:
    """A reader whose first batch has been compared."""
    from transformers import LlamaForCausalLM

    reader = Reader(LlamaForCausalLM.from_pretrained(checkpoints / "llama").eval(), None, "llama")
    with torch.inference_mode():
        reader.next_words(tensors(ROWS), [tuple(row) for row in ROWS])
    return reader


def test_a_beginning_is_computed_once_to_the_token(llama: Reader) -> None:
    before = llama.tokens
    with torch.inference_mode():
        llama.next_words(tensors(ROWS), [tuple(row) for row in ROWS])
    assert llama.tokens - before == 10 + 3


def test_what_is_not_computed_of_a_batch_is_counted_to_the_token(llama: Reader) -> None:
    before = llama.reused
    with torch.inference_mode():
        llama.next_words(tensors(ROWS), [tuple(row) for row in ROWS])
        assert llama.reused - before == 2 * 10
        llama.next_words(tensors(ROWS), None)
        llama.write(tensors(ROWS), 3, [1], None)
    assert llama.reused - before == 2 * 10


def test_a_prompt_that_is_the_beginning_of_another_is_answered_at_its_own_end(llama: Reader) -> None:
    rows = [ROWS[0], ROWS[0][:9], ROWS[0], ROWS[0] + [30, 31]]
    with torch.inference_mode():
        together = llama.next_words(tensors(rows), [tuple(row) for row in rows])
        alone = torch.cat([llama.next_words(tensors([row]), [tuple(row)]) for row in rows])
    assert torch.allclose(together, alone, atol=1e-4)


def test_a_row_that_has_ended_is_computed_no_further_and_changes_no_other(llama: Reader) -> None:
    rows = [[9, 10, 11, first] for first in range(40, 52)]
    stops = list(range(0, 384, 9))
    before = llama.tokens
    with torch.inference_mode():
        together = llama.write(tensors(rows), 20, stops, None)
        computed = llama.tokens - before
        alone = [llama.write(tensors([row]), 20, stops, None)[0] for row in rows]
    assert together == alone
    assert len({len(text) for text in together}) > 2
    assert all(word not in stops for text in together for word in text[:-1])
    assert computed == sum(len(row) + len(text) - 1 for row, text in zip(rows, together, strict=True))


@pytest.mark.parametrize("plain", [False, True])
def test_a_row_whose_scores_are_no_numbers_ends_there_and_changes_no_other(plain: bool, llama: Reader) -> None:
    rows = [[9, 10, 11, first] for first in range(40, 52)]
    llama.network.generation_config.pad_token_id = 0
    with torch.inference_mode():
        texts = llama.write(tensors(rows), 8, [1], None)
        fatal = texts[0][2]

        def overflow(_: Any, args: Any, how: dict[str, Any], made: Any) -> None:
            made.logits[how["input_ids"][:, -1] == fatal] = math.nan

        llama.network.register_forward_hook(overflow, with_kwargs=True)
        llama._plain = plain
        broken = llama.write(tensors(rows), 8, [1], None)
    expected = [[*text[: text.index(fatal) + 1], NO_WORD] if fatal in text[:-1] else text for text in texts]
    assert broken == expected
    assert any(text[-1] == NO_WORD for text in broken) and any(text[-1] != NO_WORD for text in broken)


def test_what_all_prompts_begin_with_is_computed_once_before_texts_are_written(llama: Reader) -> None:
    stem = list(range(9, 49))
    rows = [[*stem, *range(50, 50 + n)] for n in (1, 4, 2, 7)]
    with torch.inference_mode():
        apart = llama.write(tensors(rows), 12, [1], None)
        llama.write(tensors(rows), 1, [1], None, [tuple(row) for row in rows])  # the first is compared
        before, reused = llama.tokens, llama.reused
        together = llama.write(tensors(rows), 12, [1], None, [tuple(row) for row in rows])
    assert together == apart
    assert llama.tokens - before == 40 + 14 + sum(len(text) - 1 for text in together)
    assert llama.reused - reused == 3 * 40


def test_equal_prompts_are_written_from_their_last_token(llama: Reader) -> None:
    rows = [list(range(9, 60))] * 3
    with torch.inference_mode():
        together = llama.write(tensors(rows), 6, [1], None, [tuple(row) for row in rows])
        assert together == llama.write(tensors(rows), 6, [1], None)
