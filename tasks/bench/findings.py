"""What a bench says: figures of a stage, ratios of two ways of the same work, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass, field

from tasks.bench.meter import Cost


@dataclass(frozen=True)
class Figures:
    """One stage through the runner. Rates are per second of wall time, megabytes are 10^6 bytes."""

    stage: str
    rows: int
    asked: int
    failed: int
    seconds: float
    rows_s: float
    images_s: float
    tokens_in_s: float
    tokens_out_s: float
    memory_mb: float  # the process at its largest, models included
    device_mb: float | None
    cores: float  # in use on average
    of_cores: int
    bound_by: str  # the part with the largest share
    parts: dict[str, float] = field(default_factory=dict)  # seconds of each part alone


@dataclass(frozen=True)
class Ratio:
    """Our way of some work over another: `ours` and `theirs` in `unit` per second of wall time, `ratio` of the two.

    `cpu_ratio` is the same by processor time, which holds on a busy machine. `because` splits the ratio.
    """

    what: str
    stage: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    cpu_ratio: float
    because: str = ""


@dataclass(frozen=True)
class LeftOut:
    """What was not measured, and why."""

    what: str
    why: str


Finding = Figures | Ratio | LeftOut


def ratio(what: str, stage: str, unit: str, n: int, ours: Cost, theirs: Cost, because: str = "") -> Ratio:
    """`n` of `unit` done at these two costs."""
    rates = n / ours.seconds, n / theirs.seconds
    return Ratio(what, stage, unit, *rates, theirs.seconds / ours.seconds, theirs.cpu / ours.cpu, because)
