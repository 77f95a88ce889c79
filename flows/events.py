"""What a run tells Prefect's automations: which stage published, where an environment moved, and the metrics.

Events go to a server only: without one nothing could react to them. Knows nothing of who reacts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings

from mllmsrec_core.errors import nearest
from tasks.config import Config

TAG = "mllmsrec"  # on every deployment and event, and so on every run of a deployment
PUBLISHED = "mllmsrec.stage.published"
MOVED = "mllmsrec.environment.moved"
METRIC = "mllmsrec.metric"
BELOW = "mllmsrec.metric.below"


def published(config: Config, name: str, record: Mapping[str, Any]) -> None:
    """A stage has published new tables."""
    counts = record["counts"]
    payload = {
        "fingerprint": record["fingerprint"],
        "rows": {table: pointer["rows"] for table, pointer in record["tables"].items()},
        **{count: counts[count] for count in ("asked", "known", "failed", "unreached")},
        **{part: record[part] for part in ("coverage", "seconds")},
    }
    _emit(PUBLISHED, config, "stage", name, payload)


def moved(config: Config, env: str, seq: int, stages: list[str]) -> None:
    """An environment shows a new state."""
    _emit(MOVED, config, "environment", env, {"seq": seq, "stages": stages})


def metrics(config: Config, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """The model's metrics on all test users, by name, as the table `metrics` has them; and those below their bar."""
    for name, row in figures.items():
        _emit(METRIC, config, "metric", name, dict(row))
    for name, least in config.settings.min_metrics.items():
        if name not in figures:
            get_run_logger().warning("settings.min_metrics: there is no metric `%s`; %s", name, nearest(name, figures))
        elif (value := figures[name]["value"]) is not None and value < least:
            get_run_logger().warning("%s = %.4f is below %g, its bar in settings.min_metrics", name, value, least)
            _emit(BELOW, config, "metric", name, {**figures[name], "name": name, "least": least})


def _emit(event: str, config: Config, kind: str, name: str, payload: dict[str, Any]) -> None:
    if get_current_settings().api.url:
        resource = {
            "prefect.resource.id": f"mllmsrec.{kind}.{config.place}.{name}",
            "prefect.resource.name": f"{name} of {config.place}",
        }
        tag = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
        emit_event(event, resource=resource, related=[tag], payload={"place": config.place, **payload})
