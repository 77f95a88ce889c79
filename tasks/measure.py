"""A few real questions of each stage that is due, so that a plan can say how long the rest will take.

The answers are kept as replies and asked by no later run. Publishes nothing but the rate.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from mllmsrec_core.errors import UsageError
from mllmsrec_core.stages import STAGES
from tasks.run_stage import model_name
from tasks.runner import How, run_rows
from tasks.stage_task import gather, standing
from tasks.work import Work


def measure(work: Work, env: str, n: int) -> dict[str, float]:
    """Ask up to `n` open questions of each stage whose inputs the environment shows; returns Asks per second by stage.

    A stage behind one that never ran has no inputs yet and is left out.
    """
    stages: dict[str, Any] = work.store.envs.current(env)["stages"]
    rates = {}
    for stage in STAGES:
        try:
            inputs, now = gather(work, stage, stages, stages)
        except UsageError:
            continue
        if stage.ask is None or stage.pinned or standing(work, stage, now, stages.get(stage.name)):
            continue
        inputs = replace(
            inputs,
            params={**inputs.params, stage.name: work.params[stage.name].model_copy(update={"max_error_rate": 1.0})},
        )
        started = time.monotonic()
        how = How(window=min(n, work.config.settings.window), most_asks=n)
        _, counts = run_rows(stage, inputs, stage.rows(inputs), work.store, work.engine_for, how)
        if counts.asked:
            rates[stage.name] = counts.asked / (time.monotonic() - started)
            work.store.envs.write_rate(stage.name, model_name(inputs), rates[stage.name])
    return rates
