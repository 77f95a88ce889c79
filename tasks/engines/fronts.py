"""The processor of a checkpoint without its weights, for engines whose weights live in another process.

Knows nothing of prompts or of who answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mllmsrec_core.ask import Model
from mllmsrec_core.errors import EngineError
from storage.blobs import Blobs
from tasks import torchvision_guard
from tasks.engines.chat import Chat
from tasks.engines.checkpoint import location_of


class Front(NamedTuple):
    """A model's chat, and how many positions its text model has (None: it does not say)."""

    chat: Chat
    positions: int | None


def open_front(model: Model, locations: Mapping[str, str], blobs: Blobs) -> Front:
    """Templates, tokenizer and picture rules exactly as the transformers engine has them.

    Raises EngineError when the checkpoint's files cannot be found or read. Never runs remote code.
    """
    torchvision_guard.install()
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    location, revision = location_of(model, locations)
    shared: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
    try:
        config = AutoConfig.from_pretrained(location, **shared)
        sees = type(config) in AutoModelForImageTextToText._model_mapping
        front = (AutoProcessor if sees else AutoTokenizer).from_pretrained(location, **shared)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise EngineError(
            f"the processor of {model.slug} at {location} cannot be loaded: {type(error).__name__}: {error}. "
            "It must be a whole transformers checkpoint."
        ) from error
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Front(Chat(front, blobs, model.slug), positions)
