"""LoRA adapters as blobs: one deterministic tar of `adapter_config.json` and `adapter_model.safetensors`.

The same weights and settings give the same bytes, hence the same sha256: no times, owners or paths of the machine that
trained them. Knows neither peft nor torch.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from uuid import uuid4

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
    """Write the two files of a packed adapter into `folder`, named by the adapter's sha256; once it is there it is whole.

    A whole one is left untouched, whoever wrote it: servers may be reading it. Raises EngineError when the blob holds
    anything else, or the folder something of another size, and OSError where the folder cannot be written.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            sizes = {entry.name: entry.size for entry in tar.getmembers()}
            if sorted(tar.getnames()) != [CONFIG, WEIGHTS]:
                names = sorted(tar.getnames())
                raise EngineError(f"an adapter holds {CONFIG} and {WEIGHTS}; this blob holds {names}. Train it again.")
            if not folder.exists():
                _written(tar, folder)
    except tarfile.TarError as error:
        raise EngineError(f"this blob is no packed adapter: {error}. Name the sha256 of a trained adapter.") from error
    found = {file.name: file.stat().st_size for file in folder.iterdir() if file.name in sizes}
    if found != sizes:
        raise EngineError(f"{folder} holds half an adapter or another; remove it and repeat the command.")


def _written(tar: tarfile.TarFile, folder: Path) -> None:
    """Beside `folder`, then renamed: nobody sees half of it. Whoever was first is as good as we."""
    beside = folder.with_name(f".{folder.name[:12]}-{uuid4().hex[:8]}")
    try:
        tar.extractall(beside, filter="data")  # makes the folders above it too
        beside.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
