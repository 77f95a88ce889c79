"""The CLIP engine: Embed for texts and pictures, with any open_clip checkpoint.

Vectors have norm 1, so a dot product of two is their cosine. Knows nothing of claims, thresholds or retrieval.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mllmsrec_core.ask import Ask, Embed, Model, Reply, kind
from mllmsrec_core.errors import AskError, ContextTooLong, EngineError, MllmsrecError
from storage.blobs import Blobs
from tasks import torchvision_guard
from tasks.engines.answers import no_numbers
from tasks.engines.batching import Batcher, Outcome
from tasks.engines.checkpoint import DTYPES, location_of, place
from tasks.engines.pictures import decode

BATCH_SIZE = 64
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
_PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, eq=False)
class _Clip:
    network: Any
    look: Any  # a picture to its tensor
    words: Any  # texts to token ids
    device: str
    dtype: torch.dtype


class ClipEngine:
    """Answers Embed. `locations` maps a model's slug to a folder with an open_clip checkpoint, or to a hub id.

    A text that is longer than the model's context is ContextTooLong, where open_clip itself would cut it in silence.
    """

    answers: frozenset[type[Ask]] = frozenset({Embed})
    name = "clip"

    def __init__(
        self, blobs: Blobs, locations: Mapping[str, str], *, batch_size: int = BATCH_SIZE, device: str = "auto"
    ) -> None:
        self.blobs, self.locations, self.device = blobs, locations, device
        self._loaded: dict[Model, _Clip] = {}
        self._batches = Batcher[Embed](self.name, batch_size, _group, _size, self._run)

    async def answer(self, ask: Ask) -> Reply:
        """The unit vector of a text or a picture, as a list of floats."""
        if not isinstance(ask, Embed):
            raise EngineError(f"{self.name} answers embed, not {kind(ask)}; name another engine for it.")
        return await self._batches.submit(ask)

    async def close(self) -> None:
        """Free the models."""
        await self._batches.close(self._free)

    def _free(self) -> None:
        self._loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _open(self, model: Model) -> _Clip:
        weights = replace(model, max_pixels=None)
        if weights not in self._loaded:
            self._loaded[weights] = open_clip_checkpoint(weights, self.locations, self.device)
        return self._loaded[weights]

    def _run(self, asks: list[Embed]) -> list[Outcome]:
        started = time.perf_counter()
        clip = self._open(asks[0].model)
        outcomes: dict[int, Outcome] = {}
        rows: dict[int, torch.Tensor] = {}
        counts: dict[int, int] = {}
        for place_, ask in enumerate(asks):
            try:
                rows[place_], counts[place_] = self._row(clip, ask)
            except MllmsrecError as error:
                outcomes[place_] = error
        if rows:
            vectors = _encode(clip, torch.stack(list(rows.values())), isinstance(asks[0].content, str))
            seconds = (time.perf_counter() - started) / len(asks)
            for place_, vector in zip(rows, vectors, strict=True):
                if all(map(math.isfinite, vector)):
                    outcomes[place_] = Reply(vector, tokens_in=counts[place_], seconds=seconds, engine=self.name)
                else:
                    outcomes[place_] = AskError(f"{self.name}: {no_numbers('vector', asks[place_].model)}")
        return [outcomes[place_] for place_ in range(len(asks))]

    def _row(self, clip: _Clip, ask: Embed) -> tuple[torch.Tensor, int]:
        """What the tower reads for this Ask, and how many text tokens that is."""
        if isinstance(ask.content, str):
            count, room = _length(clip.words, ask.content), clip.words.context_length
            if count > room:
                raise ContextTooLong(f"the text has {count} tokens, and {ask.model.slug} reads {room}")
            return clip.words([ask.content])[0], count
        return clip.look(decode(self.blobs.get(ask.content.sha256), ask.model.max_pixels)), 0


def _group(ask: Embed) -> Hashable:
    return ask.model, isinstance(ask.content, str)


def _size(ask: Embed) -> int:
    """Rows of one group are all padded to the same length, so any order will do."""
    return 0


def _length(words: Any, text: str) -> int:
    """Tokens of `text` with start and end, not cut."""
    inner = getattr(words, "tokenizer", None)
    return len(inner(words.clean_fn(text))["input_ids"]) if inner else len(words.encode(text)) + 2


@torch.inference_mode()
def _encode(clip: _Clip, rows: torch.Tensor, text: bool) -> list[list[float]]:
    """One vector of norm 1 per row, normalised in float32 whatever the weights are."""
    if text:
        vectors = clip.network.encode_text(rows.to(clip.device))
    else:
        vectors = clip.network.encode_image(rows.to(clip.device, clip.dtype))
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().tolist()


def open_clip_checkpoint(model: Model, locations: Mapping[str, str], device: str) -> _Clip:
    """An open_clip checkpoint with safetensors weights. Raises EngineError when it cannot be loaded."""
    torchvision_guard.install()
    import open_clip

    if model.dtype not in _PRECISION or model.quantisation != "none" or model.adapter:
        raise EngineError(f"{model.slug}: CLIP takes dtype {', '.join(_PRECISION)}, no quantisation and no adapter.")
    folder = _folder(*location_of(model, locations))
    device = place(device)
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise EngineError(
            f"{model.slug}: {folder} holds no {CONFIG} with {WEIGHTS}; other weight formats are not read."
        )
    try:
        name = f"local-dir:{folder}"
        # open_clip prefers WEIGHTS to every other file in the folder, so no pickle is ever opened.
        precision = _PRECISION[model.dtype]
        opened: Any = open_clip.create_model_from_pretrained(name, device=device, precision=precision)
        network, look = opened
        return _Clip(network.eval(), look, open_clip.get_tokenizer(name), device, DTYPES[model.dtype])
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise EngineError(f"{model.slug} at {folder} cannot be loaded by open_clip: {error}") from error


def _folder(location: str, revision: str | None) -> Path:
    """The local folder of a checkpoint; a hub id is fetched at its exact revision, or found in the hub's cache."""
    if revision is None:
        return Path(location)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(location, revision=revision, allow_patterns=["*.json", "*.txt", "*.model", WEIGHTS])
        )
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{location}@{revision} cannot be fetched: {error}. Use a local folder when offline."
        ) from error
