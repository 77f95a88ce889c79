"""What every stage of one run shares: the store, the parameters, resolved models, the source, and open engines.

Engines open at their first question and live as long as the process, so a stage that is reused loads no model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import polars as pl

from mllmsrec_core.ask import Ask, Choose, Embed, Fetch, Generate, Model, Train
from mllmsrec_core.stage import Stage
from storage.source import FsspecSource
from storage.store import Store
from tasks import models
from tasks.config import Config, Settings
from tasks.engines import Engine
from tasks.engines.scripted import MODEL as SCRIPTED
from tasks.engines.scripted import ScriptedEngine
from tasks.loop import ENGINE_LOOP


@dataclass(frozen=True)
class Sample:
    """The users a sample run looks at, and every item their histories and candidates touch."""

    users: frozenset[str]
    items: frozenset[str]
    n: int

    def keep(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Rows of these users; other rows as they are."""
        return rows.filter(pl.col("user_id").is_in(self.users)) if "user_id" in rows.columns else rows

    def narrow(self, stage: Stage, tables: Mapping[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
        """Stages about items alone see these items; those that read histories keep the catalogue they draw from."""
        if "interactions" in stage.reads:
            return dict(tables)
        return {
            name: frame.filter(pl.col("item_id").is_in(self.items)) if name == "items" else frame
            for name, frame in tables.items()
        }


class Engines:
    """The engine for each Ask, opened when it is first needed."""

    def __init__(
        self, store: Store, settings: Settings, locations: Mapping[str, str], image_roots: tuple[str, ...]
    ) -> None:
        self.store, self.settings, self.locations, self.image_roots = store, settings, locations, image_roots
        self._open: dict[str, Engine] = {}

    def __call__(self, ask: Ask) -> Engine:
        name = "scripted" if not isinstance(ask, Fetch) and ask.model.name == SCRIPTED.name else _ENGINE_OF[type(ask)]
        if name not in self._open:
            self._open[name] = getattr(self, f"_open_{name}")()
        return self._open[name]

    def drop(self) -> None:
        """Forget every open engine; the next question opens a fresh one."""
        engines, self._open = self._open, {}
        for engine in engines.values():
            with suppress(Exception):  # a broken engine may fail to close too
                ENGINE_LOOP.run(engine.close())

    def _open_scripted(self) -> Engine:
        return ScriptedEngine(self.store.blobs, self.settings.scripted_seconds)

    def _open_fetch(self) -> Engine:
        from tasks.engines.fetch import FetchEngine

        settings = self.settings
        return FetchEngine(
            self.store.blobs, allow_roots=self.image_roots, allow_hosts=settings.allow_hosts, keep=settings.keep_images
        )

    def _open_model(self) -> Engine:
        return {"transformers": self._transformers, "vllm": self._vllm, "openai": self._openai}[self.settings.engine]()

    def _transformers(self) -> Engine:
        from tasks.engines.transformers import TransformersEngine

        settings = self.settings
        return TransformersEngine(
            self.store.blobs, self.locations, batch_size=settings.batch_size, device=settings.device
        )

    def _vllm(self) -> Engine:
        from tasks.engines.vllm import VllmEngine

        settings = self.settings
        return VllmEngine(
            self.store.blobs,
            self.locations,
            max_model_len=settings.max_model_len,
            picture_cache_gb=settings.picture_cache_gb,
            eager=settings.eager,
            options=settings.vllm,
        )

    def _openai(self) -> Engine:
        from tasks.engines.openai import OpenAIEngine

        settings = self.settings
        return OpenAIEngine(
            self.store.blobs,
            self.locations,
            endpoints=settings.endpoints,
            api_key_env=settings.api_key_env,
            concurrency=settings.concurrency,
            timeout_s=settings.timeout_s,
            retries=settings.retries,
            top_logprobs=settings.top_logprobs,
            served_as=settings.served_as,
            adapters=settings.adapters,
            adapter_folder=settings.adapter_folder,
        )

    def _open_clip(self) -> Engine:
        from tasks.engines.clip import ClipEngine

        return ClipEngine(self.store.blobs, self.locations, device=self.settings.device)

    def _open_train(self) -> Engine:
        from tasks.engines.train import TrainEngine

        scratch = self.settings.scratch or _scratch_beside(self.store)
        return TrainEngine(self.store.blobs, self.locations, scratch=scratch, device=self.settings.device)


_ENGINE_OF: dict[type, str] = {Fetch: "fetch", Generate: "model", Choose: "model", Embed: "clip", Train: "train"}


def _scratch_beside(store: Store) -> str:
    """Training checkpoints are local files; beside a local store they survive a restart."""
    return os.path.join(store.files.root, "scratch") if store.files.local else tempfile.mkdtemp(prefix="mllmsrec-")


@dataclass(frozen=True)
class Work:
    """What every stage of one run shares. `models` holds the resolved model of each stage that names one."""

    config: Config
    store: Store
    params: Mapping[str, Any]
    models: Mapping[str, Model]
    source: FsspecSource
    engine_for: Engines
    sample: Sample | None = field(default=None)


@cache
def open_work(config_json: str) -> Work:
    """The same Work for the same configuration within a process, so that loaded models serve every stage."""
    config = Config.from_json(config_json)
    settings, params = config.settings, config.stage_params()
    store = Store(settings.store, settings.flush_rows, settings.flush_seconds, settings.storage_options)
    resolved = {
        name: _resolve(config, stage_params) for name, stage_params in params.items() if hasattr(stage_params, "model")
    }
    locations = {model.slug: location for model, location in resolved.values()}
    more = tuple(FsspecSource(root).uri("") for root in settings.image_roots)
    source = FsspecSource(params["ingest"].path or ".", more)
    roots = source.roots if params["ingest"].path else more
    engines = Engines(store, settings, locations, roots)
    return Work(config, store, params, {name: model for name, (model, _) in resolved.items()}, source, engines)


def _resolve(config: Config, stage_params: Any) -> tuple[Model, str]:
    name = stage_params.model or config.params.model
    found = models.resolve(
        name, config.params.dtype, config.params.quantisation, getattr(stage_params, "max_pixels", None)
    )
    return found.model, found.location


def environment(config: Config, sample: int) -> str:
    """A sample publishes beside its environment, never into it."""
    return f"{config.settings.env}.sample{sample}" if sample else config.settings.env
