"""What every command shares: its options, its configuration, how it prints, and how an error becomes an exit code.

Knows no command.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flows import settings as layers
from mllmsrec_core.errors import MllmsrecError, TooManyErrors, UsageError, nearest
from tasks.config import Config, Settings

if TYPE_CHECKING:
    from storage.store import Store

WIDTH = None if sys.stdout.isatty() else 160  # a log file has no width of its own
out = Console(soft_wrap=True, width=WIDTH)
err = Console(stderr=True, soft_wrap=True)

Profiles = Annotated[
    list[str], typer.Option("--profile", "-p", help="a shipped profile or a TOML file; later ones win")
]
Sets = Annotated[list[str], typer.Option("--set", help="stage.key=value; file:PATH reads the value from a file")]
StoreUrl = Annotated[str | None, typer.Option("--store", help="any fsspec URL; default ./store")]
Env = Annotated[str | None, typer.Option("--env", help="the environment to read or publish to; default dev")]
Engine = Annotated[
    str | None, typer.Option("--engine", help="transformers, vllm, openai, or scripted: a dry run without a model")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON line per event")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask before starting")]

ONCE = {
    "--reask": 0,
    "--where": 1,
    "--why": 1,
}  # option -> words after it: options of `run` that a resumed run must not repeat


def configure(
    profiles: Sequence[str],
    sets: Sequence[str],
    store: str | None,
    env: str | None,
    engine: str | None = None,
    **settings: Any,
) -> Config:
    """The configuration of one command; options stand above every other layer. `settings` that are None say nothing."""
    given = {"store": store, "env": env, **settings}
    sets = [
        *sets,
        *(f"settings.{name}={json.dumps(value)}" for name, value in given.items() if value not in (None, "")),
    ]
    if engine == "scripted":
        sets.append("model=scripted")
        sets += [f"{name}.model=scripted" for name in layers.stages_with_model()]
    elif engine:
        sets.append(f"settings.engine={engine}")
    return layers.load(profiles, sets)


@contextmanager
def failures_as_exit_codes(as_json: bool) -> Iterator[None]:
    """Turn our own errors into one clear message and the right exit code."""
    try:
        yield
    except MllmsrecError as error:
        code = 2 if isinstance(error, UsageError) else 3 if isinstance(error, TooManyErrors) else 1
        if as_json:
            emit("error", kind=type(error).__name__, message=str(error), exit=code)
        else:
            err.print(f"[red]{type(error).__name__}[/red]: {plain(error)}", highlight=False)
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        again = shlex.join(["mllmsrec", *resuming(sys.argv[1:])])
        err.print(f"\nStopped; every answer so far is kept. To go on:\n  {plain(again)}", highlight=False)
        raise typer.Exit(1) from None


def resuming(words: Sequence[str]) -> list[str]:
    """The command that goes on with what `words` began: answers opened again by `--reask` are open already."""
    if not words or words[0] != "run":
        return list(words)
    kept, skip = [], 0
    for word in words:
        name, given, _ = word.partition("=")
        if skip:
            skip -= 1
        elif name in ONCE:
            skip = 0 if given else ONCE[name]
        else:
            kept.append(word)
    return kept


def emit(event: str, **fields: Any) -> None:
    """One event as one line of JSON."""
    sys.stdout.write(json.dumps({"event": event, **fields}, default=str) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """One line as it is, nothing in it read as markup."""
    out.print(plain(text), highlight=False)


@contextmanager
def warnings_shown(as_json: bool) -> Iterator[None]:
    """While open, what a run warns of in its log is said here too."""

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.WARNING:  # errors end the command, which says them itself
                words = record.getMessage()
                emit("warning", message=words) if as_json else say(f"Warning: {words}")

    said, logs = Said(), [logging.getLogger(f"prefect.{name}") for name in ("flow_runs", "task_runs")]
    for log in logs:
        log.addHandler(said)
    try:
        yield
    finally:
        for log in logs:
            log.removeHandler(said)


def plain(text: Any) -> str:
    """Rich reads square brackets as markup; published text must not be markup."""
    return escape(str(text))


def on_terminal(as_json: bool) -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty() and not as_json


def open_store(settings: Settings) -> Store:
    """The store alone, for commands that ask no model."""
    from storage.store import Store

    return Store(settings.store, options=settings.storage_options)


def environment_of(config: Config) -> tuple[Store, dict[str, Any]]:
    """The store and the state of an environment that has been published to, its name under `name`."""
    from tasks.environments import shown

    store = open_store(config.settings)
    return store, {"name": config.settings.env, **shown(store, config.settings.env)}


def known_stage(name: str) -> str:
    """`name`, if there is such a stage. Raises UsageError with the nearest one."""
    from mllmsrec_core.stages import STAGES

    names = [stage.name for stage in STAGES]
    if name not in names:
        raise UsageError(f"there is no stage `{name}`; {nearest(name, names)}")
    return name


def pairs(words: Sequence[str], allowed: Sequence[str], right: str) -> dict[str, str]:
    """`item B01 user U1` as names and values; `right` is what to write instead of anything else."""
    found = dict(zip(words[::2], words[1::2], strict=False))
    if not words or len(words) % 2 or set(found) - set(allowed):
        raise UsageError(f"`{' '.join(words)}` is not understood: write {right}")
    return found
