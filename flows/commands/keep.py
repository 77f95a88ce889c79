"""Commands that take something out of a store for good: forget, gc."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from flows.commands.shared import (
    Json,
    Profiles,
    StoreUrl,
    Yes,
    configure,
    emit,
    failures_as_exit_codes,
    on_terminal,
    open_store,
    out,
    plain,
    say,
)
from mllmsrec_core.errors import UsageError


def forget(
    user: Annotated[str, typer.Option("--user", help="the id, as the dataset writes it")],
    yes: Yes = False,
    force: Annotated[bool, typer.Option("--force", help="although runs seem to be at work")] = False,
    profiles: Profiles = [],
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Remove a user from the whole store for good, keep the user out of later runs, and prove it by a scan."""
    from tasks.forget import forget as remove

    with failures_as_exit_codes(as_json):
        settings = configure(profiles, [], store, None).settings
        if not yes:
            if not on_terminal(as_json):
                raise UsageError("forget removes rows, answers and history for good; where nobody is asked, add --yes")
            typer.confirm(f"Remove user {user} from {settings.store} for good?", abort=True)
        proof = remove(open_store(settings), user, force)
        for line in proof.lines():
            if as_json:
                emit("proof", line=line)
            else:
                say(line)
        if as_json:
            emit("forgotten", clean=proof.clean)
        if not proof.clean:
            raise typer.Exit(1)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would go, and remove nothing")] = False,
    replies: Annotated[
        bool, typer.Option("--replies", help="also answers and pictures that no kept table rests on")
    ] = False,
    grace_hours: Annotated[float, typer.Option(min=0, help="nothing younger goes")] = 24,
    keep: Annotated[int, typer.Option(min=1, help="newest states of each environment whose tables stay")] = 5,
    profiles: Profiles = [],
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Remove tables no environment shows any more, and what crashes left behind; answers only with --replies."""
    from tasks.collect import collect

    with failures_as_exit_codes(as_json):
        opened = open_store(configure(profiles, [], store, None).settings)
        rows = collect(opened, grace_hours=grace_hours, keep=keep, replies=replies, dry_run=dry_run)
        table = Table("kind", "name", "bytes", "why")
        for kind, name, size, why in rows:
            if as_json:
                emit("removable" if dry_run else "removed", kind=kind, name=name, bytes=size, why=why)
            table.add_row(kind, plain(name), f"{size:,}", plain(why))
        if not as_json:
            if rows:
                out.print(table)
            done = "would go" if dry_run else "removed"
            say(f"{len(rows):,} {done}, {sum(row[2] for row in rows) / 1e6:,.1f} MB")
