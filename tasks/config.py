"""What one run is told, in two kinds that are kept apart.

`Pipeline` holds Params: whatever would change a byte of output. `Settings` never would: where things lie, which engine
answers, how many at once. Knows nothing of profiles or of where values come from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from mllmsrec_core.ask import canonical
from mllmsrec_core.stage import Params, in_order
from mllmsrec_core.stages import STAGES


class Settings(BaseModel):
    """How a run goes; no field changes what it publishes."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=in_order)

    store: str = Field(default="./store", description="any fsspec URL")
    env: str = Field(default="dev", description="the environment the run publishes to")
    engine: Literal["transformers", "vllm", "openai"] = Field(
        default="transformers", description="who answers for models other than `scripted`"
    )
    runner: Literal["threads", "ray"] = Field(
        default="threads",
        description="ray: processes of a Ray cluster ask a stage's questions, each a share of its rows",
    )
    shards: int = Field(
        default=16, ge=1, description="ray: most shares of a stage; 16 for each GPU spread a lost node's"
    )
    gpus_per_shard: float = Field(default=0.0, ge=0, description="ray: devices one shard holds; may be a fraction")
    ray_address: str = Field(
        default="", description="ray: HOST:PORT of a running cluster; default: one on this machine, for the run alone"
    )
    device: str = Field(default="auto", description="auto, cpu or cuda")
    batch_size: int = Field(default=32, ge=1, description="rows per forward pass")
    window: int = Field(default=256, ge=1, description="rows in flight")
    flush_rows: int = Field(default=2_000, ge=1, description="at most this many answers are asked again after a kill")
    flush_seconds: float = Field(default=5.0, gt=0, description="an answer waits at most this long to become durable")
    allow_hosts: tuple[str, ...] = Field(
        default=(), description="hosts images may come from although they are not public"
    )
    image_roots: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="folders or URLs, besides the dataset's own, below which pictures may be read"
    )
    keep_images: Literal["copy", "reference"] = Field(
        default="copy",
        description="pictures in files are copied into the store, or stay where they are unless scaled down",
    )
    scratch: str = Field(default="", description="local folder for training checkpoints; default: beside a local store")
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="vllm: most room for prompt and answer, in tokens; it takes what the questions need, up to this",
    )
    picture_cache_gb: float | None = Field(
        default=None,
        ge=0,
        description="vllm: memory for processed pictures; default: 0, and 4 once pictures come again",
    )
    eager: bool = Field(default=False, description="vllm: no compilation; starts faster, answers slower")
    vllm: dict[str, Any] = Field(
        default_factory=dict, description="vllm: further engine arguments (gpu_memory_utilization, max_num_seqs, ...)"
    )
    endpoints: tuple[str, ...] = Field(default=(), description="openai: addresses that end in /v1; the load is shared")
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="openai: the environment variable that holds the key"
    )
    concurrency: int = Field(default=64, ge=1, description="openai: most requests at once at each endpoint")
    timeout_s: float = Field(
        default=300.0, gt=0, description="openai: a request without an answer for so long is tried again"
    )
    retries: int = Field(default=6, ge=0, description="openai: tries after the first")
    top_logprobs: int = Field(default=20, ge=1, description="openai: how many likeliest tokens the server gives")
    served_as: dict[str, str] = Field(
        default_factory=dict, description="openai: model name -> the name it is served under"
    )
    adapters: dict[str, str] = Field(
        default_factory=dict, description="openai: sha256 of an adapter -> the name it is served under"
    )
    adapter_folder: str = Field(
        default="", description="openai: a folder that the vLLM servers see too, to load adapters from"
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="fsspec options of the store (endpoint_url, profile, ...); never a secret"
    )
    price_in: float | None = Field(default=None, ge=0, description="money per million tokens read, for `plan`")
    price_out: float | None = Field(default=None, ge=0, description="money per million tokens written, for `plan`")
    currency: str = Field(default="", description="what the prices are in, as `plan` shows it")
    stage_timeout_minutes: float | None = Field(
        default=None, gt=0, description="a stage at work for longer is ended and keeps what it asked; default: none"
    )
    min_metrics: dict[str, float] = Field(
        default_factory=dict,
        description="least values of the model's metrics (auc, ndcg@10, ...); below one, mllmsrec.metric.below is sent",
    )
    min_coverage: float = Field(
        default=1.0, ge=0, le=1, description="`promote` refuses tables with fewer rows up to date"
    )
    scripted_seconds: float = Field(
        default=0.0, ge=0, description="how long a scripted answer takes, to rehearse a run"
    )

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Settings:
        from storage.files import refuse_secrets  # fsspec is slow to import, and `--help` needs none of it

        refuse_secrets(self.store, self.storage_options)
        refuse_secrets("", self.vllm)
        for url in (*self.image_roots, *self.endpoints):
            refuse_secrets(url, {})
        return self


class Options(BaseModel):
    """What one run is asked besides its configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=in_order)

    sample: int = Field(default=0, ge=0, description="only this many users, and the items they touch; 0: everyone")
    retry: tuple[str, ...] = Field(default=(), description="ask failures of these classes again; `all` for every class")
    retrain: bool = Field(default=False, description="train anew although the environment pins an adapter")
    budget_minutes: float | None = Field(
        default=None, gt=0, description="start no row after this long, and publish what is there"
    )
    order: Literal["given", "active"] = Field(
        default="given", description="active: the users with the most recent clicks, and the most used items, go first"
    )


class Models(Params):
    """The model of every stage that names none of its own; `scripted` needs no weights at all."""

    model: str = Field(default="embedded-vlm", description="hub id or folder, for stages that name none")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the weights in use; auto: float32 for the embedded models, bfloat16 for others"
    )
    quantisation: Literal["none", "nf4"] = Field(default="none", description="nf4: weights in 4 bits (bitsandbytes)")


Pipeline: type[Models] = create_model(
    "Pipeline",
    __base__=Models,
    **{stage.name: (stage.params, Field(default_factory=stage.params)) for stage in STAGES},  # type: ignore[call-overload]
)


@dataclass(frozen=True)
class Config:
    """Everything one run is told."""

    settings: Settings
    params: Models  # a Pipeline

    def stage_params(self) -> dict[str, Any]:
        """Stage name -> its Params."""
        return {stage.name: getattr(self.params, stage.name) for stage in STAGES}

    @property
    def place(self) -> str:
        """`dataset-environment`: names its deployments, their queue, its runs and what they show."""
        return f"{self.stage_params()['ingest'].dataset}-{self.settings.env}"

    def shown_as(self, sample: int = 0) -> str:
        """`place`, and the size of a sample: what a run shows of it must not be taken for the whole."""
        return f"{self.place}-sample-{sample}" if sample else self.place

    def to_json(self) -> str:
        """One line that travels to another process and names this configuration."""
        return canonical(
            {"settings": self.settings.model_dump(mode="json"), "params": self.params.model_dump(mode="json")}
        )

    @classmethod
    def from_json(cls, text: str) -> Config:
        values = json.loads(text)
        return cls(Settings.model_validate(values["settings"]), Pipeline.model_validate(values["params"]))
