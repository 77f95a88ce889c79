"""Shards: the open rows of a stage in parts that processes on other machines ask, before the stage itself runs.

A shard asks and the stage publishes. A shard makes the stage's rows as the stage does, keeps those that fall to it and
asks what is not known of them; it publishes nothing. The stage then finds the answers in the store, asks what a lost
shard left open, and publishes the tables it would publish alone. Knows nothing of Prefect or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import polars as pl

from mllmsrec_core import protocol
from mllmsrec_core.errors import TooManyErrors, UsageError
from mllmsrec_core.stage import Inputs, Stage
from tasks.carry import HASHES
from tasks.config import Config
from tasks.run_stage import unfinished
from tasks.runner import SPENT, Counts, Elsewhere, How, Unit, run_rows
from tasks.stage_task import STAGE_BY_NAME, code_digest, gather, standing
from tasks.work import Work

ROWS_A_SHARD = 8  # fewer are no work for a process of their own: starting a shard takes about 0.4 s of CPU
_OF_SHARDS = 0x5AAD  # keeps shards apart from samples and splits, which go by the same hash of the user


def refuse_unshared(config: Config) -> None:
    """Raises UsageError for what other processes cannot find: a store in memory, and paths relative to a folder."""
    store = config.settings.store
    if urlsplit(store).scheme == "memory":
        raise UsageError(f"the store `{store}` lies in this process's memory; shards need one that every node reaches")
    models = {config.params.model, *(getattr(params, "model", None) for params in config.stage_params().values())}
    named = {"settings.store": store, "ingest.path": config.stage_params()["ingest"].path}
    named |= {f"model {name}": name for name in models if name and Path(name).is_dir()}
    for what, where in named.items():
        path = local_path(where)
        if path and not Path(path).is_absolute():  # `~` is another folder on a node of another user
            raise UsageError(
                f"{what} = `{where}` is a relative path, and every shard must find the same: write {Path(path).resolve()} "
                "if every node sees it there, or a URL such as s3://bucket/store"
            )


def local_path(where: str | None) -> str:
    """The path behind a local URL or a plain path; empty for nothing and for what lies elsewhere."""
    parts = urlsplit(where or "")
    return parts.netloc + parts.path if parts.scheme in ("", "file", "local") else ""


@dataclass(frozen=True)
class Share:
    """One of `of` parts of a stage's rows, counted from 0."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number + 1} of {self.of}"

    def keep(self, rows: pl.DataFrame, column: str) -> pl.DataFrame:
        """The rows that fall to this part, in their order: by a hash of `column`, the same on every machine."""
        place = protocol.mix(protocol.hashes(rows[column].fill_null("")), _OF_SHARDS) % self.of
        return rows.filter(pl.Series(place == self.number))


def divided_by(stage: Stage, inputs: Inputs) -> str:
    """The column whose equal values stay in one shard: rows that begin alike are then asked by one engine.

    The first of the unit's columns (user, item, picture); the item where prompts for `score` begin with the picture.
    """
    image_first = stage.name == "score" and inputs.params["score"].layout == "image_first"
    return "item_id" if image_first else stage.unit[0]


def divisible(work: Work, stage: Stage) -> bool:
    """Whether a stage has rows to divide. Pictures in a folder may be seen from this machine alone."""
    if stage.name == "images" and local_path(work.params["ingest"].path):
        return False
    return stage.ask is not None and bool(stage.unit)


def number_of_shards(
    work: Work,
    name: str,
    stages: Mapping[str, Any],
    how: How,
    before: Mapping[str, Any] | None = None,
    retrain: bool = False,
) -> int:
    """Into how many shards the stage is divided now, at most `settings.shards`; 0 where it is left whole.

    Whole are stages whose record stands, those with few open rows, and any in a retry, which asks each failure once.
    """
    stage = STAGE_BY_NAME[name]
    if how.retry or not divisible(work, stage):
        return 0
    inputs, now = gather(work, stage, stages, before)
    if standing(work, stage, now, (before or {}).get(name), retrain):
        return 0
    shards = min(work.config.settings.shards, len(_open(work, stage, inputs, now, how, before)) // ROWS_A_SHARD)
    return shards if shards > 1 else 0


def answer(
    work: Work,
    name: str,
    share: Share,
    stages: Mapping[str, Any],
    how: How,
    before: Mapping[str, Any] | None = None,
    code: str = "",
) -> Counts:
    """Ask what is open in one share of the stage's rows; everything answered is durable when this returns.

    Too many failed rows end the share and nothing else: the stage meets the same failures and judges them. Raises
    UsageError where `code`, the digest of the package that divided the rows, is not this package's.
    """
    if code and code != code_digest():
        raise UsageError(
            f"{name}, shard {share}: this machine has another version of the package or of polars than the run; "
            "install the same on every node, and start Ray's nodes again"
        )
    if held := work.store.forgotten.at_work():
        raise UsageError(f"{held}; run again when it is done")
    stage = STAGE_BY_NAME[name]
    inputs, now = gather(work, stage, stages, before)
    work.store.replies.refresh()  # this process may have looked at the store before, for another stage
    rows = share.keep(_open(work, stage, inputs, now, how, before), divided_by(stage, inputs))
    counts, how = Counts(rows=len(rows)), replace(how, part=f".{share.number}of{share.of}")
    with suppress(TooManyErrors):
        run_rows(stage, inputs, rows, work.store, work.engine_for, how, counts, _drop)
    return counts


def together(counts: list[Counts], seconds: float) -> Elsewhere:
    """What the shards that returned have asked, and how long all of them took."""
    summed = Counts()
    for one in counts:
        for name in ("rows", "done", "failed", "known", "asked", "unreached", "passing", *SPENT):
            setattr(summed, name, getattr(summed, name) + getattr(one, name))
    return Elsewhere(summed, seconds, len(counts))


def _drop(units: list[Unit]) -> None:
    """What a shard finishes is made again by the stage, from the answers."""


def _open(
    work: Work, stage: Stage, inputs: Inputs, now: dict[str, Any], how: How, before: Mapping[str, Any] | None
) -> pl.DataFrame:
    """The rows for which nothing is carried over, each with its place `__row`."""
    rows = stage.rows(inputs)
    if work.sample:
        rows = work.sample.keep(rows)
    _, _, kept = unfinished(work.store, stage, rows, now, how, (before or {}).get(stage.name))
    return kept.rest.drop(*HASHES)
