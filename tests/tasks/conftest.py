"""Tiny random checkpoints that load through the same calls as real ones, made once per test session."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllmsrec_core.ask import Ask, Message, Picture, Reply
from storage.blobs import Blobs
from storage.files import Files
from tasks import torchvision_guard
from tasks.models import Resolved, resolve

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torchvision_guard.install()

PIXELS, PATCH = 32, 16
SPECIAL = ["<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<image>", "<bos>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "Is the mug red? yes",
    "Is the cap blue? no",
    "Yes, a striped lamp.",
    "No, a plain lamp.",
    "yes no Yes No",
] * 20


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<|end|>", bos_token="<bos>",
        additional_special_tokens=["<image>"], chat_template=TEMPLATE,
    )  # fmt: skip


def llama(words: Any, positions: int = 256) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=positions, tie_word_embeddings=True,
        initializer_range=0.15, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip


def save_llava(folder: Path, seed: int) -> None:
    """A LLaVA of 0.2 million parameters; four tokens a picture."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(seed)
    words = tokenizer()
    look = CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    front = LlavaProcessor(
        image_processor=look, tokenizer=words, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=TEMPLATE,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=PIXELS,
        patch_size=PATCH, projection_dim=64,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision.to_dict(), text_config=llama(words).to_dict(), vision_feature_layer=-1,
        image_token_index=words.convert_tokens_to_ids("<image>"), image_seq_length=(PIXELS // PATCH) ** 2,
        vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip
    network = LlavaForConditionalGeneration(config)
    assert network.generation_config is not None
    network.generation_config.eos_token_id = words.eos_token_id
    network.save_pretrained(folder)
    front.save_pretrained(folder)


def save_llama(folder: Path) -> None:
    """A text-only model with the same tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    words = tokenizer()
    LlamaForCausalLM(llama(words)).save_pretrained(folder)
    words.save_pretrained(folder)


def save_clip(folder: Path) -> None:
    """An open_clip model with a context of 16 tokens."""
    import open_clip
    import torch
    from safetensors.torch import save_file
    from tokenizers import processors

    folder.mkdir()
    words = tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <|end|>", special_tokens=[("<bos>", 6), ("<|end|>", 4)]
    )
    words.save_pretrained(folder)
    text = {"context_length": 16, "vocab_size": len(words), "hf_tokenizer_name": ".", "width": 64, "heads": 2,
            "layers": 1, "pool_type": "eos", "eos_id": 4, "pad_id": 0}  # fmt: skip
    vision = {"image_size": PIXELS, "layers": 1, "width": 64, "head_width": 32, "patch_size": PATCH}
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(2)
    network: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices are fastest on one thread, and the machine is shared."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llava`, `llava2` (other weights), `llama` and `clip`."""
    root = tmp_path_factory.mktemp("checkpoints")
    save_llava(root / "llava", seed=0)
    save_llava(root / "llava2", seed=5)
    save_llama(root / "llama")
    save_clip(root / "clip")
    return root


@pytest.fixture(scope="session")
def known(checkpoints: Path) -> Callable[..., Resolved]:
    """`known("llava", dtype=...)`: a tiny checkpoint, resolved."""
    return lambda name, **how: resolve(str(checkpoints / name), **how)


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(Files(str(tmp_path / "store")))


def png(colour: str, size: tuple[int, int] = (40, 40), **save: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG", **save)
    return buffer.getvalue()


@pytest.fixture
def colours(blobs: Blobs) -> dict[str, Picture]:
    """Plain pictures by colour, kept as blobs."""
    return {colour: Picture(blobs.put(png(colour))) for colour in ("red", "green", "blue", "white")}


@pytest.fixture(scope="session")
def ask_all() -> Callable[..., list[Reply | Exception]]:
    """`ask_all(engine, asks)`: all at once, answers and exceptions in order, then the engine is closed."""

    def run(engine: Any, asks: Sequence[Ask], close: bool = True) -> list[Reply | Exception]:
        async def main() -> list[Any]:
            outcomes = await asyncio.gather(*(engine.answer(ask) for ask in asks), return_exceptions=True)
            if close:
                await engine.close()
            return outcomes

        return asyncio.run(main())

    return run


@pytest.fixture(scope="session")
def says() -> Callable[..., tuple[Message, ...]]:
    """`says("text", picture, ...)`: one user turn of these parts."""
    return lambda *parts: (Message("user", parts),)
