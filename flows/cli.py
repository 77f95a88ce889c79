"""The command line. Each command reads its layers of configuration, opens the store, and prints what it did.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 finished or stopped with failed rows above the limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import typer

from flows.commands import bench, deploy, environments, init, keep, look, overrule, run

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # The run's page keeps its log; on the terminal the command says itself what went wrong.
    "PREFECT_LOGGING_LEVEL": "INFO",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # as of deployed runs: a dead one is told by three that do not come
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # 26 s on two idle cores the first time; its own limit is 20
}


def quiet() -> None:
    """Whatever a command starts reports nothing home and says little, unless the environment says otherwise."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__, callback=quiet
)

GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "Run": (run.demo, init.init, run.plan, run.run, run.retry, run.try_),
    "Measure": (bench.bench,),
    "Look": (look.status, look.errors, look.why, look.report, look.export),
    "Environments": (environments.envs, environments.history, environments.promote, environments.rollback),
    "Schedule": (deploy.deploy,),
    "Overrule": (overrule.correct,),
    "Keep": (keep.forget, keep.gc),
}
for title, commands in GROUPS.items():
    for command in commands:
        app.command(name=command.__name__.rstrip("_"), rich_help_panel=title)(command)


def main(run_app: Callable[[], None] = app) -> None:
    run_app()
