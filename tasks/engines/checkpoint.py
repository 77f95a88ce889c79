"""Opening a checkpoint as transformers does: processor and weights, in the asked dtype and quantisation.

Only safetensors, never remote code. Knows nothing of prompts, batches or adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mllmsrec_core.ask import Model
from mllmsrec_core.errors import EngineError
from tasks import torchvision_guard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What NF4 leaves alone: the eye and the bridge to the language model lose most by it, and the head reads the answer.
# bitsandbytes matches each from the start of the full module name.
NOT_QUANTISED = [
    r".*vision_tower",
    r".*vision_model",
    r".*visual",
    r".*multi_modal_projector",
    r".*connector",
    "lm_head",
]


def place(device: str) -> str:
    """`auto` as `cuda` where there is one, else `cpu`; other names as they are."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def location_of(model: Model, locations: Mapping[str, str]) -> tuple[str, str | None]:
    """The folder or hub id of a model, and the hub revision (None for a folder)."""
    try:
        location = locations[model.slug]
    except KeyError as error:
        raise EngineError(
            f"no weights are known for {model.slug}; resolve the model by name first. "
            f"Known: {', '.join(locations) or 'none'}."
        ) from error
    if not location:
        raise EngineError(
            f"the weights of {model.slug} are only behind an endpoint; set `settings.engine = openai` with `endpoints`, or "
            "name a folder or a hub id."
        )
    if Path(location).is_dir():
        return location, None
    name, _, revision = location.partition("@")
    return name, revision or model.revision


def nf4(dtype: torch.dtype) -> Any:
    """QLoRA's storage (arXiv 2305.14314): 4-bit NormalFloat with doubly quantised scales, computing in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(NOT_QUANTISED),
    )


def keep_gradients(network: torch.nn.Module) -> None:
    """Stop CPUs with avx512_bf16 from repacking 4-bit layers at the first evaluation.

    Repacked layers give no gradient, silently, and fail when a width is no multiple of 64 (bitsandbytes 0.50).
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in network.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def open_checkpoint(model: Model, locations: Mapping[str, str], device: str, attention: str | None = None) -> Any:
    """(processor or tokenizer, network in eval mode on `device`) of a model, its adapter left aside.

    Raises EngineError when the weights cannot be found, read or held.
    """
    torchvision_guard.install()
    location, revision = location_of(model, locations)
    if model.dtype not in DTYPES:
        raise EngineError(f"dtype {model.dtype!r} of {model.slug} is unknown; use one of {', '.join(DTYPES)}.")
    if model.quantisation not in ("none", "nf4"):
        raise EngineError(f"quantisation {model.quantisation!r} of {model.slug} is unknown; use `none` or `nf4`.")
    try:
        return _open(model, location, revision, place(device), attention)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise EngineError(
            f"{model.slug} at {location} cannot be loaded: {type(error).__name__}: {error}. It must be a whole "
            "transformers checkpoint with safetensors weights that fits the device."
        ) from error


def _open(model: Model, location: str, revision: str | None, device: str, attention: str | None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.utils import logging as notes

    notes.set_verbosity_error()  # what matters of its warnings, missing weights, is an error below
    notes.disable_progress_bar()  # the runner shows progress of rows
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels that nothing here needs
    shared: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
    config = AutoConfig.from_pretrained(location, **shared)
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    kind, front = (AutoModelForImageTextToText, AutoProcessor) if sees else (AutoModelForCausalLM, AutoTokenizer)
    dtype = DTYPES[model.dtype]
    extra: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if model.quantisation == "nf4":
        extra["quantization_config"] = nf4(dtype)
    opened: Any = kind.from_pretrained(
        location,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        output_loading_info=True,
        **extra,
        **shared,
    )
    network, report = opened
    if report["missing_keys"]:
        raise ValueError(f"the file has no weights for {', '.join(sorted(report['missing_keys'])[:3])}, among others")
    if model.quantisation == "nf4":
        keep_gradients(network)
    return front.from_pretrained(location, **shared), network.eval()
