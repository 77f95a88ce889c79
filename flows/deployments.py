"""What `deploy` tells a Prefect server: the pipeline, each stage and gc, with the parameters of one configuration.

Every deployment of an environment shares a work queue that lets one run through at a time. Knows nothing of profiles or
of the command line. Annotations are not postponed here: Prefect builds the form in its UI from the flow's real types.
"""

import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.schedules import Cron, Schedule
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from flows import automations
from flows.pipeline import SETTINGS, STAGE_FLOWS, run_name
from flows.server import START, reached
from mllmsrec_core.errors import UsageError
from storage.files import refuse_secrets
from storage.store import Store
from tasks.collect import collect as remove_unneeded
from tasks.config import Config, Options, Settings

POOL = "cpu"  # the pool of the worker in docker-compose.yml
ONE_AT_A_TIME = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
JOB_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PREFECT_LOGGING_LEVEL": "INFO",  # a worker's own level is inherited, and WARNING leaves the Logs tab empty
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(automations.HEARTBEAT_SECONDS),
    # A process that Prefect starts for its hooks lies in its own folder, whose `storage.py` would stand before ours.
    "PYTHONSAFEPATH": "1",
}


@flow(name="mllmsrec-gc", flow_run_name=run_name("gc"))
def collect(
    settings: Settings = SETTINGS,
    dataset: str = "demo",
    grace_hours: float = 24,
    keep: int = 5,
    replies: bool = False,
    dry_run: bool = False,
) -> int:
    """Remove from a store what nothing needs any more, as `mllmsrec gc` does; returns how many bytes that were.

    Args:
        settings: where the store is; nothing else of it is read
        dataset: names the run
        grace_hours: nothing younger goes
        keep: newest states of each environment whose tables stay
        replies: also answers and pictures that no kept table rests on
        dry_run: list what would go, and remove nothing
    """
    store = Store(settings.store, options=settings.storage_options)
    found = remove_unneeded(store, grace_hours=grace_hours, keep=keep, replies=replies, dry_run=dry_run)
    sizes: Counter[str] = Counter()
    for kind, name, size, why in found:
        get_run_logger().info("%s %s, %d bytes: %s", kind, name, size, why)
        sizes[kind] += size
    for kind, size in sizes.items():
        get_run_logger().info("%s %s: %.1f MB", "would go" if dry_run else "removed", kind, size / 1e6)
    return sizes.total()


globals().update(STAGE_FLOWS)  # each under its stage's name: an entrypoint names an attribute of a module


def deployments(
    config: Config, options: Options | None = None, *, cron: str | None = None, pool: str = POOL
) -> list[RunnerDeployment]:
    """The pipeline, which alone is scheduled (`cron`, UTC, paused), then each stage, then gc; nothing is sent anywhere.

    Relative paths in the parameters hold in the folder of the caller, where the runs will work too. Raises UsageError
    for a relative store, for credentials in the dataset's path, and for a `cron` that is none.
    """
    refuse_relative(config.settings.store)
    refuse_secrets(config.stage_params()["ingest"].path, {})  # a run opens it; here it would reach the server before
    settings = config.settings.model_dump(mode="json")
    params = config.params.model_dump(mode="json")
    told = {"params": params, "settings": settings, "options": (options or Options()).model_dump(mode="json")}
    shared = {
        "name": config.place,
        "tags": [automations.TAG, f"dataset:{params['ingest']['dataset']}", f"env:{config.settings.env}"],
        "concurrency_limit": ONE_AT_A_TIME,
        "work_pool_name": pool,
        "work_queue_name": config.place,
        "job_variables": {"env": JOB_ENVIRONMENT, "working_dir": str(Path.cwd())},
    }
    deploy = partial(RunnerDeployment.from_entrypoint, **shared)
    return [
        deploy("flows.pipeline.pipeline", parameters=told, schedule=_paused(cron) if cron else None),
        *(
            deploy(
                f"{__name__}.{stage}", parameters=told, description=f"Stage {stage} alone, on the environment's tables."
            )
            for stage in STAGE_FLOWS
        ),
        deploy(f"{__name__}.collect", parameters={"settings": settings, "dataset": params["ingest"]["dataset"]}),
    ]


def refuse_relative(store: str) -> None:
    """Raises UsageError for a store whose place depends on the folder a process happens to be in."""
    parts = urlsplit(store)
    local = parts.scheme in ("", "file", "local")
    path = (parts.netloc + parts.path) if parts.scheme else store
    if local and not os.path.isabs(path):
        raise UsageError(
            f"the store `{store}` is a relative path, and every worker must find the same one: "
            f"write --store {Path(path).resolve()}, or a URL such as s3://bucket/store"
        )


def install(made: Sequence[RunnerDeployment], notify: str | None = None, gpus: int | None = None) -> list[str]:
    """Create or update pool, queue, deployments, automations and the limit on GPUs; the deployments' full names.

    `notify` is a notification block (`type/name`), `gpus` how many stages may hold one at once. What somebody has set
    since stays: a schedule that was started or changed (unless a new one is given, which then is as active as the old
    one), the limit of the queue, an automation that was switched off, notices and the limit on GPUs where nothing new is
    said of them. Raises UsageError where no server is configured, none answers or it refuses the login, and for an unknown block.
    """
    if not get_current_settings().api.url:
        raise UsageError(f"deployments live in a Prefect server, and none is configured: {START}")
    with reached(), get_client(sync_client=True) as client:
        automations.install(client, notify)
        automations.limit_gpus(client, gpus)
        first = made[0]
        _ensure_queue(client, str(first.work_pool_name), str(first.work_queue_name))
        for deployment in made:
            _keep_what_was_set(client, deployment)
            deployment.apply()
    return [deployment.full_name for deployment in made]


def _paused(cron: str) -> Schedule:
    """The schedule, not yet active. Raises UsageError for words that are no cron."""
    try:
        return Cron(cron, timezone="UTC", active=False)
    except ValueError as error:
        raise UsageError(f'--cron "{cron}" is no cron expression; write "0 3 * * *" for three every night') from error


def _ensure_queue(client: SyncPrefectClient, pool: str, queue: str) -> None:
    """The pool, of processes if it is new, and in it a queue that lets one run through at a time."""
    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template))
    try:
        client.read_work_queue_by_name(queue, work_pool_name=pool)
    except ObjectNotFound:
        client.create_work_queue(
            queue, description="one run at a time on this environment", concurrency_limit=1, work_pool_name=pool
        )


def _keep_what_was_set(client: SyncPrefectClient, deployment: RunnerDeployment) -> None:
    """What stands under the name keeps its schedules if no new one comes, and stays as paused or active as it is."""
    try:
        standing = client.read_deployment_by_name(deployment.full_name)
    except ObjectNotFound:
        return
    kept = [
        DeploymentScheduleCreate.model_validate(one.model_dump(include=set(DeploymentScheduleCreate.model_fields)))
        for one in standing.schedules
    ]
    new = [one.model_copy(update={"active": any(old.active for old in kept)}) for one in deployment.schedules or ()]
    deployment.schedules = [*(new or kept)]
    deployment.paused = standing.paused
