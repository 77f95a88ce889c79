"""How an adapter is trained: the settings that change its weights, as they stand in a Train's key.

Knows nothing of the library that trains, and nothing of devices, folders or checkpoints, which change no weight.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from mllmsrec_core.ask import canonical
from mllmsrec_core.errors import UsageError, nearest

Strategy = Literal["lora", "qlora"]
# Attention and MLP of the language model in LLaVA, Idefics3, Qwen-VL and plain text models; the eye stays as it is.
TARGETS = r"(?!.*(vision|visual|projector|connector)).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True, slots=True)
class Recipe:
    """LoRA (arXiv 2106.09685), or LoRA over a base in 4 bits (arXiv 2305.14314), with a cosine schedule.

    rank, alpha, dropout: of the LoRA layers, which stand beside every linear layer whose full name matches `targets`.
    lr: the peak, reached after `warmup` (below 1 a share of all steps, from 1 on a number of steps).
    batch_size, accumulate: examples per step are their product.
    """

    strategy: Strategy = "qlora"
    rank: int = 32
    alpha: int = 64
    dropout: float = 0.05
    lr: float = 1e-3  # for small models; 2e-3 was unstable on the embedded one, 2e-4 is usual from 1 B parameters on
    epochs: float = 2
    batch_size: int = 16
    accumulate: int = 1
    warmup: float = 0.03
    weight_decay: float = 0.0
    seed: int = 0
    targets: str = TARGETS

    def __post_init__(self) -> None:
        for name, wrong in self._wrong().items():
            raise UsageError(f"recipe: `{name}` is {getattr(self, name)!r}; {wrong}")

    def _wrong(self) -> dict[str, str]:
        checks = {
            "strategy": (self.strategy in get_args(Strategy), f"it must be one of {', '.join(get_args(Strategy))}"),
            "rank": (_whole(self.rank, 1), "it must be a whole number from 1 on"),
            "alpha": (_real(self.alpha) and self.alpha > 0, "it must be above 0"),
            "dropout": (_real(self.dropout) and 0 <= self.dropout < 1, "it must be in [0, 1)"),
            "lr": (_real(self.lr) and self.lr > 0, "it must be above 0"),
            "epochs": (_real(self.epochs) and self.epochs > 0, "it must be above 0"),
            "batch_size": (_whole(self.batch_size, 1), "it must be a whole number from 1 on"),
            "accumulate": (_whole(self.accumulate, 1), "it must be a whole number from 1 on"),
            "warmup": (_real(self.warmup) and self.warmup >= 0, "it must not be negative"),
            "weight_decay": (_real(self.weight_decay) and self.weight_decay >= 0, "it must not be negative"),
            "seed": (_whole(self.seed, 0), "it must be a whole number from 0 on"),
            "targets": (_pattern(self.targets), "it must be a regular expression over full module names"),
        }
        return {name: message for name, (right, message) in checks.items() if not right}

    def to_json(self) -> str:
        """Canonical JSON with every field, as it stands in `Train.recipe`."""
        return canonical(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe in `text`; what it leaves out takes its default. Raises UsageError for anything else."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UsageError(f"recipe: not JSON ({error}): {text[:80]}") from error
        if not isinstance(content, dict):
            raise UsageError(f"recipe: a JSON object is wanted, not {text[:80]}")
        known = [field.name for field in fields(cls)]
        for name in content:
            if name not in known:
                raise UsageError(f"recipe: unknown key `{name}`; {nearest(name, known)}")
        return cls(**content)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(value) and re.compile(value) is not None
    except re.error:
        return False
