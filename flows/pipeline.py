"""The pipeline as Prefect flows: the whole of it, and one flow per stage.

Order only. A single stage reads the environment's tables and never runs what is upstream. The environment moves once,
after the last stage; a run that dies before leaves records behind from which the next one continues. Annotations are
not postponed here: Prefect builds the form in its UI from the parameters' real types.
"""

from collections.abc import Sequence
from typing import Any, cast

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from mllmsrec_core.stages import STAGES
from tasks.config import Config, Pipeline, Settings
from tasks.prefect_tasks import stage_task
from tasks.report import write_report
from tasks.work import environment, open_work

DEFAULTS, SETTINGS = Pipeline(), Settings()
NAMES = tuple(stage.name for stage in STAGES)


def run(config: Config, only: str | None = None, sample: int = 0, retry: Sequence[str] = ()) -> dict[str, Any]:
    """Every stage in order, or one on the environment's tables. Returns the stage records by name."""
    store = open_work(config.to_json()).store
    env = environment(config, sample)
    before = store.envs.current(env)["stages"]
    stages: dict[str, Any] = dict(before) if only else {}
    made: dict[str, Any] = {}
    for name in [only] if only else NAMES:
        state = stage_task(name, config.to_json(), stages, sample, tuple(retry), return_state=True)
        record = cast(dict[str, Any], state.result())
        # a run that asked next to nothing measured no rate; the last one that did still tells the plan
        made[name] = stages[name] = {**record, "rate": record["rate"] or before.get(name, {}).get("rate")}
    store.envs.move(env, made)
    return made


@flow(name="mllmsrec", flow_run_name="{settings.env}")
def pipeline(
    params: Pipeline = DEFAULTS,  # type: ignore[valid-type]
    settings: Settings = SETTINGS,
    sample: int = 0,
    retry: tuple[str, ...] = (),
) -> str:
    """All stages in order, then the report; returns where the report is."""
    config = Config(settings, params)
    made = run(config, sample=sample, retry=retry)
    path = write_report(open_work(config.to_json()), environment(config, sample))
    create_markdown_artifact(_funnel(made, path), key="run", description="what this run published")
    return path


def stage_flow(name: str) -> Any:
    """The flow that runs one stage on its environment's tables."""

    @flow(name=f"mllmsrec-{name}", flow_run_name=f"{name}-{{settings.env}}")
    def one_stage(
        params: Pipeline = DEFAULTS,  # type: ignore[valid-type]
        settings: Settings = SETTINGS,
        sample: int = 0,
        retry: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        return run(Config(settings, params), name, sample, retry)[name]

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
