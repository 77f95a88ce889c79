"""The transformers engine: Generate and Choose on any chat model that transformers can load, on a CPU or a GPU.

The embedded default, and the reference that other engines are compared with: at float32 an answer does not depend on
the rows it shares a batch with, beyond rounding. Choose reads what prompts begin alike with once. Knows nothing of
stages; adapters and pictures come from blobs.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllmsrec_core.ask import Ask, Choose, Generate, Model, Reply, kind, pictures_in
from mllmsrec_core.ask import key as key_of
from mllmsrec_core.errors import AskError, EmptyReply, EngineError, MllmsrecError
from storage.blobs import Blobs
from tasks.engines.adapters import unpack
from tasks.engines.answers import no_numbers, probable
from tasks.engines.batching import Batcher, Outcome
from tasks.engines.chat import Chat, Encoded, Prompt, mark
from tasks.engines.checkpoint import open_checkpoint
from tasks.engines.reader import NO_WORD, Reader

BATCH_SIZE = 32  # measured best of 8, 32, 64 for a small model on one CPU thread
Question = Generate | Choose


class TransformersEngine:
    """Answers Generate and Choose.

    `locations` maps a model's slug to its folder or hub id. Weights are loaded at the first Ask that needs them and
    stay until `close`. Greedy at temperature 0; above it each row draws from a generator of its own, seeded by the
    Ask's key, so a sampled text does not depend on batch mates either. Tokens are counted without padding, the
    end-of-turn token with the answer.

    Waiting Choose are batched by what they begin alike with, and each beginning is computed once per batch, unless
    `share` is off; of Generate what the whole batch begins with. A picture is decoded once per batch. A Reply's
    tokens_in is the whole prompt in any case; `tokens_computed` is what was computed.
    """

    answers: frozenset[type[Ask]] = frozenset({Generate, Choose})

    def __init__(
        self,
        blobs: Blobs,
        locations: Mapping[str, str],
        *,
        batch_size: int = BATCH_SIZE,
        device: str = "auto",
        name: str = "transformers",
        share: bool = True,
    ) -> None:
        self.blobs, self.locations, self.device, self.name, self.share = blobs, locations, device, name, share
        self._loaded: dict[Model, _Loaded] = {}
        self._computed = 0  # by models that were freed
        self._counters = {"prompt_tokens": 0, "reused_tokens": 0, "images": 0}
        self._batches = Batcher[Question](name, batch_size, _group, self._size, self._run)

    async def answer(self, ask: Ask) -> Reply:
        """The model's text, or its raw log-probabilities at the first answer token."""
        if not isinstance(ask, Generate | Choose):
            raise EngineError(f"{self.name} answers generate and choose, not {kind(ask)}; name another engine for it.")
        return await self._batches.submit(ask)

    @property
    def tokens_computed(self) -> int:
        """Tokens of prompts and answers that went through a network since the engine was made, without padding."""
        return self._computed + sum(loaded.reader.tokens for loaded in self._loaded.values())

    def counters(self) -> dict[str, int]:
        """Totals over the engine's life, of the batches that are done: see `tasks.engines.Counting`.

        A beginning is read once per batch. What a network's first batch reads twice, to compare, is not taken
        off.
        """
        return dict(self._counters)

    async def close(self) -> None:
        """Free the models."""
        await self._batches.close(self._free)

    def _free(self) -> None:
        for loaded in self._loaded.values():
            loaded.folder.cleanup()
        self._computed = self.tokens_computed
        self._loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _open(self, model: Model) -> _Loaded:
        weights = replace(model, adapter=None, max_pixels=None)
        if weights not in self._loaded:
            front, network = open_checkpoint(weights, self.locations, self.device)
            self._loaded[weights] = _Loaded(network, Chat(front, self.blobs, model.slug), self.share)
        return self._loaded[weights]

    def _size(self, ask: Question) -> int | tuple[int, ...]:
        """Tokens of the text alone, as within a group every row has as many pictures; of a Choose the tokens."""
        marks = self._open(ask.model).chat.marks(ask.messages)
        return marks if self.share and isinstance(ask, Choose) else len(marks)

    def _run(self, asks: list[Question]) -> list[Outcome]:
        started = time.perf_counter()
        loaded = self._open(asks[0].model)
        outcomes: dict[int, Outcome] = {}
        prompts: dict[int, Prompt] = {}
        decoded: dict[tuple[str, int | None], Image.Image] = {}  # neighbours show the same pictures
        for place, ask in enumerate(asks):
            try:
                prompts[place] = loaded.chat.prompt(ask.messages, ask.model.max_pixels, decoded=decoded)
            except EngineError:
                raise
            except MllmsrecError as error:
                outcomes[place] = error
        places = list(prompts)
        once = self.share and isinstance(asks[0], Choose)
        encoded = loaded.chat.encode(list(prompts.values()), loaded.room(asks[0]), once=once)
        outcomes |= {places[place]: error for place, error in encoded.failed.items()}
        fitting = [places[place] for place in encoded.places]
        if fitting:
            shown, reused = [prompts[p] for p in fitting], loaded.reader.reused
            with loaded.wearing(asks[0].model.adapter, self.blobs), torch.inference_mode():
                answers = loaded.answer([asks[p] for p in fitting], shown, encoded)
            self._counters["prompt_tokens"] += int(encoded.tensors["attention_mask"].sum())
            self._counters["reused_tokens"] += loaded.reader.reused - reused
            self._counters["images"] += sum(len(prompt.pictures) for prompt in shown)
            outcomes |= dict(zip(fitting, answers, strict=True))
        seconds = (time.perf_counter() - started) / len(asks)
        return [self._signed(outcomes[place], seconds) for place in range(len(asks))]

    def _signed(self, outcome: Outcome, seconds: float) -> Outcome:
        return replace(outcome, engine=self.name, seconds=seconds) if isinstance(outcome, Reply) else outcome


def _group(ask: Question) -> Hashable:
    """Same question form, weights, adapter, decoding or choices, and as many pictures."""
    pictures = len(pictures_in(ask.messages))
    how = ask.decoding if isinstance(ask, Generate) else ask.choices
    return kind(ask), ask.model, how, pictures


class _Loaded:
    """One model in memory: its network, its chat front and the adapters put on so far."""

    def __init__(self, network: Any, chat: Chat, share: bool) -> None:
        from transformers import GenerationConfig

        self.network, self.chat = network, chat
        self.reader = Reader(network, chat.picture_token, chat.name, share)
        self.folder = tempfile.TemporaryDirectory(prefix="adapters-")
        self._peft: Any = None
        stops = network.generation_config.eos_token_id if network.generation_config else None
        self.stops = sorted({*_listed(stops), *_listed(chat.tokenizer.eos_token_id)})
        self.positions: int | None = getattr(network.config.get_text_config(), "max_position_embeddings", None)
        # A checkpoint's own sampling defaults (temperature, repetition penalty) are no part of an Ask.
        network.generation_config = GenerationConfig(
            eos_token_id=self.stops, pad_token_id=chat.tokenizer.pad_token_id, bos_token_id=chat.tokenizer.bos_token_id
        )

    def room(self, ask: Question) -> int | None:
        """How many tokens a prompt may have, so that the whole answer still fits the positions."""
        written = ask.decoding.max_tokens if isinstance(ask, Generate) else 0
        return None if self.positions is None else self.positions - written

    @contextlib.contextmanager
    def wearing(self, adapter: str | None, blobs: Blobs) -> Iterator[None]:
        """The network with `adapter` on, or as it was made; weights are never merged."""
        if adapter is None:
            with self._peft.disable_adapter() if self._peft else contextlib.nullcontext():
                yield
            return
        worn = self._put_on(adapter, blobs)
        worn.set_adapter(adapter)
        yield

    def _put_on(self, adapter: str, blobs: Blobs) -> Any:
        """The network with LoRA layers that hold `adapter` among others."""
        from peft import PeftModel

        if self._peft is not None and adapter in self._peft.peft_config:
            return self._peft

        folder = Path(self.folder.name, adapter)
        unpack(blobs.get(adapter), folder)
        try:
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self.network, str(folder), adapter_name=adapter)
            else:
                self._peft.load_adapter(str(folder), adapter_name=adapter)
        except (ValueError, RuntimeError, KeyError) as error:
            raise EngineError(
                f"adapter {adapter[:12]} does not fit {self.chat.name}: {error}. Use the base model it was trained on."
            ) from error
        return self._peft.eval()

    def answer(self, asks: Sequence[Question], prompts: Sequence[Prompt], encoded: Encoded) -> list[Outcome]:
        tensors = {name: self._moved(value) for name, value in encoded.tensors.items()}
        read = [int(count) for count in encoded.tensors["attention_mask"].sum(dim=1)]
        marks = self._marks(asks, encoded, read)
        if isinstance(asks[0], Generate):
            return self._generate([ask for ask in asks if isinstance(ask, Generate)], tensors, read, marks)
        logits = self.reader.next_words(tensors, marks, encoded.shown)
        return self._choose([ask for ask in asks if isinstance(ask, Choose)], prompts, logits, read)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self.network.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.network.device, dtype)

    def _generate(
        self,
        asks: list[Generate],
        tensors: dict[str, torch.Tensor],
        read: list[int],
        marks: list[tuple[int, ...]] | None,
    ) -> list[Outcome]:
        how = asks[0].decoding
        draw = Draw(asks) if how.temperature > 0 else None
        rows = self.reader.write(tensors, how.max_tokens, self.stops, draw, marks)
        return [self._text(row, ask.model, tokens) for row, ask, tokens in zip(rows, asks, read, strict=True)]

    def _text(self, row: list[int], model: Model, tokens_in: int) -> Outcome:
        if row[-1] == NO_WORD:
            return AskError(f"transformers: {no_numbers('probabilities', model)}")
        text = self.chat.tokenizer.decode(row, skip_special_tokens=True).strip()
        if not text:
            return EmptyReply(f"{self.chat.name} wrote nothing ({len(row)} tokens, none of them text)")
        return Reply(text, tokens_in=tokens_in, tokens_out=len(row))

    def _marks(self, asks: Sequence[Question], encoded: Encoded, read: Sequence[int]) -> list[tuple[int, ...]] | None:
        """What tells the encoded prompts apart, token by token; None where a prompt has several pictures."""
        shown = [pictures_in(ask.messages) for ask in asks]
        if max(map(len, shown)) > 1:
            return None
        token, found = self.chat.picture_token, list[tuple[int, ...]]()
        for pictures, row, length in zip(shown, encoded.tensors["input_ids"].tolist(), read, strict=True):
            words = row[len(row) - length :]
            its = mark(pictures[0]) if pictures else 0
            found.append(tuple(its if pictures and word == token else word for word in words))
        return found

    def _choose(
        self, asks: Sequence[Choose], prompts: Sequence[Prompt], logits: torch.Tensor, read: list[int]
    ) -> list[Outcome]:
        logs = torch.log_softmax(logits, dim=-1).cpu().numpy()
        outcomes: list[Outcome] = []
        for row, ask, prompt, tokens in zip(logs, asks, prompts, read, strict=True):
            ids = self.chat.first_tokens(prompt.text, ask.choices)
            with np.errstate(invalid="ignore"):  # what is no number is told of by `probable`
                sums = {name: float(np.logaddexp.reduce(row[tokens_of])) for name, tokens_of in ids.items()}
            try:
                probable(sums, ask.model, "transformers")
            except AskError as error:
                outcomes.append(error)
                continue
            mass = sum(map(exp, sums.values()))
            outcomes.append(Reply({"logprobs": sums, "mass": mass}, tokens_in=tokens, tokens_out=1))
        return outcomes


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


class Draw:
    """Turns a greedy step into a draw, row by row (the Gumbel-max trick).

    Adding Gumbel noise to log-weights and taking the largest draws from their softmax. Noise comes from the CPU, so
    that it is the same on every device, and from a source of each row's own.
    """

    def __init__(self, asks: Sequence[Generate]) -> None:
        from transformers import TopPLogitsWarper

        self.how = asks[0].decoding
        seeds = [int.from_bytes(key_of(ask)[:7], "big") for ask in asks]
        self._sources = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._narrow: Any = TopPLogitsWarper(self.how.top_p) if self.how.top_p < 1 else None

    def __call__(self, scores: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """The noisy scores of the Asks at `rows`."""
        warm: Any = scores.float() / self.how.temperature
        warm = self._narrow(None, warm) if self._narrow else warm
        noise = [torch.empty(warm.shape[1]).exponential_(generator=self._sources[row]).log().neg() for row in rows]
        return warm + torch.stack(noise).to(warm.device)
