"""The pipeline as Prefect flows: the whole of it, and one flow per stage.

Order only. A single stage reads the environment's tables and never runs what is upstream. The environment moves once,
after the last stage; a run that dies before leaves records behind from which the next one continues. Annotations are
not postponed here: Prefect builds the form in its UI from the parameters' real types.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from flows import events
from flows.artifacts import model_metrics, show_made, show_plan, show_report
from mllmsrec_core.errors import OutOfTime
from mllmsrec_core.stages import STAGES
from tasks.cluster import Shards
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
    names, reused = (only,) if only else NAMES, set[str]()
    try:
        show_plan(config, options, before, names)
        with Shards(config) as shards:
            for name in names:
                told = (name, config.to_json(), stages, before, options, deadline)
                state = stage_task(*told, shards.ask(name, stages, before, options, deadline), return_state=True)
                if made and isinstance(state.result(raise_on_failure=False), OutOfTime):
                    break
                made[name] = stages[name] = cast(dict[str, Any], state.result())
                if state.name == "Cached":
                    reused.add(name)
                else:
                    events.published(config, name, made[name])
    finally:
        open_work(config.to_json()).engine_for.drop()  # an engine may hold a GPU, or processes of its own
    store.envs.move(env, made)
    _tell(config, options, env, before, made, reused)
    return made


def _tell(
    config: Config, options: Options, env: str, before: dict[str, Any], made: dict[str, Any], reused: set[str]
) -> None:
    """Show what the run has published, and let automations know."""
    show_made(config, options, env, before, made, reused)
    if fresh := [name for name in made if name not in reused]:
        events.moved(config, env, open_work(config.to_json()).store.envs.current(env)["seq"], fresh)
    if "score" in fresh and not options.sample:
        events.metrics(config, model_metrics(open_work(config.to_json()).store, env))


def run_name(stage: str = "") -> Callable[[], str]:
    """What a run is called in the UI: `demo-dev (scheduled)`, `caption demo-dev (retry 1)`, `... sample 20 (by hand)`."""

    def name() -> str:
        context = FlowRunContext.get()
        assert context and context.flow_run
        given, run = context.parameters or {}, context.flow_run
        sample = Options.model_validate(given.get("options", OPTIONS)).sample
        return f"{stage} {_place(given)}{f' sample {sample}' if sample else ''} ({_cause(run)})".strip()

    return name


def _place(given: Mapping[str, Any]) -> str:
    """`dataset-environment` by the parameters of a run: those of `gc` hold the dataset's name alone."""
    settings = Settings.model_validate(given.get("settings", SETTINGS))
    if "dataset" in given:
        return f"{given['dataset']}-{settings.env}"
    return Config(settings, Pipeline.model_validate(given.get("params", DEFAULTS))).place


def _cause(run: FlowRun) -> str:
    """Who or what started a run. Its counter is raised at every start, after it was named."""
    if run.run_count:
        return f"retry {run.run_count}"
    if run.auto_scheduled:
        return "scheduled"
    return "by an automation" if run.created_by and run.created_by.type == "AUTOMATION" else "by hand"


@flow(name="mllmsrec", flow_run_name=run_name())
def pipeline(
    params: Pipeline = DEFAULTS,  # type: ignore[valid-type]
    settings: Settings = SETTINGS,
    options: Options = OPTIONS,
) -> str:
    """All stages in order, then the report; returns where the report is."""
    config = Config(settings, params)
    run(config, options)
    env = environment(config, options.sample)
    path = write_report(open_work(config.to_json()), env)
    show_report(config, options, env, path)
    return path


def stage_flow(name: str) -> Any:
    """The flow that runs one stage on its environment's tables."""

    @flow(name=f"mllmsrec-{name}", flow_run_name=run_name(name))
    def one_stage(
        params: Pipeline = DEFAULTS,  # type: ignore[valid-type]
        settings: Settings = SETTINGS,
        options: Options = OPTIONS,
    ) -> dict[str, Any]:
        return run(Config(settings, params), options, name)[name]

    return one_stage


STAGE_FLOWS = {name: stage_flow(name) for name in NAMES}
