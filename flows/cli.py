"""The command line. Each command reads its layers of configuration, opens the store, and prints what it did.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 finished or stopped with failed rows above the limit.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows import settings as layers
from mllmsrec_core.errors import MllmsrecError, TooManyErrors, UsageError, nearest
from tasks.config import Config

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
WIDTH = None if sys.stdout.isatty() else 160  # a log file has no width of its own
out = Console(soft_wrap=True, width=WIDTH)
err = Console(stderr=True, soft_wrap=True)

Profiles = Annotated[
    list[str], typer.Option("--profile", "-p", help="a shipped profile or a TOML file; later ones win")
]
Sets = Annotated[list[str], typer.Option("--set", help="stage.key=value; file:PATH reads the value from a file")]
StoreUrl = Annotated[str | None, typer.Option("--store", help="any fsspec URL; default ./store")]
Env = Annotated[str | None, typer.Option("--env", help="the environment to read or publish to; default dev")]
Engine = Annotated[str | None, typer.Option("--engine", help="transformers, or scripted: a dry run without any model")]
Json = Annotated[bool, typer.Option("--json", help="one JSON line per event")]

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # the command says itself what went wrong
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def configure(
    profiles: list[str], sets: list[str], store: str | None, env: str | None, engine: str | None = None
) -> Config:
    """The configuration of one command; options stand above every other layer."""
    sets = list(sets)
    sets += [f"settings.store={json.dumps(store)}"] if store else []
    sets += [f"settings.env={json.dumps(env)}"] if env else []
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
            err.print(f"[red]{type(error).__name__}[/red]: {error}", highlight=False, markup=True)
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        again = shlex.join(["mllmsrec", *sys.argv[1:]])
        err.print(f"\nStopped; every answer so far is kept. To go on:\n  {again}", highlight=False)
        raise typer.Exit(1) from None


def emit(event: str, **fields: Any) -> None:
    """One event as one line of JSON."""
    sys.stdout.write(json.dumps({"event": event, **fields}, default=str) + "\n")
    sys.stdout.flush()


@app.command()
def demo(
    store: StoreUrl = None,
    env: Env = None,
    engine: Engine = None,
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """The whole pipeline on the built-in shop: CPU, no network; opens with a plan, ends with the report's path."""
    os.environ.setdefault("PREFECT_HOME", str(Path.cwd() / ".prefect"))
    with failures_as_exit_codes(as_json):
        config = configure(["demo"], sets, store or os.environ.get("MLLMSREC_STORE", "./demo-store"), env, engine)
        _run(config, None, 0, (), yes=True, as_json=as_json)


@app.command()
def plan(
    profiles: Profiles = [],
    sets: Sets = [],
    store: StoreUrl = None,
    env: Env = None,
    engine: Engine = None,
    sample: int = 0,
    as_json: Json = False,
) -> None:
    """What a run would ask, how long at the rate last measured, and why each stage is due; loads no model."""
    with failures_as_exit_codes(as_json):
        _show_plan(configure(profiles, sets, store, env, engine), sample, as_json)


@app.command()
def run(
    profiles: Profiles = [],
    stage: Annotated[str | None, typer.Option(help="only this stage, on the environment's tables")] = None,
    sample: Annotated[int, typer.Option(min=0, help="only this many users, and the items they touch")] = 0,
    sets: Sets = [],
    store: StoreUrl = None,
    env: Env = None,
    engine: Engine = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask before starting")] = False,
    as_json: Json = False,
) -> None:
    """Run the pipeline, or one stage of it; everything answered before is reused."""
    with failures_as_exit_codes(as_json):
        _run(configure(profiles, sets, store, env, engine), stage, sample, (), yes, as_json)


@app.command()
def retry(
    profiles: Profiles = [],
    stage: Annotated[str | None, typer.Option(help="only this stage")] = None,
    error_class: Annotated[str, typer.Option("--class", help="only this error class")] = "all",
    sets: Sets = [],
    store: StoreUrl = None,
    env: Env = None,
    engine: Engine = None,
    as_json: Json = False,
) -> None:
    """Ask again what failed for good, by stage or error class; what succeeded is reused."""
    with failures_as_exit_codes(as_json):
        _run(configure(profiles, sets, store, env, engine), stage, 0, (error_class,), True, as_json)


@app.command(name="try")
def try_(
    stage: str,
    profiles: Profiles = [],
    rows: Annotated[int, typer.Option(min=1, help="how many rows")] = 3,
    sets: Sets = [],
    store: StoreUrl = None,
    env: Env = None,
    engine: Engine = None,
    as_json: Json = False,
) -> None:
    """A few rows of one stage: exact prompt, the answer as published and the answer now; publishes nothing."""
    from tasks.trial import trial

    with failures_as_exit_codes(as_json):
        for shown in trial(configure(profiles, sets, store, env, engine), stage, rows):
            if as_json:
                emit("try", **shown)
                continue
            out.rule(shown["row"])
            for question in shown["asked"]:
                out.print(f"[bold]prompt[/bold]\n{_plain(question['prompt'])}", highlight=False)
                out.print(f"[bold]answer[/bold] {_plain(question['answer'])}\n", highlight=False)
            out.print(f"[bold]published[/bold] {_plain(shown['old'])}\n[bold]now[/bold]       {_plain(shown['new'])}")


@app.command()
def status(store: StoreUrl = None, env: Env = None, as_json: Json = False) -> None:
    """What the environment shows: one line per stage."""
    with failures_as_exit_codes(as_json):
        _, now = _environment(store, env)
        table = Table(
            "stage", "tables", "asked", "known", "failed", "seconds", "at", title=f"environment {now['name']}"
        )
        for name, record in now["stages"].items():
            counts = record["counts"]
            tables = ", ".join(f"{table} ({pointer['rows']:,})" for table, pointer in record["tables"].items())
            if as_json:
                emit("stage", stage=name, **{key: record[key] for key in ("tables", "counts", "seconds", "at")})
            cells = (counts["asked"], counts["known"], counts["failed"], record["seconds"], record["at"])
            table.add_row(name, tables, *(str(cell) for cell in cells))
        if not as_json:
            out.print(table)


@app.command()
def errors(
    stage: Annotated[str | None, typer.Option(help="only this stage")] = None,
    error_class: Annotated[str | None, typer.Option("--class", help="only this error class")] = None,
    limit: int = 50,
    store: StoreUrl = None,
    env: Env = None,
    as_json: Json = False,
) -> None:
    """Failed rows by stage, key and error class, with what the engine said."""
    from tasks.failures import failures

    with failures_as_exit_codes(as_json):
        opened, now = _environment(store, env)
        found = failures(opened, now["stages"], stage, error_class)
        table = Table("stage", "row", "class", "detail")
        for failed in found[:limit]:
            if as_json:
                emit("failed", **failed)
            table.add_row(failed["stage"], failed["row"], failed["class"], failed["detail"])
        if not as_json:
            out.print(table if found else "no failed rows")
            if len(found) > limit:
                out.print(f"{len(found) - limit} more; --limit shows them")


@app.command()
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
        named = _named(words)
        config = configure(profiles, [], store, env)
        lines = trace(open_work(config.to_json()), config.settings.env, item=named.get("item"), user=named.get("user"))
        for line in lines:
            if as_json:
                emit("why", line=line)
            else:
                sys.stdout.write(line + "\n")


@app.command()
def report(profiles: Profiles = [], store: StoreUrl = None, env: Env = None, as_json: Json = False) -> None:
    """Write the HTML report of the environment again and print where it is."""
    from tasks.report import write_report
    from tasks.work import open_work

    with failures_as_exit_codes(as_json):
        _environment(store, env)
        config = configure(profiles, [], store, env)
        path = write_report(open_work(config.to_json()), config.settings.env)
        _end(path, as_json)


@app.command()
def export(
    table: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.parquet, FILE.csv or FILE.jsonl")],
    store: StoreUrl = None,
    env: Env = None,
    as_json: Json = False,
) -> None:
    """Any published table as Parquet, CSV or JSONL."""
    from tasks.export import export as write
    from tasks.stage_task import table_records

    with failures_as_exit_codes(as_json):
        opened, now = _environment(store, env)
        pointers = table_records(now["stages"])
        if table not in pointers:
            raise UsageError(f"there is no table `{table}` in this environment; {nearest(table, pointers)}")
        rows = write(opened.tables.read(table, pointers[table]["write_id"]), output)
        if as_json:
            emit("export", table=table, path=str(output), rows=rows)
        else:
            out.print(f"{rows:,} rows of {table} written to {output}", highlight=False)


def _run(config: Config, stage: str | None, sample: int, retry: tuple[str, ...], yes: bool, as_json: bool) -> None:
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    if stage is None and not retry:
        _show_plan(config, sample, as_json)
        if terminal and not yes and not typer.confirm("Run it?", default=True):
            raise typer.Exit(0)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from flows import pipeline
    from flows.bars import bars

    with bars(out, as_json, emit):
        if stage:
            made = {stage: pipeline.STAGE_FLOWS[_known(stage)](config.params, config.settings, sample, retry)}
            path = None
        else:
            path = pipeline.pipeline(config.params, config.settings, sample, retry)
            made = None
    if made:
        _announce(made, as_json)
    if path:
        _end(path, as_json)


def _known(stage: str) -> str:
    from flows.pipeline import NAMES

    if stage not in NAMES:
        raise UsageError(f"there is no stage `{stage}`; {nearest(stage, NAMES)}")
    return stage


def _announce(made: dict[str, Any], as_json: bool) -> None:
    for name, record in made.items():
        for table, pointer in record["tables"].items():
            if as_json:
                emit("published", stage=name, table=table, **pointer)
            else:
                out.print(f"{name}: {table}, {pointer['rows']:,} rows ({pointer['digest'][:12]})", highlight=False)


def _end(path: str, as_json: bool) -> None:
    if as_json:
        emit("report", path=path)
    else:
        out.print(f"Report: {path}", highlight=False)


def _show_plan(config: Config, sample: int, as_json: bool) -> None:
    from tasks.planning import make_plan
    from tasks.work import environment, open_work

    lines = make_plan(open_work(config.to_json()), environment(config, sample), sample)
    table = Table("stage", "rows", "known", "to ask", "tokens in", "tokens out", "time", "why", title="Plan")
    for line in lines:
        due = line.due
        if as_json:
            emit("plan", stage=line.stage, why=line.why, seconds=line.seconds, **due.__dict__)
        tokens = (f"{due.tokens_in:,}", f"<= {due.tokens_out:,}") if due.high else ("", "")
        asks = f"{due.high:,}" if due.low == due.high else f"{due.low:,} to {due.high:,}"
        table.add_row(
            line.stage, f"{due.rows:,}", f"{due.known:,}", asks, *tokens, _duration(line.seconds), line.why or "cached"
        )
    if not as_json:
        out.print(table)


def _duration(seconds: tuple[float, float] | None) -> str:
    if seconds is None:
        return "unknown"
    low, high = (f"{s:.0f} s" if s < 120 else f"{s / 60:.0f} min" if s < 7200 else f"{s / 3600:.1f} h" for s in seconds)
    return low if low == high else f"{low} to {high}"


def _environment(store: str | None, env: str | None) -> tuple[Any, dict[str, Any]]:
    """An opened store and an environment that has been published to."""
    from storage.store import Store

    settings = configure([], [], store, env).settings
    opened = Store(settings.store)
    now = opened.envs.current(settings.env)
    if not now["stages"]:
        names = opened.envs.names()
        known = f"known: {', '.join(names)}" if names else "nothing was ever published here; `mllmsrec demo` does"
        raise UsageError(f"environment `{settings.env}` of {settings.store} is empty; {known}")
    return opened, {"name": settings.env, **now}


def _named(words: list[str]) -> dict[str, str]:
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    if len(words) % 2 or set(pairs) - {"user", "item"}:
        raise UsageError(f"why {' '.join(words)}: write `why item B01`, `why user U1` or `why user U1 item B01`")
    return pairs


def _plain(text: Any) -> str:
    """Rich reads square brackets as markup; published text must not be markup."""
    from rich.markup import escape

    return escape(str(text))


def main(run_app: Callable[[], None] = app) -> None:
    run_app()
