"""The train engine: real LoRA and QLoRA of a tiny random checkpoint on a toy rule."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mllmsrec_core.ask import Example, Reply, Train, digest
from mllmsrec_core.errors import ContextTooLong, EngineError, ImageUnreadable
from mllmsrec_core.recipe import Recipe
from tasks.engines.chat import Chat
from tasks.engines.checkpoint import open_checkpoint
from tasks.engines.train import TrainEngine, _Collator

BRISK: dict[str, Any] = {"rank": 4, "alpha": 8, "lr": 5e-3, "batch_size": 8, "epochs": 2}


@pytest.fixture(scope="session")
def base(known: Any) -> Any:
    return known("llava")


@pytest.fixture
def rule(says: Any, colours: Any) -> list[Example]:
    """Red is yes, blue is no; every third example shows the colour too."""
    return [
        Example(says(f"Is it {colour}? {i}", *([colours[colour]] if i % 3 == 0 else [])), answer)
        for i in range(24)
        for colour, answer in (("red", "yes"), ("blue", "no"))
    ]


@pytest.fixture
def engine(blobs: Any, base: Any, tmp_path: Path) -> Any:
    scratch = str(tmp_path / "scratch")
    return lambda **how: TrainEngine(blobs, {base.model.slug: base.location}, scratch=scratch, **how)


def train(base: Any, examples: Sequence[Example], validation: Sequence[Example] = (), **recipe: Any) -> Train:
    text = Recipe(**{**BRISK, **recipe}).to_json()
    return Train(base.model, text, digest(len(examples)), examples, validation)


@pytest.mark.parametrize("strategy", ["lora", "qlora"])
def test_the_loss_falls_on_a_toy_rule(
    *, strategy: str, engine: Any, base: Any, rule: Any, ask_all: Any, tmp_path: Path
) -> None:
    [reply] = ask_all(engine(), [train(base, rule[:40], rule[40:], strategy=strategy, lr=1e-2, epochs=4)])
    curve = reply.value["curves"]
    losses = [point["loss"] for point in curve if "loss" in point]
    assert losses[-1] < losses[0] / 3
    assert {"step", "loss", "lr"} <= curve[0].keys()
    measured = [point["val_loss"] for point in curve if "val_loss" in point]
    assert len(measured) == 4 and measured[-1] < measured[0]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_tokens_trained_on_are_counted_without_padding(
    engine: Any, base: Any, blobs: Any, rule: Any, ask_all: Any
) -> None:
    [reply] = ask_all(engine(), [train(base, rule, strategy="lora")])
    front, _ = open_checkpoint(base.model, {base.model.slug: base.location}, "cpu")
    chat = Chat(front, blobs, "llava")
    once = sum(len(chat.ids(chat.render(example.messages, example.answer))) for example in rule)
    shown = sum(len(example.messages[0].parts) - 1 for example in rule)
    assert reply.tokens_in == 2 * (once + 3 * shown)  # two epochs; the tokenizer counts one of a picture's four tokens


def test_the_loss_is_on_the_answer_only(base: Any, blobs: Any, rule: Any) -> None:
    front, network = open_checkpoint(base.model, {base.model.slug: base.location}, "cpu")
    batch = _Collator(Chat(front, blobs, "llava"), train(base, rule), network)([{"place": place} for place in range(4)])
    learnt = [row[row != -100].tolist() for row in batch["labels"]]
    assert [front.tokenizer.decode(row) for row in learnt] == ["yes<|end|>", "no<|end|>"] * 2
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


def test_the_same_ask_gives_the_same_adapter(engine: Any, base: Any, rule: Any, ask_all: Any) -> None:
    ask = train(base, rule[:16], strategy="lora")
    [one], [two] = ask_all(engine(), [ask]), ask_all(engine(), [ask])
    [other] = ask_all(engine(), [train(base, rule[:16], strategy="lora", seed=1)])
    assert one.value == two.value
    assert one.value["sha256"] != other.value["sha256"]


def test_training_that_was_cancelled_goes_on_from_its_checkpoint_to_the_same_adapter(
    engine: Any, base: Any, rule: Any, ask_all: Any, tmp_path: Path
) -> None:
    ask = train(base, rule, strategy="lora", epochs=3)  # 18 steps, 6 an epoch

    async def cancelled() -> None:
        trainer = engine(checkpoint_every=4)
        work = asyncio.create_task(trainer.answer(ask))
        while not list((tmp_path / "scratch").glob("*/checkpoint-*")):
            await asyncio.sleep(0.005)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(cancelled())
    [left] = (tmp_path / "scratch").iterdir()
    steps = [int(path.name.rpartition("-")[2]) for path in left.glob("checkpoint-*")]
    assert max(steps) < 18
    (left / "checkpoint-17").mkdir()  # killed while it was written
    [resumed] = ask_all(engine(checkpoint_every=4), [ask])
    assert not left.exists()
    [straight] = ask_all(engine(checkpoint_every=100), [ask])
    assert resumed.value["sha256"] == straight.value["sha256"]
    assert resumed.tokens_in == straight.tokens_in


def test_the_adapter_is_a_tar_of_two_files_that_names_no_folder(
    engine: Any, base: Any, rule: Any, blobs: Any, ask_all: Any
) -> None:
    [reply] = ask_all(engine(), [train(base, rule[:8], epochs=1, strategy="lora")])
    content = blobs.get(reply.value["sha256"])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == ["adapter_config.json", "adapter_model.safetensors"]
        file = tar.extractfile("adapter_config.json")
        assert file is not None
        config = json.load(file)
    assert config["base_model_name_or_path"] == base.model.slug
    assert base.location.encode() not in content


def test_an_example_that_is_too_long_or_has_a_broken_picture_is_named(
    *, engine: Any, base: Any, blobs: Any, says: Any, rule: Any, ask_all: Any
) -> None:
    from mllmsrec_core.ask import Picture

    long = Example(says("x" * 300), "yes")
    broken = Example(says("red?", Picture(blobs.put(b"no picture"))), "yes")
    for bad, kind in ((long, ContextTooLong), (broken, ImageUnreadable)):
        [error] = ask_all(engine(), [train(base, [*rule[:3], bad], strategy="lora")])
        assert isinstance(error, kind) and "example 3" in str(error)


def test_an_empty_training_set_is_an_engine_error(engine: Any, base: Any, ask_all: Any) -> None:
    [error] = ask_all(engine(), [train(base, [])])
    assert isinstance(error, EngineError) and "empty" in str(error)


def test_bfloat16_trains_in_four_bits(known: Any, blobs: Any, rule: Any, ask_all: Any, tmp_path: Path) -> None:
    half = known("llava", dtype="bfloat16")
    engine = TrainEngine(blobs, {half.model.slug: half.location}, scratch=str(tmp_path / "scratch"))
    [reply] = ask_all(engine, [train(half, rule[:32], lr=1e-2, epochs=4)])
    assert isinstance(reply, Reply)
    assert reply.value["curves"][-1]["loss"] < reply.value["curves"][0]["loss"] / 2


def test_training_that_diverges_is_an_engine_error(engine: Any, base: Any, rule: Any, ask_all: Any) -> None:
    [error] = ask_all(engine(), [train(base, rule[:16], strategy="lora", lr=1e30, warmup=0.0)])
    assert isinstance(error, EngineError) and "diverged" in str(error)
