"""Commands that ask models, or say what asking would take: demo, plan, run, retry, try."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from flows.commands.overrule import Where, WhyAgain, open_again
from flows.commands.shared import (
    Engine,
    Env,
    Json,
    Profiles,
    Sets,
    StoreUrl,
    Yes,
    configure,
    emit,
    failures_as_exit_codes,
    known_stage,
    on_terminal,
    out,
    plain,
    say,
    warnings_shown,
)
from mllmsrec_core.errors import UsageError
from tasks.config import Config, Options

Sample = Annotated[int, typer.Option(min=0, help="only this many users, and the items they touch")]
Retrain = Annotated[bool, typer.Option("--retrain", help="train anew although the environment pins an adapter")]
Money = Annotated[float | None, typer.Option(min=0, help="money per million tokens, over the profile's")]
Span = tuple[float, float] | None


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
        show_plan(config, Options(), None, as_json)
        perform(config, Options(), None, as_json)


def plan(
    profiles: Profiles = [],
    sets: Sets = [],
    store: StoreUrl = None,
    env: Env = None,
    engine: Engine = None,
    sample: Sample = 0,
    retrain: Retrain = False,
    measure: Annotated[
        int, typer.Option(min=0, help="first ask at most this many open questions of each stage, to know the rate")
    ] = 0,
    price_in: Money = None,
    price_out: Money = None,
    as_json: Json = False,
) -> None:
    """What a run would ask, how long and for how much, and why each stage is due; loads no model unless it measures."""
    with failures_as_exit_codes(as_json):
        config = configure(profiles, sets, store, env, engine, price_in=price_in, price_out=price_out)
        if measure:
            _measure(config, sample, measure, as_json)
        show_plan(config, Options(sample=sample, retrain=retrain), None, as_json)


def run(
    profiles: Profiles = [],
    stage: Annotated[str | None, typer.Option(help="only this stage, on the environment's tables")] = None,
    sample: Sample = 0,
    reask: Annotated[bool, typer.Option("--reask", help="ask the answers of --stage again; the new ones hold")] = False,
    where: Where = None,
    why: WhyAgain = None,
    retrain: Retrain = False,
    budget_minutes: Annotated[
        float | None, typer.Option(min=0.001, help="start no row after this long, and publish what is there")
    ] = None,
    order: Annotated[
        Literal["given", "active"], typer.Option(help="active: the most active users and most used items first")
    ] = "given",
    sets: Sets = [],
    store: StoreUrl = None,
    env: Env = None,
    engine: Engine = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Run the pipeline, or one stage of it; everything answered before is reused."""
    with failures_as_exit_codes(as_json):
        config = configure(profiles, sets, store, env, engine)
        options = Options(sample=sample, retrain=retrain, budget_minutes=budget_minutes, order=order)
        stage = known_stage(stage) if stage else None
        if not reask and (where or why):
            raise UsageError("--where and --why say which answers to ask again: add --reask")
        if reask and not stage:
            raise UsageError("--reask needs a stage: mllmsrec run --stage caption --reask")
        if reask and stage:
            yes = yes or _confirmed(f"Ask answers of stage {stage} again?", False, as_json)
            open_again(config, sample, stage, where, why, as_json)
        show_plan(config, options, stage, as_json)
        if not yes:
            _confirmed("Run it?", True, as_json)
        perform(config, options, stage, as_json)


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
        config = configure(profiles, sets, store, env, engine)
        perform(config, Options(retry=(error_class,)), known_stage(stage) if stage else None, as_json)


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
                out.print(f"[bold]prompt[/bold]\n{plain(question['prompt'])}", highlight=False)
                out.print(f"[bold]answer[/bold] {plain(question['answer'])}\n", highlight=False)
            out.print(f"[bold]published[/bold] {plain(shown['old'])}\n[bold]now[/bold]       {plain(shown['new'])}")


# --- running --------------------------------------------------------------------------------------------------------


def perform(config: Config, options: Options, stage: str | None, as_json: bool) -> None:
    """Run every stage or one, show its progress, and say what was published."""
    from prefect import tags

    from flows import events, pipeline
    from flows.bars import bars
    from flows.server import reached
    from tasks.loop import terminable
    from tasks.work import environment

    with reached(), terminable(), tags(events.TAG), warnings_shown(as_json), bars(out, as_json, emit):
        if stage:
            made = {stage: pipeline.STAGE_FLOWS[stage](config.params, config.settings, options)}
            path = None
        else:
            made, path = {}, pipeline.pipeline(config.params, config.settings, options)
    _announce(made, as_json)
    _say_what_is_lost_or_left(config, environment(config, options.sample), stage, as_json)
    if path:
        end_with(path, as_json)


def end_with(path: str, as_json: bool) -> None:
    """Say where the report is."""
    if as_json:
        emit("report", path=path)
    else:
        say(f"Report: {path}")


def _confirmed(question: str, default: bool, as_json: bool) -> bool:
    """Whether somebody said yes; False where nobody is there to be asked. A no ends the command."""
    if not on_terminal(as_json):
        return False
    if not typer.confirm(question, default=default):
        raise typer.Exit(0)
    return True


def _announce(made: dict[str, Any], as_json: bool) -> None:
    for name, record in made.items():
        for table, pointer in record["tables"].items():
            if as_json:
                emit("published", stage=name, table=table, **pointer)
            else:
                say(f"{name}: {table}, {pointer['rows']:,} rows ({pointer['digest'][:12]})")


def _say_what_is_lost_or_left(config: Config, env: str, stage: str | None, as_json: bool) -> None:
    """Name the stages of this run with failed rows, that were not reached, or whose rows are not all up to date."""
    from mllmsrec_core.stages import STAGES
    from tasks import failures
    from tasks.environments import coverage
    from tasks.work import open_work

    shown = open_work(config.to_json()).store.envs.current(env)["stages"]
    for name in [stage] if stage else [one.name for one in STAGES]:
        lost = failures.counts(shown[name]) if name in shown else {}
        if lost and as_json:
            emit("failures", stage=name, classes=lost)
        elif lost:
            say(f"{name}: failed rows: {failures.summary(shown[name])}; see mllmsrec errors --stage {name}")
        part = coverage(shown[name]) if name in shown else 0.0
        if part < 1 and as_json:
            emit("left", stage=name, coverage=part)
        elif part < 1:
            say(f"{name}: {100 * part:.1f} % of its rows are up to date; the same command goes on with the others")


# --- the plan -------------------------------------------------------------------------------------------------------


def _measure(config: Config, sample: int, n: int, as_json: bool) -> None:
    from tasks.measure import measure
    from tasks.work import environment, open_work

    for stage, rate in measure(open_work(config.to_json()), environment(config, sample), n).items():
        if as_json:
            emit("measured", stage=stage, asks_per_second=rate)
        else:
            say(f"{stage}: {rate:,.1f} questions a second")


def show_plan(config: Config, options: Options, stage: str | None, as_json: bool) -> None:
    """The plan's lines, or that of one stage, as a table or as events."""
    from tasks.planning import make_plan
    from tasks.work import environment, open_work

    lines = make_plan(open_work(config.to_json()), environment(config, options.sample), options, stage)
    settings = config.settings
    money, currency = settings.price_in is not None or settings.price_out is not None, settings.currency
    headings = ("stage", "rows", "known", "to ask", "tokens in", "tokens out", "time")
    table = Table(*headings, *([f"money {currency}".strip()] if money else []), "why", title="Plan")
    for line in lines:
        due = line.due
        if as_json:
            costs = {"seconds": line.seconds, "money": line.money, "note": line.note}
            emit("plan", stage=line.stage, why=line.why, **costs, **asdict(due))
        tokens = (f"{due.tokens_in:,}", f"<= {due.tokens_out:,}") if due.high else ("", "")
        cells = (f"{due.rows:,}", f"{due.known:,}", interval((due.low, due.high), "{:,}".format), *tokens)
        price = [interval(line.money, "{:,.2f}".format)] if money else []
        table.add_row(line.stage, *cells, interval(line.seconds, duration), *price, plain(line.why or "cached"))
    if not as_json:
        out.print(table)
        if stage is None and any(line.due.high for line in lines):
            say(_in_all(lines, money, currency))
        for line in lines:
            if line.note:
                say(line.note)


def _in_all(lines: Sequence[Any], money: bool, currency: str) -> str:
    """Questions, time and money of all stages together; unknown where one of them is."""
    asks = total((line.due.low, line.due.high) for line in lines)
    words = [f"{interval(asks, '{:,}'.format)} questions"]
    words.append(f"time {interval(total(line.seconds for line in lines), duration)}")
    price = interval(total(line.money for line in lines), "{:,.2f}".format)
    words += [f"money {price} {currency}".strip()] if money else []
    return f"In all: {', '.join(words)}."


def total(spans: Iterable[Span]) -> Span:
    """Lows and highs summed; None where one is not known."""
    known = list(spans)
    if any(span is None for span in known):
        return None
    return sum(span[0] for span in known if span), sum(span[1] for span in known if span)


def interval(span: Span, words: Callable[[Any], str]) -> str:
    """`3 to 5`, or `3` where both ends read the same."""
    if span is None:
        return "unknown"
    low, high = (words(end) for end in span)
    return low if low == high else f"{low} to {high}"


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
