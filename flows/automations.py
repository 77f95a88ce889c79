"""What a Prefect server does by itself about deployed runs that died: mark them Crashed, and start the pipeline again.

Knows no deployment: runs are recognised by the tag they inherit. A run goes on from what the store holds, so to start it
again asks nothing twice but the answers that were not yet durable.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

TAG = "mllmsrec"  # on every deployment, and so on every run of one
HEARTBEAT_SECONDS = 30  # the shortest that Prefect 3.8 accepts
SILENCE = timedelta(minutes=5)  # ten heartbeats: on a busy machine some come late, and nobody waits for a night run
# A worker reports a killed process twice, 20 s apart as measured, and the second report would hit the new start.
PAUSE = timedelta(minutes=1)
RESTARTS = 2
RUN = "prefect.flow-run."
ENDED = ("Completed", "Failed", "Cancelled", "Crashed")
STARTED = ("Scheduled", "AwaitingRetry", "Pending", "Running")
SET_ASIDE = ("Paused", "Suspended", "AwaitingRetry", "Scheduled")  # no process, so no heartbeat

_OURS: dict[str, str | list[str]] = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
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
    """A run of the whole pipeline that crashed is scheduled again, as the same run, at most `RESTARTS` times.

    It waits for `PAUSE`, and does nothing if somebody else starts the run before. The bound is the run's own counter,
    which Prefect raises at every start and which its events carry: the first start that crashes counts 1. A run that
    crashed before it started counts 0, and is left to somebody who looks.
    """
    return AutomationCore(
        name="mllmsrec: a crashed pipeline starts again",
        description=f"At most {RESTARTS} times; a run that failed with an error is not started again.",
        trigger=EventTrigger(
            after={RUN + "Crashed"},
            expect={RUN + name for name in STARTED},
            match={
                "prefect.resource.id": RUN + "*",
                "prefect.run-count": [str(count) for count in range(1, RESTARTS + 1)],
            },
            match_related=[_OURS, _THE_PIPELINE],
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=PAUSE,
        ),
        actions=[_change(StateType.SCHEDULED, "AwaitingRetry", "crashed; goes on from what the store holds")],
    )


def _change(to: StateType, name: str, why: str) -> ActionTypes:
    return ChangeFlowRunState(state=to, name=name, message=why, force=False)


def install(client: SyncPrefectClient) -> list[str]:
    """Create both automations, or bring them up to date; one that somebody switched off stays off. Their names.

    One that is as it should be is left alone: an update would forget which runs it is watching.
    """
    wanted = [dead_runs(), restarts()]
    for automation in wanted:
        standing = client.read_automations_by_name(automation.name)
        if not standing:
            client.create_automation(automation)
        for one in standing:
            if (one.trigger, one.actions) != (automation.trigger, automation.actions):
                client.update_automation(one.id, automation.model_copy(update={"enabled": one.enabled}))
    return [automation.name for automation in wanted]
