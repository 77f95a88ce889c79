"""The embedded CLIP: which caption belongs to which picture, trained from nothing and written for open_clip.

Every picture is held against one caption of every look at once, so each batch has all the captions that are wrong in a
single word; those are what an audit must catch. Captions of held-out looks are never seen, not even as wrong ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from mllmsrec_core.datasets import demo
from tasks.embedded import learn

WIDTH = 128
CONTEXT = 64  # tokens; a caption has about ten, a summary with its brand about twenty
SPECIAL = ("<pad>", "<s>", "</s>")
MODEL = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "image_size": demo.SIZE,
        "patch_size": 16,
        "layers": 4,
        "width": WIDTH,
        "head_width": 32,
        "pool_type": "avg",
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": 0,  # known once the tokenizer is trained
        "hf_tokenizer_name": ".",  # any name: the tokenizer is read from the folder itself
        "width": WIDTH,
        "heads": 4,
        "layers": 3,
        "pool_type": "eos",
        "eos_id": SPECIAL.index("</s>"),
        "pad_id": SPECIAL.index("<pad>"),
    },
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def captions(rng: random.Random) -> dict[tuple[str, ...], str]:
    """One sentence for each look that is not held out: mostly its caption, else the summary of an invented product."""
    looks = (dict(zip(demo.ATTRIBUTES, values, strict=True)) for values in product(*demo.ATTRIBUTES.values()))
    said = {}
    for look in looks:
        if not demo.held_out(look):
            title = f"{demo.brand(rng, True)} {rng.choice(demo.STYLES)}"
            told = demo.caption_text(look) if rng.random() < 0.7 else demo.summary_text(title, look)
            said[tuple(look.values())] = told
    return said


def tokenizer() -> PreTrainedTokenizerFast:
    rng = random.Random("clip words")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for _ in range(30) for text in captions(rng).values()), trainer)
    ends = [(token, SPECIAL.index(token)) for token in SPECIAL[1:]]
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def build(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Tokenizer and configuration written to `folder`, and the untrained model open_clip makes of them."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    words.save_pretrained(folder)
    shape = MODEL | {"text_cfg": MODEL["text_cfg"] | {"vocab_size": len(words)}}
    config = {"model_cfg": shape, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", load_weights=False)
    return model, words


def encode(model: nn.Module, ids: Tensor) -> Tensor:
    """`model.encode_text` for ids shorter than the context: the mask is causal, so padding would only take time."""
    length = ids.shape[1]
    hidden = model.token_embedding(ids) + model.positional_embedding[:length]
    hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))
    ends = (ids == SPECIAL.index("</s>")).int().argmax(-1)
    return hidden[torch.arange(len(ids)), ends] @ model.text_projection


def match(
    model: nn.Module,
    words: PreTrainedTokenizerFast,
    products: Sequence[demo.Item],
    images: Tensor,
    *,
    steps: int,
    size: int,
) -> None:
    """Train both towers to pick, for each picture, its own among the captions of all looks."""
    rng, progress = random.Random("clip lessons"), learn.Progress("match")
    optimiser = learn.Optimiser(model.named_parameters(), steps, muon=0.01, adam=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(products), (size,))
        said = captions(rng)
        numbers = {look: number for number, look in enumerate(said)}
        wanted = torch.tensor([numbers[tuple(products[row].look.values())] for row in rows.tolist()])
        ids = words(list(said.values()), padding=True, return_tensors="pt")["input_ids"]
        with torch.autocast("cpu", torch.bfloat16):
            seen, told = model.encode_image(learn.moved(images[rows])), encode(model, ids)
        seen, told = (functional.normalize(value.float(), dim=-1) for value in (seen, told))
        logits = model.logit_scale.exp().clamp(max=100) * seen @ told.T
        loss = functional.cross_entropy(logits, wanted, label_smoothing=0.02)
        optimiser.step(loss)
        progress.see({"loss": loss.item(), "right": (logits.argmax(-1) == wanted).float().mean().item()})


def train(
    products: Sequence[demo.Item], images: Tensor, scratch: Path, folder: Path, steps: Callable[[int], int]
) -> None:
    """First the image tower alone on attributes, then both; `scratch` keeps the first, `folder` gets the result."""
    model, words = build(folder)
    model.train()
    kept = scratch / "clip-tower"
    if not kept.exists():
        learn.tower(model.visual, WIDTH, products, images, steps=steps(1500), size=64)
        torch.save(model.visual.state_dict(), kept)
    model.visual.load_state_dict(torch.load(kept))
    match(model, words, products, images, steps=steps(400), size=64)
    tensors = {name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
