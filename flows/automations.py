"""What a Prefect server does by itself: mark runs that died Crashed, start the pipeline again, and notify somebody.

Knows no deployment: runs are recognised by the tag they inherit. A run goes on from what the store holds, so to start it
again asks nothing twice but the answers that were not yet durable.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture, SendNotification
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes
from prefect.exceptions import ObjectNotFound

from flows.events import BELOW, TAG
from mllmsrec_core.errors import UsageError
from tasks.prefect_tasks import GPU

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

HEARTBEAT_SECONDS = 30  # the shortest that Prefect 3.8 accepts
SILENCE = timedelta(
    seconds=90
)  # three heartbeats: a dead run is Crashed within three minutes, the server's loop included
# A worker reports a killed process twice, 20 s apart as measured, and the second report would hit the new start.
PAUSE = timedelta(minutes=1)
RESTARTS = 2
RUN = "prefect.flow-run."
ENDED = ("Completed", "Failed", "Cancelled", "Crashed")
BROKEN = ("Failed", "TimedOut", "Crashed")
STARTED = ("Scheduled", "AwaitingRetry", "Pending", "Running")
SET_ASIDE = ("Paused", "Suspended", "AwaitingRetry", "Scheduled")  # no process, so no heartbeat

_OURS: dict[str, str | list[str]] = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
# A run of the command line has no deployment, so nobody could start it again, and who started it sees how it ends.
_DEPLOYED: dict[str, str | list[str]] = {
    "prefect.resource.role": "deployment",
    "prefect.resource.id": "prefect.deployment.*",
}
_THE_PIPELINE: dict[str, str | list[str]] = {"prefect.resource.role": "flow", "prefect.resource.name": "mllmsrec"}


def dead_runs() -> AutomationCore:
    """A run whose heartbeats stop for longer than `SILENCE`, although it has not ended, is marked Crashed."""
    return AutomationCore(
        name="mllmsrec: a run without a heartbeat is dead",
        description="Frees its place in the queue; the process, its worker or the machine are gone.",
        trigger=EventTrigger(
            after={RUN + "heartbeat"},
            expect={RUN + name for name in ("heartbeat", *ENDED, *SET_ASIDE)},
            match={"prefect.resource.id": RUN + "*"},
            match_related=_OURS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[_change(StateType.CRASHED, "Crashed", "no heartbeat: the process is dead")],
    )


def restarts() -> AutomationCore:
    """A deployed run of the whole pipeline that crashed is scheduled again, as the same run, at most `RESTARTS` times.

    It waits for `PAUSE`, and does nothing if somebody starts or cancels the run before. The bound is the run's own counter,
    which Prefect raises at every start and which its events carry: the first start that crashes counts 1. A run that
    crashed before it started counts 0, and is left to somebody who looks.
    """
    return AutomationCore(
        name="mllmsrec: a crashed pipeline starts again",
        description=f"At most {RESTARTS} times; a run that failed with an error is not started again.",
        trigger=EventTrigger(
            after={RUN + "Crashed"},
            expect={RUN + name for name in (*STARTED, "Cancelled")},
            match={
                "prefect.resource.id": RUN + "*",
                "prefect.run-count": [str(count) for count in range(1, RESTARTS + 1)],
            },
            match_related=[_OURS, _THE_PIPELINE, _DEPLOYED],
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=PAUSE,
        ),
        actions=[_change(StateType.SCHEDULED, "AwaitingRetry", "crashed; goes on from what the store holds")],
    )


def failure_notice(block: UUID) -> AutomationCore:
    """Every deployed run that ends Failed, TimedOut or Crashed is told to the notification block with this id."""
    return AutomationCore(
        name="mllmsrec: a failed run is told",
        description="Through the block that `mllmsrec deploy --notify` named last.",
        trigger=EventTrigger(
            expect={RUN + name for name in BROKEN},
            match={"prefect.resource.id": RUN + "*"},
            match_related=[_OURS, _DEPLOYED],
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=block,
                subject="mllmsrec: {{ flow_run.name }} {{ flow_run.state.name }}",
                body="{{ flow.name }}, {{ flow_run.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
            )
        ],
    )


def metric_notice(block: UUID) -> AutomationCore:
    """Every metric below its bar (`settings.min_metrics`) is told to the notification block with this id."""
    return AutomationCore(
        name="mllmsrec: a metric below its bar is told",
        description="Through the block that `mllmsrec deploy --notify` named last.",
        trigger=EventTrigger(
            expect={BELOW},
            match={"prefect.resource.id": "mllmsrec.metric.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=block,
                subject="mllmsrec: {{ event.payload.name }} of {{ event.payload.place }} is low",
                body="{{ event.payload.name }} of {{ event.payload.place }} is {{ event.payload.value }}, below "
                "{{ event.payload.least }}, on {{ event.payload.n_users }} users.",
            )
        ],
    )


def _change(to: StateType, name: str, why: str) -> ActionTypes:
    return ChangeFlowRunState(state=to, name=name, message=why, force=False)


def install(client: SyncPrefectClient, notify: str | None = None) -> list[str]:
    """Create the automations, or bring them up to date; one that somebody switched off stays off. Their names.

    `notify` names a notification block as `type/name`; without it nothing about notices is changed. An automation that is
    as it should be is left alone: an update would forget which runs it is watching. Raises UsageError for an unknown
    block.
    """
    wanted = [dead_runs(), restarts()]
    if notify:
        block = find_block(client, notify)
        wanted += [failure_notice(block), metric_notice(block)]
    for automation in wanted:
        standing = client.read_automations_by_name(automation.name)
        if not standing:
            client.create_automation(automation)
        for one in standing:
            if (one.trigger, one.actions) != (automation.trigger, automation.actions):
                client.update_automation(one.id, automation.model_copy(update={"enabled": one.enabled}))
    return [automation.name for automation in wanted]


def find_block(client: SyncPrefectClient, notify: str) -> UUID:
    """The id of a block document, as `slack-webhook/team`. Raises UsageError where there is none."""
    kind, _, name = notify.partition("/")
    try:
        return client.read_block_document_by_name(name, block_type_slug=kind).id
    except (ObjectNotFound, ValueError):
        raise UsageError(
            f"there is no block `{notify}` on the Prefect server. Write --notify TYPE/NAME, as in slack-webhook/team; "
            "`prefect block ls` lists them, and under Blocks in the UI you make one"
        ) from None


def limit_gpus(client: SyncPrefectClient, gpus: int | None) -> None:
    """Make the limit that stages on a GPU wait for: of `gpus` slots, or of one if there is no limit yet."""
    try:
        standing = client.read_global_concurrency_limit_by_name(GPU)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU, limit=gpus or 1))
        return
    if gpus and standing.limit != gpus:
        client.update_global_concurrency_limit(GPU, GlobalConcurrencyLimitUpdate(limit=gpus))
