"""The pipeline as Prefect flows: the whole of it, and one flow per stage.

Order only. A single stage reads the environment's tables and never runs what is upstream. The environment moves once,
after the last stage; a run that dies before leaves records behind from which the next one continues. Annotations are
not postponed here: Prefect builds the form in its UI from the parameters' real types.
"""

import time
from typing import Any, cast

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from mllmsrec_core.errors import OutOfTime
from mllmsrec_core.stages import STAGES
from tasks.config import Config, Options, Pipeline, Settings
from tasks.prefect_tasks import stage_task
from tasks.report import write_report
from tasks.work import environment, open_work

DEFAULTS, SETTINGS, OPTIONS = Pipeline(), Settings(), Options()
NAMES = tuple(stage.name for stage in STAGES)


def run(config: Config, options: Options = OPTIONS, only: str | None = None) -> dict[str, Any]:
    """Every stage in order, or one on the environment's tables. Returns the stage records by name.

    A run whose time is over goes no further than a stage that has nothing to show; what it made is published.
    """
    store = open_work(config.to_json()).store
    env = environment(config, options.sample)
    before = store.envs.current(env)["stages"]
    deadline = time.time() + 60 * options.budget_minutes if options.budget_minutes else None
    stages: dict[str, Any] = dict(before) if only else {}
    made: dict[str, Any] = {}
    try:
        for name in [only] if only else NAMES:
            state = stage_task(name, config.to_json(), stages, before, options, deadline, return_state=True)
            if made and isinstance(state.result(raise_on_failure=False), OutOfTime):
                break
            made[name] = stages[name] = cast(dict[str, Any], state.result())
    finally:
        open_work(config.to_json()).engine_for.drop()  # an engine may hold a GPU, or processes of its own
    store.envs.move(env, made)
    return made


@flow(name="mllmsrec", flow_run_name="{settings.env}")
def pipeline(
    params: Pipeline = DEFAULTS,  # type: ignore[valid-type]
    settings: Settings = SETTINGS,
    options: Options = OPTIONS,
) -> str:
    """All stages in order, then the report; returns where the report is."""
    config = Config(settings, params)
    made = run(config, options)
    path = write_report(open_work(config.to_json()), environment(config, options.sample))
    create_markdown_artifact(_funnel(made, path), key="run", description="what this run published")
    return path


def stage_flow(name: str) -> Any:
    """The flow that runs one stage on its environment's tables."""

    @flow(name=f"mllmsrec-{name}", flow_run_name=f"{name}-{{settings.env}}")
    def one_stage(
        params: Pipeline = DEFAULTS,  # type: ignore[valid-type]
        settings: Settings = SETTINGS,
        options: Options = OPTIONS,
    ) -> dict[str, Any]:
        return run(Config(settings, params), options, name)[name]

    return one_stage


STAGE_FLOWS = {name: stage_flow(name) for name in NAMES}


def _funnel(made: dict[str, Any], report: str) -> str:
    lines = ["| stage | table | rows | asked | known | failed | seconds |", "|---|---|---|---|---|---|---|"]
    for name, record in made.items():
        counts = record["counts"]
        for table, pointer in record["tables"].items():
            cells = (
                name,
                table,
                pointer["rows"],
                counts["asked"],
                counts["known"],
                counts["failed"],
                record["seconds"],
            )
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join([*lines, "", f"Report: {report}"])
