"""What `init` proposes: the lines of a profile, and why one of them is a guess. Knows no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """One `key = value` of a profile, below `table`; `unsure` says why it is a guess."""

    table: str
    key: str
    value: Any
    unsure: str = ""
    note: str = ""
    off: bool = False  # written as a comment: what could stand there


@dataclass(frozen=True)
class Proposal:
    """A profile: the dataset's reader and its lines."""

    dataset: str
    lines: tuple[Line, ...]

    @property
    def unsure(self) -> list[str]:
        """Every doubt, as `table.key: why`."""
        return [f"{line.table}.{line.key}: {line.unsure}" for line in self.lines if line.unsure]


@dataclass(frozen=True)
class Found:
    """A column that seems to be one of ours."""

    column: str
    unsure: str = ""


def several(files: Sequence[str], how: str) -> str:
    """Why a file among several is a guess; empty where it is the only one."""
    return f"chosen {how}; there are also {', '.join(files[1:6])}" if len(files) > 1 else ""
