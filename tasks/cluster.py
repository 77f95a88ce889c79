"""Shards of a stage as tasks on Prefect's own Ray task runner: `settings.runner = "ray"`.

One connection to Ray, or one cluster of this machine, for the length of a run, opened at the first stage that is
divided. Ray starts the shards of a lost node again on another one; what no shard answers, the stage asks. Knows nothing
of how rows are divided.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from prefect import task
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from mllmsrec_core.errors import EngineError, MllmsrecError, UsageError
from tasks.child import StageTimeout, Told, at_hand, loads_model
from tasks.config import Config, Options
from tasks.prefect_tasks import ONCE_MORE, Progress
from tasks.runner import Counts, Elsewhere
from tasks.shards import Share, answer, divisible, number_of_shards, refuse_unshared, together
from tasks.stage_task import STAGE_BY_NAME, code_digest
from tasks.work import Work, open_work

CONNECT_S = 10.0  # longer than any network between nodes takes
LOOK_S = 10.0  # between two looks at the clock and at the nodes


@task(name="shard", task_run_name="{told.name} {share}", **ONCE_MORE)
def shard_task(told: Told, share: Share, code: str) -> Counts:
    """Ask one share of a stage's rows, on whatever machine this runs; publishes nothing."""
    work, how = at_hand(told)
    try:
        return answer(work, told.name, share, told.stages, how, told.before, code)
    except EngineError:
        work.engine_for.drop()  # whoever tries again opens a fresh one
        raise
    finally:
        if work.config.settings.gpus_per_shard:
            work.engine_for.drop()  # Ray ends this process, and what it has started must not keep the device


class Shards(AbstractContextManager["Shards"]):
    """Asks a stage's questions on a Ray cluster ahead of the stage; does nothing where `settings.runner` is `threads`.

    Raises UsageError at once where Ray is not installed, or where its nodes could not reach the store or Prefect.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.settings = config, config.settings
        self._open, self._runner = ExitStack(), None
        if self.settings.runner == "ray":
            _refuse_without_ray()
            refuse_unshared(config)
            if self.settings.ray_address:
                _refuse_without_server(self.settings.ray_address)
                _refuse_unreachable(self.settings.ray_address)

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def ask(
        self,
        name: str,
        stages: Mapping[str, Any],
        before: Mapping[str, Any],
        options: Options,
        deadline: float | None,
    ) -> Elsewhere | None:
        """Divide the stage and wait for every shard, whether it ends well or not; None where the stage is left whole."""
        if self.settings.runner != "ray" or not divisible(open_work(self.config.to_json()), STAGE_BY_NAME[name]):
            return None
        told = Told(self.config.to_json(), name, dict(stages), dict(before), options, deadline)
        try:
            work, how = at_hand(told)
            shards = number_of_shards(work, name, stages, how, before, options.retrain)
        except MllmsrecError:
            return None  # the stage meets the same error, and ends with it as its own
        if not shards:
            return None
        runner, gpus = self._started(), self._gpus(work, name)
        started = time.monotonic()
        with temporary_settings({PREFECT_API_URL: _api_url()}), _holding(gpus):
            futures = [
                runner.submit(shard_task, {"told": told, "share": Share(n, shards), "code": code_digest()})
                for n in range(shards)
            ]
        minutes = self.settings.stage_timeout_minutes
        limit = Limit(gpus, None if minutes is None else started + 60 * minutes)
        with Progress(name, self.config.shown_as(options.sample)) as progress:
            return _ended(name, futures, started, limit, progress)

    def _gpus(self, work: Work, name: str) -> float:
        """Devices that each shard of the stage holds; none where it asks no model.

        Raises UsageError where the processes of a node would crowd one device.
        """
        settings = self.settings
        if name not in work.models:
            return 0.0
        crowds = loads_model(work, name) and not settings.gpus_per_shard and settings.device != "cpu"
        if crowds and _most_devices():
            raise UsageError(
                f"{name}: every process of a node would load its model onto the same GPU: add --set "
                "settings.gpus_per_shard=1, or settings.engine=openai with endpoints, or settings.device=cpu"
            )
        return settings.gpus_per_shard

    def _started(self) -> Any:
        if self._runner is None:
            from prefect_ray import RayTaskRunner  # type: ignore[import-not-found]

            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            quiet = {"log_to_driver": False, "logging_level": "error"}
            here = {**quiet, "include_dashboard": False}
            address = self.settings.ray_address
            runner = RayTaskRunner(address=address or "local", init_kwargs=quiet if address else here)
            try:
                self._runner = self._open.enter_context(runner)
            except (ConnectionError, RuntimeError) as error:
                raise UsageError(
                    f"Ray does not let this machine in at {address or 'a cluster of its own'} ({error}); "
                    "start the run on a node of the cluster"
                ) from error
            _refuse_without_devices(self.settings.gpus_per_shard)
        return self._runner


@dataclass(frozen=True)
class Limit:
    """How long shards are waited for: while some node has the devices they hold, and until `ends` (monotonic seconds)."""

    gpus: float
    ends: float | None


def _ended(name: str, futures: list[Any], started: float, limit: Limit, progress: Progress) -> Elsewhere:
    """Wait for every shard. One that failed or was lost is named in the log; its open rows are left to the stage.

    Raises where none returned: UsageError if that ended them all, else EngineError. The nodes are set up wrongly, and all
    the work would fall to one process.
    """
    log, counts, errors = get_run_logger(), list[Counts](), list[Any]()
    for number, future in enumerate(futures):
        _wait(name, future, limit)
        result = future.state.result(raise_on_failure=False)
        if isinstance(result, Counts):
            counts.append(result)
        else:
            errors.append(result)
            log.warning("%s, shard %s: %s; the stage asks what it left", name, Share(number, len(futures)), result)
        so_far = together(counts, 0).counts
        so_far.rows = so_far.rows * len(futures) // max(1, len(counts))  # shares are of about equal size
        progress(name, so_far)
    if errors and not counts:
        if all(isinstance(error, UsageError) for error in errors):
            raise errors[0]
        raise EngineError(
            f"{name}: none of {len(futures)} shards returned, the first for: {errors[0]}. Everything answered is kept. "
            "Look at the nodes, or go on without them: --set settings.runner=threads"
        )
    made = together(counts, time.monotonic() - started)
    log.info(
        "%s: %d of %d shards returned; asked %d, known %d, failed %d, %.1f s",
        *(name, made.shards, len(futures)),
        *(made.counts.asked, made.counts.known, made.counts.failed, made.seconds),
    )
    return made


def _wait(name: str, future: Any, limit: Limit) -> None:
    """Until the shard has ended. Raises StageTimeout past the limit, UsageError once no node has the devices it needs."""
    import ray  # type: ignore[import-not-found]

    while not ray.wait([future.wrapped_future], timeout=LOOK_S)[0]:
        _refuse_without_devices(limit.gpus)
        if limit.ends is not None and time.monotonic() >= limit.ends:
            raise StageTimeout(
                f"{name}: its shards were stopped after settings.stage_timeout_minutes. Everything answered is kept: "
                "repeat the command to go on, or raise the limit"
            )
    future.wait()


def _holding(gpus: float) -> AbstractContextManager[Any]:
    """Within it, every shard that is started holds so many devices; Ray then ends its process with it."""
    from prefect_ray.context import remote_options  # type: ignore[import-not-found]

    return remote_options(num_gpus=gpus) if gpus else remote_options()


def _api_url() -> str:
    """Where Prefect's server answers, the temporary one of this process included."""
    return get_current_settings().api.url or str(get_client(sync_client=True).api_url)


def _refuse_without_ray() -> None:
    if find_spec("ray") is None or find_spec("prefect_ray") is None:
        raise UsageError("settings.runner = \"ray\" needs Ray: pip install -e '.[ray]', on every node")


def _refuse_without_server(address: str) -> None:
    """A temporary Prefect server is for this machine alone."""
    if not get_current_settings().api.url:
        raise UsageError(
            f"the nodes of {address} report to a Prefect server, and none is configured: run "
            "`prefect server start --host 0.0.0.0`, and set PREFECT_API_URL=http://THIS_MACHINE:4200/api"
        )


def _refuse_without_devices(gpus: float) -> None:
    """Ray itself lets a task wait for ever for devices that no node has."""
    most = _most_devices() if gpus else 0.0
    if gpus > most:
        raise UsageError(
            f"settings.gpus_per_shard = {gpus:g}, and no node of the Ray cluster has more than {most:g} GPUs: lower it, or "
            "start the nodes with `ray start --num-gpus N`"
        )


def _most_devices() -> float:
    """GPUs of the node that has most of them."""
    import ray  # type: ignore[import-not-found]

    return max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)


def _refuse_unreachable(address: str) -> None:
    """Ray itself waits for ever for a cluster that is not there."""
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        socket.create_connection((place.hostname or "", place.port or 0), CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster answers at settings.ray_address = {address} ({error}): write it as HOST:PORT and start one "
            "there with `ray start --head --port 6379`, or leave it empty for a cluster of this machine"
        ) from error
