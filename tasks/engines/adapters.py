"""LoRA adapters as blobs: one deterministic tar of `adapter_config.json` and `adapter_model.safetensors`.

The same weights and settings give the same bytes, hence the same sha256: no times, owners or paths of the machine that
trained them. Knows neither peft nor torch.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from mllmsrec_core.ask import canonical
from mllmsrec_core.errors import EngineError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MACHINE = ("base_model_name_or_path", "revision")  # say where the base lay, not what the adapter is


def pack(folder: Path, base: str) -> bytes:
    """The tar of the adapter that peft saved in `folder`; `base` is the slug of the model it belongs to."""
    config = json.loads((folder / CONFIG).read_text())
    config = {name: sorted(value) if name == "target_modules" and isinstance(value, list) else value
              for name, value in config.items() if name not in _MACHINE}  # fmt: skip
    config["base_model_name_or_path"] = base
    content = {CONFIG: canonical(config).encode(), WEIGHTS: (folder / WEIGHTS).read_bytes()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(content):
            entry = tarfile.TarInfo(name)  # mtime 0, owner 0, mode 644
            entry.size = len(content[name])
            tar.addfile(entry, io.BytesIO(content[name]))
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Write the two files of a packed adapter into `folder`. Raises EngineError when it holds anything else."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            names = sorted(tar.getnames())
            if names != [CONFIG, WEIGHTS]:
                raise EngineError(f"an adapter holds {CONFIG} and {WEIGHTS}; this blob holds {names}. Train it again.")
            tar.extractall(folder, filter="data")
    except tarfile.TarError as error:
        raise EngineError(f"this blob is no packed adapter: {error}. Name the sha256 of a trained adapter.") from error
