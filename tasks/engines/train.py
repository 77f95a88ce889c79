"""The train engine: a LoRA or QLoRA adapter by TRL and peft, from examples rendered as scoring renders them.

The loss is on the answer only. Training can be killed at any moment: the next run goes on from the last whole
checkpoint. Knows nothing of users, candidates or labels.
"""

from __future__ import annotations

import asyncio
import gc
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mllmsrec_core.ask import Ask, Example, Model, Reply, Train, key, kind
from mllmsrec_core.errors import AskError, EngineError
from mllmsrec_core.recipe import Recipe
from storage.blobs import Blobs
from tasks import torchvision_guard
from tasks.engines.adapters import pack
from tasks.engines.chat import Chat, Prompt
from tasks.engines.checkpoint import keep_gradients, open_checkpoint, place

CHECKPOINT_EVERY = 50  # steps; an interrupted run repeats at most so many
POINTS = 50  # of the loss curve, enough to draw it
_WHOLE = ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
_IGNORED = -100  # torch's cross entropy leaves such labels out


class TrainEngine:
    """Answers Train, one at a time.

    `locations` maps a model's slug to its folder or hub id; `scratch` holds checkpoints, one folder per Ask. The same
    Ask on the same machine gives the same bytes, interrupted or not. Cancelling `answer` stops the training at a fresh
    checkpoint; the folder is removed once the adapter is a blob.
    """

    answers: frozenset[type[Ask]] = frozenset({Train})
    name = "train"

    def __init__(
        self,
        blobs: Blobs,
        locations: Mapping[str, str],
        *,
        scratch: str,
        device: str = "auto",
        checkpoint_every: int = CHECKPOINT_EVERY,
    ) -> None:
        self.blobs, self.locations, self.scratch = blobs, locations, Path(scratch)
        self.device, self.checkpoint_every = device, checkpoint_every
        self._turn = asyncio.Lock()

    async def answer(self, ask: Ask) -> Reply:
        """The adapter's blob and its loss curve; `tokens_in` counts the tokens trained on, padding left out."""
        if not isinstance(ask, Train):
            raise EngineError(f"{self.name} answers train, not {kind(ask)}; name another engine for it.")
        stop = threading.Event()
        async with self._turn:
            work = asyncio.ensure_future(asyncio.to_thread(self._train, ask, stop))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                stop.set()
                await asyncio.wait([work])
                work.exception()  # looked at, so that asyncio does not report it as lost
                raise

    async def close(self) -> None:
        """Nothing is kept between two Asks."""

    def _train(self, ask: Train, stop: threading.Event) -> Reply:
        recipe = Recipe.from_json(ask.recipe)
        if not ask.examples:
            raise EngineError(f"the training set {ask.digest[:12]} is empty; widen the split or lower its filters.")
        if ask.model.adapter:
            raise EngineError(f"{ask.model.slug} already wears an adapter; train on the base model.")
        started = time.perf_counter()
        folder = self.scratch / key(ask).hex()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run = _Run.start(ask, recipe, self, folder, stop)
            run.trainer.train(resume_from_checkpoint=_last(folder))
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"no memory to train {ask.model.slug} at batch size {recipe.batch_size}: {error}. Lower `batch_size` "
                "and raise `accumulate` by the same factor, or use strategy `qlora`."
            ) from error
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineError(
                f"training {ask.model.slug} failed: {type(error).__name__}: {error}. Its checkpoints are kept "
                f"in {folder}; mend the cause and repeat the command."
            ) from error
        if stop.is_set():
            raise EngineError(f"training of {ask.model.slug} was stopped; repeat the command to go on from {folder}.")
        reply = run.reply(self.blobs, ask.model)
        shutil.rmtree(folder)
        del run
        _free()
        return replace(reply, seconds=time.perf_counter() - started, engine=self.name)


@dataclass
class _Run:
    """One training: the trainer and what it has been given."""

    trainer: Any

    @classmethod
    def start(cls, ask: Train, recipe: Recipe, engine: TrainEngine, folder: Path, stop: threading.Event) -> _Run:
        """Load the base, quantise it if asked, and set up TRL."""
        torchvision_guard.install()
        from transformers.trainer_callback import PrinterCallback
        from trl.trainer.sft_trainer import SFTTrainer

        device = place(engine.device)
        weights = replace(ask.model, max_pixels=None)
        if recipe.strategy == "qlora":
            weights = replace(weights, quantisation="nf4")
        # eager attention: twice as fast as sdpa in training short sequences on a CPU (measured)
        front, network = open_checkpoint(weights, engine.locations, device, "eager" if device == "cpu" else None)
        chat = Chat(front, engine.blobs, ask.model.slug)
        network = _prepared(network, recipe, device)
        n_train, n_all = len(ask.examples), len(ask.examples) + len(ask.validation)
        trainer = SFTTrainer(
            model=network,
            args=_arguments(recipe, ask, folder, device, engine.checkpoint_every),
            data_collator=_Collator(chat, ask, network),  # type: ignore[arg-type]
            train_dataset=_places(0, n_train),
            eval_dataset=_places(n_train, n_all) if ask.validation else None,
            processing_class=front,
            peft_config=_lora(recipe),
            callbacks=[_stopper(stop)],
        )
        trainer.remove_callback(PrinterCallback)
        return cls(trainer)

    def reply(self, blobs: Blobs, base: Model) -> Reply:
        """Keep the adapter as a blob; its curve and token count come from the trainer's own log."""
        state = self.trainer.state
        curve = curves(state.log_history)
        if not all(math.isfinite(number) for point in curve for number in point.values()):
            raise EngineError(f"training {base.slug} diverged: the loss is no number. Lower `lr` or raise `warmup`.")
        with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
            network = self.trainer.accelerator.unwrap_model(self.trainer.model)
            network.save_pretrained(folder, save_embedding_layers=False)
            sha256 = blobs.put(pack(Path(folder), base.slug))
        return Reply({"sha256": sha256, "curves": curve}, tokens_in=int(state.num_input_tokens_seen))


def curves(log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """`{"step", "loss", "lr"}` per logged step, with `val_loss` where the validation set was measured."""
    points: dict[int, dict[str, float]] = {}
    for entry in log:
        point = points.setdefault(entry["step"], {"step": entry["step"]})
        for name, source in (("loss", "loss"), ("lr", "learning_rate"), ("val_loss", "eval_loss")):
            if source in entry:
                point[name] = float(entry[source])
    return [point for _, point in sorted(points.items()) if "loss" in point or "val_loss" in point]


def _prepared(network: Any, recipe: Recipe, device: str) -> Any:
    """The base with frozen weights, ready for LoRA layers over it."""
    if recipe.strategy == "qlora":
        from peft import prepare_model_for_kbit_training

        network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=device != "cpu")
        keep_gradients(network)
    network.config.use_cache = False
    return network


def _lora(recipe: Recipe) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.targets,
        task_type="CAUSAL_LM",
    )


def _arguments(recipe: Recipe, ask: Train, folder: Path, device: str, checkpoint_every: int) -> Any:
    """TRL's settings: the recipe's, and those that change no weight."""
    from trl.trainer.sft_config import SFTConfig

    per_epoch = math.ceil(len(ask.examples) / (recipe.batch_size * recipe.accumulate))
    every = max(1, math.ceil(per_epoch * recipe.epochs) // POINTS)
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        optim="adamw_torch",
        seed=recipe.seed,
        data_seed=recipe.seed,
        completion_only_loss=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        eval_strategy="epoch" if ask.validation else "no",
        prediction_loss_only=True,
        logging_nan_inf_filter=False,
        logging_steps=every,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps",
        save_steps=checkpoint_every,
        save_total_limit=2,
        bf16=ask.model.dtype == "bfloat16",
        fp16=ask.model.dtype == "float16",
        use_cpu=device == "cpu",
        gradient_checkpointing=device != "cpu",
        dataloader_num_workers=0,
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
        report_to="none",
    )


def _places(start: int, stop: int) -> Any:
    """Examples stand in the trainer's dataset as their places; the collator renders them when they are due."""
    from datasets import Dataset

    return Dataset.from_dict({"place": list(range(start, stop))})


class _Collator:
    """A batch of examples as tensors, rendered by the same template as in answering, labels on the answer only."""

    def __init__(self, chat: Chat, ask: Train, network: Any) -> None:
        self.chat, self.ask = chat, ask
        self.room: int | None = getattr(network.config.get_text_config(), "max_position_embeddings", None)

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        prompts: list[Prompt] = []
        answers: list[int] = []
        for row in rows:
            try:
                prompt, answer = self._prompt(self._example(row["place"]))
            except AskError as error:
                raise self._named(row["place"], error) from error
            prompts.append(prompt)
            answers.append(answer)
        encoded = self.chat.encode(prompts, self.room, side="right")
        for place_, error in encoded.failed.items():
            raise self._named(rows[place_]["place"], error)
        tensors = dict(encoded.tensors)
        tensors["labels"] = _labels(tensors["input_ids"], tensors["attention_mask"], answers)
        return tensors

    def _example(self, place_: int) -> Example:
        n_train = len(self.ask.examples)
        return self.ask.examples[place_] if place_ < n_train else self.ask.validation[place_ - n_train]

    def _prompt(self, example: Example) -> tuple[Prompt, int]:
        """The prompt with its answer, and the answer's tokens. A template that rewrites the prompt is set aside."""
        prompt = self.chat.prompt(example.messages, self.ask.model.max_pixels)
        whole = self.chat.render(example.messages, example.answer)
        if not whole.startswith(prompt.text):
            whole = prompt.text + example.answer + (self.chat.tokenizer.eos_token or "")
        return replace(prompt, text=whole), len(self.chat.ids(whole)) - len(self.chat.ids(prompt.text))

    def _named(self, place_: int, error: AskError) -> AskError:
        n_train = len(self.ask.examples)
        where = f"example {place_}" if place_ < n_train else f"validation example {place_ - n_train}"
        return type(error)(f"{where} of {self.ask.digest[:12]}: {error}")


def _labels(ids: torch.Tensor, mask: torch.Tensor, answers: Sequence[int]) -> torch.Tensor:
    """`ids` where the answer stands (the last `answers[row]` tokens before the padding), else ignored."""
    ends = mask.sum(dim=1, keepdim=True)
    starts = ends - torch.tensor(answers).unsqueeze(1)
    places = torch.arange(ids.shape[1]).unsqueeze(0)
    return ids.masked_fill((places < starts) | (places >= ends), _IGNORED)


def _stopper(stop: threading.Event) -> Any:
    """A trainer callback that ends the training at a fresh checkpoint once `stop` is set."""
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if stop.is_set():
                control.should_save = control.should_training_stop = True
            return control

    return Stopper()


def _last(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; a newer half-written one is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if all((checkpoint / name).is_file() for name in _WHOLE):
            return str(checkpoint)
        shutil.rmtree(checkpoint)
    return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
