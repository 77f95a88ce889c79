"""The command that measures: how fast each stage goes here, what bounds it, and against what. Publishes nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from flows.commands.shared import (
    Engine,
    Json,
    Profiles,
    Sets,
    StoreUrl,
    configure,
    emit,
    failures_as_exit_codes,
    out,
    plain,
)

if TYPE_CHECKING:
    from tasks.bench import Figures, Finding

ROWS = 128  # the built-in shop then takes one to three minutes on one core


def bench(
    profiles: Profiles = [],
    rows: Annotated[int, typer.Option(min=1, help="at most this many rows of each stage")] = ROWS,
    against: Annotated[
        Literal["original"] | None, typer.Option(help="original: beside MLLM-MSR's way of asking, on the same model")
    ] = None,
    sets: Sets = [],
    store: StoreUrl = None,
    engine: Engine = None,
    as_json: Json = False,
) -> None:
    """Rates, memory and the bound of each stage, measured on the profile's models and data (or the built-in shop's).

    Works in a temporary store and publishes nothing; --store is not touched.
    """
    from tasks.bench import Figures
    from tasks.bench import bench as measure

    with failures_as_exit_codes(as_json):
        config = configure(profiles or ["demo"], sets, store, None, engine)
        found = []
        for finding in measure(config, rows, against == "original"):
            found.append(finding)
            if as_json:
                emit(type(finding).__name__.lower(), **asdict(finding))
            elif isinstance(finding, Figures):
                out.print(plain(f"{finding.stage}: {finding.rows} rows in {finding.seconds:.1f} s"), highlight=False)
        if not as_json:
            show(found)


def show(found: list[Finding]) -> None:
    """Figures as a table with a verdict each, then ratios, then what was left out."""
    from tasks.bench import Figures, LeftOut, Ratio

    figures = [finding for finding in found if isinstance(finding, Figures)]
    columns = ("rows", "rows/s", "images/s", "tokens in/s", "tokens out/s", "memory", "cores used", "bound by")
    table = Table("stage", *columns)
    for one in figures:
        rates = (one.rows_s, one.images_s, one.tokens_in_s, one.tokens_out_s)
        table.add_row(
            one.stage, f"{one.rows:,}", *(f"{rate:,.1f}" for rate in rates), _memory(one),
            f"{one.cores:.2f} of {one.of_cores}", one.bound_by,
        )  # fmt: skip
    out.print(table)
    out.print("\nEach part alone, seconds on the same rows:", highlight=False)
    for one in figures:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in one.parts.items())
        failed = f"; {one.failed} of {one.rows} rows failed" if one.failed else ""
        out.print(plain(f"  {one.stage}: {parts}{failed}"), highlight=False)
    for kind, title in ((Ratio, "\nSide by side, per second:"), (LeftOut, "\nLeft out:")):
        some = [finding for finding in found if isinstance(finding, kind)]
        if some:
            out.print(title, highlight=False)
        for finding in some:
            for line in _lines(finding):
                out.print(plain(f"  {line}"), highlight=False)


def _lines(finding: Finding) -> list[str]:
    from tasks.bench import LeftOut, Ratio

    if isinstance(finding, LeftOut):
        return [f"{finding.what}: {finding.why}"]
    assert isinstance(finding, Ratio)
    one = finding
    rates = f"{one.ours:,.1f} : {one.theirs:,.1f} {one.unit}/s"
    line = f"{one.stage}, {one.what}: {rates} = {one.ratio:.2f} ({one.cpu_ratio:.2f} by processor time)"
    return [line, *([f"  {one.because}"] if one.because else [])]


def _memory(one: Figures) -> str:
    device = f" + {one.device_mb:,.0f} MB on the device" if one.device_mb is not None else ""
    return f"{one.memory_mb:,.0f} MB{device}"
