"""deploy: hand a configuration to a Prefect server, which runs it on a schedule or on request."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flows.commands.shared import (
    Engine,
    Env,
    Json,
    Profiles,
    Sets,
    StoreUrl,
    configure,
    emit,
    failures_as_exit_codes,
    say,
)
from tasks.config import Options


def deploy(
    profiles: Profiles = [],
    cron: Annotated[
        str | None, typer.Option(help='when the whole pipeline runs, UTC, as in "0 3 * * *"; paused at first')
    ] = None,
    pool: Annotated[str, typer.Option(help="the work pool; one of processes is made if there is none")] = "cpu",
    budget_minutes: Annotated[
        float | None,
        typer.Option(min=0.001, help="every run starts no row after this long, and publishes what is there"),
    ] = None,
    order: Annotated[
        Literal["given", "active"], typer.Option(help="active: the most active users and most used items first")
    ] = "given",
    notify: Annotated[
        str | None,
        typer.Option(help="tell failures, and metrics below settings.min_metrics, to this Prefect block: TYPE/NAME"),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="stages that may hold a GPU at once, on all workers; 1 if never said")
    ] = None,
    sets: Sets = [],
    store: StoreUrl = None,
    env: Env = None,
    engine: Engine = None,
    as_json: Json = False,
) -> None:
    """Put the pipeline, each stage and gc on a Prefect server, to be scheduled or started from its UI."""
    from flows.deployments import deployments, install

    with failures_as_exit_codes(as_json):
        config = configure(profiles, sets, store, env, engine)
        options = Options(budget_minutes=budget_minutes, order=order)
        names = install(deployments(config, options, cron=cron, pool=pool), notify, gpus)
        for name in names:
            if as_json:
                emit("deployed", name=name, pool=pool)
            else:
                say(name)
        if not as_json:
            say(f"Runs need a worker, started where the same files lie: prefect worker start --pool {pool}")
        if cron and not as_json:
            say(f"The schedule of {names[0]} is paused when it is new: switch it on in the UI, or by "
                f"prefect deployment schedule ls {names[0]} and prefect deployment schedule resume {names[0]} ID")  # fmt: skip
