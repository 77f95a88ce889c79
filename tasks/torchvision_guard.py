"""Lets the CUDA build of torchvision import beside CPU-only torch.

The package index has only the CUDA build of torchvision for this torch. Its compiled operators need CUDA libraries, so
without them `import torchvision` dies with "operator torchvision::nms does not exist". Declaring the schemas of two
operators is enough: transforms are pure torch. `nms` itself stays unusable, and nothing here calls it.
Call `install()` before anything imports torchvision, open_clip or transformers. It does nothing beside a CPU build of
torchvision or a CUDA build of torch, and knows nothing of models.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Sequence
from types import ModuleType

_OPERATORS = ("nms", "qnms")
_kept: list[object] = []  # a torch Library takes its operators away when it is garbage-collected


class _Guard(importlib.abc.MetaPathFinder):
    """Declares the operators at the moment torchvision is first looked for, then leaves the import to the others."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare()
        return None


def _declare() -> None:
    import torch

    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return
    if torch.version.cuda is not None or "+cpu" in version:
        return
    library = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def install() -> None:
    """Stand in the import path until torchvision is first imported; safe to call again."""
    waiting = any(isinstance(finder, _Guard) for finder in sys.meta_path)
    if not waiting and not _kept and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _Guard())
