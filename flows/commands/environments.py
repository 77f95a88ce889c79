"""Commands that list, promote and roll back environments: envs, history, promote, rollback."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.commands.shared import (
    Env,
    Json,
    Profiles,
    StoreUrl,
    configure,
    emit,
    environment_of,
    failures_as_exit_codes,
    open_store,
    out,
    plain,
    say,
)


def envs(profiles: Profiles = [], store: StoreUrl = None, as_json: Json = False) -> None:
    """Every environment: its state, when and why it moved, and how much of it is up to date."""
    from tasks.environments import coverage

    with failures_as_exit_codes(as_json):
        opened = open_store(configure(profiles, [], store, None).settings)
        table = Table("environment", "state", "at", "stages", "up to date", "note")
        for name in opened.envs.names():
            now = opened.envs.current(name)
            least = min((coverage(record) for record in now["stages"].values()), default=1.0)
            shown = {"seq": now["seq"], "at": now.get("at"), "note": str(now.get("note", ""))}
            if as_json:
                emit("environment", name=name, stages=list(now["stages"]), coverage=least, **shown)
            cells = (str(now["seq"]), str(shown["at"]), str(len(now["stages"])), f"{100 * least:.1f} %")
            table.add_row(name, *cells, plain(shown["note"]))
        if not as_json:
            out.print(table if table.row_count else "no environment yet; `mllmsrec demo` makes one")


def history(profiles: Profiles = [], store: StoreUrl = None, env: Env = None, as_json: Json = False) -> None:
    """Every state of the environment, oldest first: when it moved, which stages changed, and why."""
    with failures_as_exit_codes(as_json):
        opened, now = environment_of(configure(profiles, [], store, env))
        table = Table("state", "at", "changed", "note", title=f"environment {now['name']}")
        states: list[dict[str, Any]] = [{"stages": {}}, *opened.envs.history(now["name"])]
        for before, state in pairwise(states):
            names = changed(before["stages"], state["stages"])
            if as_json:
                emit("state", seq=state["seq"], at=state["at"], changed=names, note=state.get("note", ""))
            table.add_row(str(state["seq"]), state["at"], ", ".join(names), plain(state.get("note", "")))
        if not as_json:
            out.print(table)


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Stages whose tables say something else than before, or came, or went."""
    names = dict.fromkeys([*after, *before])
    return [name for name in names if _content(before.get(name)) != _content(after.get(name))]


def _content(record: Mapping[str, Any] | None) -> dict[str, str] | None:
    return None if record is None else {table: pointer["digest"] for table, pointer in record["tables"].items()}


def promote(
    source: Annotated[str, typer.Argument(help="the environment to show")],
    target: Annotated[str, typer.Argument(help="the environment that shows it from now on")],
    min_coverage: Annotated[
        float | None, typer.Option(min=0, max=1, help="least share of rows up to date, over the profile's")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="whatever the coverage")] = False,
    profiles: Profiles = [],
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Let TARGET show exactly what SOURCE shows: whole, and with enough of its rows up to date."""
    from tasks.environments import promote as move

    with failures_as_exit_codes(as_json):
        settings = configure(profiles, [], store, None, min_coverage=min_coverage).settings
        opened = open_store(settings)
        _moved(
            target, move(opened, source, target, settings.min_coverage, force), f"shows what {source} shows", as_json
        )


def rollback(
    to: Annotated[int | None, typer.Option(help="the state to show again; default the one before the newest")] = None,
    profiles: Profiles = [],
    store: StoreUrl = None,
    env: Env = None,
    as_json: Json = False,
) -> None:
    """Let the environment show again what an earlier state showed; the roll-back is a new state."""
    from tasks.environments import rollback as move

    with failures_as_exit_codes(as_json):
        settings = configure(profiles, [], store, env).settings
        opened = open_store(settings)
        seq = move(opened, settings.env, to)
        _moved(settings.env, seq, opened.envs.current(settings.env).get("note", ""), as_json)


def _moved(name: str, seq: int, what: str, as_json: bool) -> None:
    if as_json:
        emit("moved", environment=name, seq=seq, note=what)
    else:
        say(f"{name}: state {seq}, {what}")
