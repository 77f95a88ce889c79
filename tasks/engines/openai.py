"""The openai engine: Generate and Choose at OpenAI-compatible endpoints, one or a pool of them.

Pictures travel as data URLs. Where a server is vLLM and the model's tokenizer is at hand, the log-probabilities of
exactly the first answer tokens are asked for; elsewhere each surface form must stand among the server's most likely
tokens, and a row in which one does not is a failed row. Knows nothing of stages, and cannot see which weights a server
holds: the model's revision is the profile's word.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from mllmsrec_core.ask import Ask, Choose, Generate, Message, Model, Picture, Reply, kind, pictures_in
from mllmsrec_core.errors import AskError, EngineError
from storage.blobs import Blobs
from tasks.engines.adapters import unpack
from tasks.engines.answers import chosen, seed_of
from tasks.engines.completions import Form, again, cached_of, first_logs, text_of, too_long, usage_of
from tasks.engines.endpoints import Endpoint, Pool, Refused, Trouble
from tasks.engines.pictures import FORMATS, decode, orientation

Question = Generate | Choose
TOO_LONG = re.compile(r"context.?length|maximum (context|model) length|max_model_len|too many tokens", re.I)
# What servers say of a model without eyes. What they say of a picture ("image is not valid", "does not support image
# format x") must not match: the row alone has failed then.
EYES = r"(images?|image_urls?|vision|multi-?modal)( (inputs?|contents?|understanding))?"
BLIND = re.compile(
    r"\bnot (a|an) (multi-?modal|vision)"
    rf"|\b(does not|doesn't|do not|cannot) support {EYES}(?=\s*($|[.,;:!)'\"]| (for|by|with|in) (this|the) (model|server)))"
    r"|\b(image|vision|multi-?modal) (inputs?|contents?)( (is|are))? not (supported|enabled|available)"
    r"|\b(images|vision) (is|are) not (supported|enabled) (by|for|in|with) (this|the) (model|server)"
    r"|\bat most 0 images?\b",
    re.I,
)
# Switches off what a served checkpoint's own generation_config would add; other servers do not know these names.
PLAIN_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class _Served:
    """What an endpoint says of itself: the names it serves (None: it does not say), and whether it is vLLM."""

    names: frozenset[str] | None
    vllm: bool


class OpenAIEngine:
    """Answers Generate and Choose.

    `served_as` maps a model's name to the name it is served under, where they differ; `adapters` does so for the
    sha256 of an adapter. An adapter that is not listed is looked for as `adapter-<first 12 digits>`; with
    `adapter_folder`, a folder that the servers see too, vLLM is told to load it from there. `locations` maps a model's
    slug to where its tokenizer lies, if it is known. `top_logprobs` is the most that the server gives.
    """

    answers: frozenset[type[Ask]] = frozenset({Generate, Choose})

    def __init__(
        self,
        blobs: Blobs,
        locations: Mapping[str, str] = MappingProxyType({}),
        *,
        endpoints: Sequence[str],
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 64,
        timeout_s: float = 300.0,
        retries: int = 6,
        backoff_s: float = 0.5,
        top_logprobs: int = 20,
        served_as: Mapping[str, str] = MappingProxyType({}),
        adapters: Mapping[str, str] = MappingProxyType({}),
        adapter_folder: str = "",
        name: str = "openai",
    ) -> None:
        self.blobs, self.locations, self.name = blobs, locations, name
        self._served_as, self._adapters, self._folder = dict(served_as), dict(adapters), adapter_folder
        self._top = top_logprobs
        self._pool = Pool(
            endpoints,
            api_key_env=api_key_env,
            concurrency=concurrency,
            timeout_s=timeout_s,
            retries=retries,
            backoff_s=backoff_s,
        )
        self._served: dict[Endpoint, _Served] = {}
        self._looking = {endpoint: asyncio.Lock() for endpoint in self._pool.endpoints}
        self._chats: dict[str, Any] = {}
        self._tokenizing = asyncio.Lock()
        self._counters = {"prompt_tokens": 0, "reused_tokens": 0, "images": 0}
        self._told = False  # whether any answer said how much of its prompt was cached

    async def answer(self, ask: Ask) -> Reply:
        """The model's text, or its raw log-probabilities at the first answer token."""
        if not isinstance(ask, Generate | Choose):
            raise EngineError(f"{self.name} answers generate and choose, not {kind(ask)}; name another engine for it.")
        if not ask.model.revision:
            raise EngineError(
                f"{self.name}: state the revision of {ask.model.name} that is served; answers are kept under it."
            )
        tokens = await self._first_tokens(ask) if isinstance(ask, Choose) else None
        return await self._pool.call(lambda endpoint: self._attempt(endpoint, ask, tokens))

    def counters(self) -> dict[str, int]:
        """Totals over the engine's life: see `tasks.engines.Counting`.

        What servers found in their prefix caches is left out until one says so; an answer that does not say it counts as
        nothing found, since vLLM (with `--enable-prompt-tokens-details`) is silent about nothing.
        """
        return {name: n for name, n in self._counters.items() if name != "reused_tokens" or self._told}

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.close()

    async def _attempt(self, endpoint: Endpoint, ask: Question, tokens: Any) -> Reply:
        """One try at a place that is taken. Pictures are read here: rows that wait, or rest, hold none of them."""
        served = await self._look(endpoint)
        model = await self._model_name(endpoint, served, ask.model)
        forms: dict[str, list[Form]] = {}
        if isinstance(ask, Choose):
            forms = tokens if tokens and served.vllm else _as_text(ask)
        messages = await asyncio.to_thread(self._messages, ask)
        body = {"model": model, "messages": messages, **self._how(ask, served, forms)}
        started = time.perf_counter()
        try:
            answer = await self._pool.send(endpoint, "POST", "chat/completions", body)
        except Refused as refused:
            raise self._failure(endpoint, served, ask, refused) from None
        reply = self._read(endpoint, answer, ask, forms)
        return replace(reply, engine=self.name, seconds=time.perf_counter() - started)

    def _read(self, endpoint: Endpoint, answer: Any, ask: Question, forms: Mapping[str, Sequence[Form]]) -> Reply:
        try:
            generates = isinstance(ask, Generate)
            reply = text_of(endpoint, answer, ask) if generates else self._chosen(endpoint, answer, ask, forms)
            self._count(ask, answer)
            return reply
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:  # whatever it made of the form
            raise AskError(
                f"{endpoint.url} answers in a form that is not understood ({type(error).__name__}: {error}); use a server "
                f"that speaks OpenAI's chat completions (`vllm serve`), then {again(AskError)}"
            ) from error

    def _count(self, ask: Question, answer: Any) -> None:
        cached = cached_of(answer)
        self._told = self._told or cached is not None
        self._counters["prompt_tokens"] += usage_of(answer)[0]
        self._counters["reused_tokens"] += cached or 0
        self._counters["images"] += _pictures(ask)

    def _how(self, ask: Question, served: _Served, forms: Mapping[str, Sequence[Form]]) -> dict[str, Any]:
        """The decoding part of a request."""
        plain = PLAIN_SAMPLING if served.vllm else {}
        if isinstance(ask, Generate):
            how: dict[str, Any] = {"max_tokens": ask.decoding.max_tokens, "temperature": ask.decoding.temperature}
            if ask.decoding.temperature > 0:
                how |= {"top_p": ask.decoding.top_p, "seed": seed_of(ask)}
            return how | plain
        how = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": self._top}
        ids = [form for each in forms.values() for form in each if isinstance(form, int)]
        return how | plain | ({"logprob_token_ids": ids, "return_tokens_as_token_ids": True} if ids else {})

    async def _look(self, endpoint: Endpoint) -> _Served:
        """What the endpoint serves, asked once."""
        async with self._looking[endpoint]:
            if endpoint not in self._served:
                try:
                    listing = await self._pool.send(endpoint, "GET", "models")
                    cards = [card for card in listing["data"] if isinstance(card, dict)]
                    names = frozenset(str(card.get("id")) for card in cards)
                    self._served[endpoint] = _Served(names, any(card.get("owned_by") == "vllm" for card in cards))
                except Refused as refused:
                    if refused.status in (401, 402, 403):
                        raise self._no_entry(endpoint, refused) from None
                    self._served[endpoint] = _Served(None, False)  # not every server has a list
                except (KeyError, TypeError):
                    self._served[endpoint] = _Served(None, False)
            return self._served[endpoint]

    async def _model_name(self, endpoint: Endpoint, served: _Served, model: Model) -> str:
        """The name to ask for. Raises EngineError when vLLM does not serve it."""
        if model.adapter is None:
            name = self._served_as.get(model.name, model.name)
            remedy = f"serve it with `--served-model-name {name}`, or say in `served_as` how it is called"
        else:
            name = self._adapters.get(model.adapter, f"adapter-{model.adapter[:12]}")
            remedy = (
                "serve it with `--enable-lora --lora-modules NAME=FOLDER` and state the name in `adapters`, or set "
                "`adapter_folder` to a folder that the server sees too"
            )
            if self._folder and served.vllm and name not in (served.names or ()):
                await self._load(endpoint, model.adapter, name)
                return name
        if served.vllm and name not in (served.names or ()):
            names = ", ".join(sorted(served.names or ()))
            raise EngineError(f"{endpoint.url} serves no {name} ({model.slug}) but {names}; {remedy}.")
        return name

    async def _load(self, endpoint: Endpoint, adapter: str, name: str) -> None:
        """Have vLLM load an adapter from the shared folder, once."""
        async with self._looking[endpoint]:
            served = self._served.get(endpoint)
            if served is None:
                raise Trouble("the server was asked anew what it serves")
            if name in (served.names or ()):
                return
            folder = Path(self._folder, adapter).absolute()  # the server starts elsewhere
            await asyncio.to_thread(self._unpacked, adapter, folder)
            try:
                await self._pool.send(
                    endpoint, "POST", "load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}
                )
            except Refused as refused:
                if "already" not in refused.message:
                    raise EngineError(
                        f"{endpoint.url} does not load adapter {adapter[:12]} from {folder}: {refused}. Start it with "
                        "`--enable-lora --max-lora-rank N` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or serve the "
                        "adapter by `--lora-modules` and state its name in `adapters`."
                    ) from None
            self._served[endpoint] = replace(served, names=(served.names or frozenset()) | {name})

    def _unpacked(self, adapter: str, folder: Path) -> None:
        content = self.blobs.get(adapter)
        try:
            unpack(content, folder)
        except OSError as error:
            raise EngineError(
                f"adapter {adapter[:12]} cannot be unpacked into {folder} ({error}); let this user write to "
                f"`adapter_folder` = {self._folder!r}, or name another folder that the servers see too, and repeat the command."
            ) from error

    def _failure(self, endpoint: Endpoint, served: _Served, ask: Question, refused: Refused) -> Exception:
        """What a lasting refusal means: this row, or everything."""
        if refused.status in (401, 402, 403):
            return self._no_entry(endpoint, refused)
        if refused.status == 404 and served.vllm:  # it was started again with other names
            self._served.pop(endpoint, None)
            return Trouble(f"{refused}")
        if refused.code == "context_length_exceeded" or TOO_LONG.search(refused.message):
            return too_long(endpoint, refused.message)
        if isinstance(ask, Choose) and "logprob" in refused.message:
            return EngineError(
                f"{endpoint.url} gives no log-probabilities as they are asked for ({refused}); lower `top_logprobs`, or "
                "answer this stage with the vllm or transformers engine."
            )
        if _pictures(ask) and BLIND.search(refused.message):
            return EngineError(f"{endpoint.url} reads no pictures ({refused}); serve a vision-language model.")
        if refused.status in (400, 413, 422):
            return AskError(f"{endpoint.url} refuses this prompt: {refused}")
        return EngineError(f"{endpoint.url} answers {refused}; correct `endpoints`, `served_as` or `adapters`.")

    def _no_entry(self, endpoint: Endpoint, refused: Refused) -> EngineError:
        if refused.status == 402:
            return EngineError(f"{endpoint.url}: the account's quota is used up; raise it and repeat the command.")
        has = "is not accepted" if self._pool.key.get_secret_value() else "is not set"
        return EngineError(
            f"{endpoint.url} answers {refused.status}: the key in the environment variable {self._pool.api_key_env} {has}. "
            "Set it there, or name another variable in `api_key_env`."
        )

    def _chosen(self, endpoint: Endpoint, answer: Any, ask: Question, forms: Mapping[str, Sequence[Form]]) -> Reply:
        """Log-probabilities of the choices. A form the server does not mention fails the row; it is never guessed."""
        logs = first_logs(endpoint, answer)
        missing = [form for each in forms.values() for form in each if form not in logs]
        if missing:
            raise AskError(
                f"{endpoint.url} gives the {len(logs)} likeliest tokens, and {_listed(missing)} not among them. How many it "
                "gives is the server's setting: raise `top_logprobs` and, where it refuses so many, its own (vLLM's "
                f"`--max-logprobs`), then {again(AskError)}. Or give the choices fewer forms, or serve with vLLM and "
                "name the model by its folder or hub id."
            )
        return chosen(logs, forms, usage_of(answer)[0], ask.model, endpoint.url)

    async def _first_tokens(self, ask: Choose) -> dict[str, list[int]] | None:
        """Token ids by choice, exactly as the transformers engine finds them; None without a tokenizer."""
        if not self.locations.get(ask.model.slug):
            return None
        async with self._tokenizing:
            return await asyncio.to_thread(self._tokenized, ask)

    def _tokenized(self, ask: Choose) -> dict[str, list[int]]:
        from tasks.engines.fronts import open_front

        if ask.model.slug not in self._chats:
            self._chats[ask.model.slug] = open_front(ask.model, self.locations, self.blobs).chat
        chat = self._chats[ask.model.slug]
        return chat.first_tokens(chat.render(ask.messages), ask.choices)

    def _messages(self, ask: Question) -> list[dict[str, Any]]:
        return [{"role": each.role, "content": self._content(each, ask.model.max_pixels)} for each in ask.messages]

    def _content(self, message: Message, max_pixels: int | None) -> str | list[dict[str, Any]]:
        """Parts in reading order, neighbouring texts as one: some servers would put a line break between them."""
        parts: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, Picture):
                url = data_url(self.blobs.get(part.sha256), max_pixels)
                parts.append({"type": "image_url", "image_url": {"url": url}})
            elif parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += part
            else:
                parts.append({"type": "text", "text": part})
        return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def data_url(content: bytes, max_pixels: int | None) -> str:
    """A picture as a data URL whose pixels are those of `decode`.

    The original bytes where any reader sees these pixels in them, else a PNG. Raises ImageUnreadable or ImageRefused.
    """
    image = decode(content, max_pixels)
    with Image.open(BytesIO(content), formats=FORMATS) as original:
        same = original.mode == "RGB" and original.size == image.size and not original.has_transparency_data
        still = getattr(original, "n_frames", 1) == 1 and orientation(original) == 1
        kind_of = (original.format or "").lower()
        if same and still and kind_of in ("jpeg", "png"):
            return f"data:image/{kind_of};base64,{base64.b64encode(content).decode()}"
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # a tenth of the time for a tenth more bytes
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pictures(ask: Question) -> int:
    return len(pictures_in(ask.messages))


def _as_text(ask: Choose) -> dict[str, list[Form]]:
    """The surface forms themselves. Raises EngineError when two choices share one."""
    forms = [form for _, each in ask.choices for form in dict.fromkeys(each)]
    if len(set(forms)) < len(forms):
        raise EngineError(f"the choices {dict(ask.choices)} share a form; give them forms of their own.")
    return {name: list(dict.fromkeys(each)) for name, each in ask.choices}


def _listed(forms: Sequence[Form]) -> str:
    return f"{', '.join(map(repr, forms))} {'is' if len(forms) == 1 else 'are'}"
