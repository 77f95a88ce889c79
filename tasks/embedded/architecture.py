"""The shape of the embedded vision-language model: tokenizer, processor, configuration, and how it is written to disk.

A LLaVA of 2 million parameters that the Auto classes load: a CLIP tower for 96-pixel pictures and a Llama decoder.
All widths are multiples of 64, which 4-bit quantisation needs, and heads are 32 wide, which CPU attention kernels want.
Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllmsrec_core.ask import Message
from mllmsrec_core.datasets.demo import SIZE

PATCH = 16
PLACES = (SIZE // PATCH) ** 2  # tokens a picture takes
VOCABULARY = 768
SPECIAL = ("<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<image>", "<bos>")
# Parts stand in the order in which the message has them.
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<image>{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def flat(messages: Iterable[Message]) -> str:
    """The prompt as TEMPLATE and the processor write it, with each picture as its PLACES tokens."""
    text = ""
    for turn in messages:
        parts = (part if isinstance(part, str) else "<image>" * PLACES for part in turn.parts)
        text += f"<|{turn.role}|>{''.join(parts)}<|end|>"
    return text + "<|assistant|>"


def tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. A final s is a token of its own, so that "mug" and "mugs" share theirs; "yes" is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(?<=\w)(?<!\bye)s\b"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<|end|>",
        bos_token="<bos>",
        additional_special_tokens=["<image>"],
        model_max_length=4096,
        padding_side="left",
        chat_template=TEMPLATE,
    )


def processor(words: PreTrainedTokenizerFast) -> LlavaProcessor:
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def model(words: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A fresh model. Text weights start at 0.06: at the usual 0.02 training stood still."""
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.06,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=PLACES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **ids,
    )
    fresh = LlavaForConditionalGeneration(config)
    for name, value in ids.items():
        setattr(fresh.generation_config, name, value)
    return fresh


def save(trained: LlavaForConditionalGeneration, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and processor in bfloat16, with the tower's tensors under the names that vLLM also knows."""
    trained.to(torch.bfloat16).save_pretrained(folder)
    processor(words).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    old, new = "vision_tower.", "vision_tower.vision_model."
    renamed = {name.replace(old, new, 1) if new not in name else name: value for name, value in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})
