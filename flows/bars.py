"""What a terminal shows while stages run: a bar with rate and time left, or one JSON line per finished stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tasks import prefect_tasks
from tasks.runner import Counts


@contextmanager
def bars(console: Console, as_json: bool, emit: Callable[..., None]) -> Iterator[None]:
    """While open, `prefect_tasks.watch` feeds the bars."""
    if as_json:
        prefect_tasks.watch = lambda stage, counts: emit("progress", stage=stage, **counts.__dict__)
        try:
            yield
        finally:
            prefect_tasks.watch = None
        return
    columns = (
        TextColumn("{task.description:<11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        shown: dict[str, TaskID] = {}

        def watch(stage: str, counts: Counts) -> None:
            if stage not in shown:
                shown[stage] = progress.add_task(stage, note="")
            progress.update(shown[stage], total=counts.rows, completed=counts.done, note=_note(counts))

        prefect_tasks.watch = watch
        try:
            yield
        finally:
            prefect_tasks.watch = None


def _note(counts: Counts) -> str:
    words = [f"asked {counts.asked:,}", f"known {counts.known:,}"]
    words += [f"carried over {counts.carried:,} rows"] if counts.carried else []
    return ", ".join(words + ([f"failed {counts.failed:,}"] if counts.failed else []))
