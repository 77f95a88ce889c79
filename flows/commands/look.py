"""Commands that show what an environment holds and ask no model: status, errors, why, report, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.commands.run import end_with
from flows.commands.shared import (
    Env,
    Json,
    Profiles,
    StoreUrl,
    configure,
    emit,
    environment_of,
    failures_as_exit_codes,
    out,
    pairs,
    plain,
    say,
)
from mllmsrec_core.errors import UsageError, nearest


def status(profiles: Profiles = [], store: StoreUrl = None, env: Env = None, as_json: Json = False) -> None:
    """What the environment shows: one line per stage."""
    from tasks import failures
    from tasks.environments import coverage

    with failures_as_exit_codes(as_json):
        _, now = environment_of(configure(profiles, [], store, env))
        title = f"environment {now['name']}, state {now['seq']}, {now.get('note') or 'a run'}"
        partly = any(coverage(record) < 1 for record in now["stages"].values())
        columns = ["stage", "tables", "asked", "known", "failed", *(["up to date"] if partly else []), "seconds", "at"]
        table = Table(*columns, title=plain(title))
        for name, record in now["stages"].items():
            counts, part = record["counts"], coverage(record)
            tables = ", ".join(f"{table} ({pointer['rows']:,})" for table, pointer in record["tables"].items())
            if as_json:
                kept = {key: record[key] for key in ("tables", "counts", "seconds", "at")}
                emit("stage", stage=name, coverage=part, failures=failures.counts(record), **kept)
            fresh = [f"{100 * part:.1f} %"] if partly else []
            lost = failures.summary(record) or "0"
            cells = (counts["asked"], counts["known"], lost, *fresh, record["seconds"], record["at"])
            table.add_row(name, tables, *(str(cell) for cell in cells))
        if not as_json:
            out.print(table)


def errors(
    stage: Annotated[str | None, typer.Option(help="only this stage")] = None,
    error_class: Annotated[str | None, typer.Option("--class", help="only this error class")] = None,
    limit: int = 50,
    profiles: Profiles = [],
    store: StoreUrl = None,
    env: Env = None,
    as_json: Json = False,
) -> None:
    """Failed rows by stage, key and error class, with what the engine said."""
    from tasks.failures import failures

    with failures_as_exit_codes(as_json):
        opened, now = environment_of(configure(profiles, [], store, env))
        found = failures(opened, now["stages"], stage, error_class)
        table = Table("stage", "row", "class", "detail")
        for failed in found[:limit]:
            if as_json:
                emit("failed", **failed)
            table.add_row(failed["stage"], plain(failed["row"]), failed["class"], plain(failed["detail"]))
        if not as_json:
            out.print(table if found else "no failed rows")
            if len(found) > limit:
                out.print(f"{len(found) - limit} more; --limit shows them")


def why(
    words: Annotated[list[str], typer.Argument(help="item ID, user ID, or user ID item ID")],
    profiles: Profiles = [],
    store: StoreUrl = None,
    env: Env = None,
    as_json: Json = False,
) -> None:
    """Trace a score, a user or an item to every question and picture behind it, with the literal text of each."""
    from tasks.why import why as trace
    from tasks.work import open_work

    with failures_as_exit_codes(as_json):
        named = pairs(words, ("user", "item"), "`why item B01`, `why user U1` or `why user U1 item B01`")
        config = configure(profiles, [], store, env)
        lines = trace(open_work(config.to_json()), config.settings.env, item=named.get("item"), user=named.get("user"))
        for line in lines:
            if as_json:
                emit("why", line=line)
            else:
                sys.stdout.write(line + "\n")


def report(
    profiles: Profiles = [],
    compare: Annotated[str | None, typer.Option(help="another environment, to stand beside this one")] = None,
    store: StoreUrl = None,
    env: Env = None,
    as_json: Json = False,
) -> None:
    """Write the HTML report of the environment again and print where it is."""
    from tasks.report import write_page

    with failures_as_exit_codes(as_json):
        config = configure(profiles, [], store, env)
        opened, now = environment_of(config)
        end_with(write_page(opened, now["name"], compare, again=True), as_json)


def export(
    table: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.parquet, FILE.csv or FILE.jsonl")],
    profiles: Profiles = [],
    store: StoreUrl = None,
    env: Env = None,
    as_json: Json = False,
) -> None:
    """Any published table as Parquet, CSV or JSONL."""
    from tasks.export import export as write
    from tasks.stage_task import table_records

    with failures_as_exit_codes(as_json):
        opened, now = environment_of(configure(profiles, [], store, env))
        pointers = table_records(now["stages"])
        if table not in pointers:
            raise UsageError(f"there is no table `{table}` in this environment; {nearest(table, pointers)}")
        rows = write(opened.tables.read(table, pointers[table]["write_id"]), output)
        if as_json:
            emit("export", table=table, path=str(output), rows=rows)
        else:
            say(f"{rows:,} rows of {table} written to {output}")
