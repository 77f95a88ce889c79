"""The five questions everything expensive is made of, and their answers.

An Ask is one exact question to one exact model. Its key is a hash of its whole content, so prompt, model, adapter and
upstream text are in the key by construction, and code is not. Knows nothing of engines or stores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, TypeVar

T = TypeVar("T")

KEY_VERSION = 1  # part of every key: raising it makes every known answer unknown

Kind = Literal["fetch", "generate", "choose", "embed", "train"]


class Rendered:
    """Remembers what it was rendered as."""

    __slots__ = ("_rendered",)


@dataclass(frozen=True, slots=True)
class Model(Rendered):
    """Exact weights: a name at a resolved revision or content digest, and what changes its numbers on purpose."""

    name: str
    revision: str
    dtype: str = "float32"
    quantisation: str = "none"
    max_pixels: int | None = None
    adapter: str | None = None  # sha256 of the adapter's blob

    @property
    def slug(self) -> str:
        """A name for folders: `embedded-vlm@1a2b3c4d5e6f`."""
        return f"{self.name.replace('/', '--')}@{self.revision[:12]}"


@dataclass(frozen=True, slots=True)
class Picture:
    """An image inside a message, by the sha256 of its bytes as a Fetch kept them."""

    sha256: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: text and pictures in the order in which the model reads them."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | Picture, ...]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How text is drawn; temperature 0 is greedy and ignores `top_p` and `seed`."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Equal decodings must have equal keys, and 0 and 0.0 are written differently."""
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "top_p", float(self.top_p))


class Question(Rendered):
    """Remembers its key, too: the stage that asks, the engine and the store each need one of them."""

    __slots__ = ("_key",)


@dataclass(frozen=True, slots=True)
class Fetch(Question):
    """Which bytes are at `uri` at this `version` (ETag, or size and mtime), a picture of at most `max_pixels`?

    A larger picture is answered with a smaller copy. None answers with any picture as it is, and stays out of the key,
    so that answers given before there was a limit are found.
    """

    uri: str
    version: str
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class Generate(Question):
    """What does the model write after these messages?"""

    model: Model
    messages: tuple[Message, ...]
    decoding: Decoding


@dataclass(frozen=True, slots=True)
class Choose(Question):
    """How likely is each choice as the model's next words? A choice is a name and its surface forms."""

    model: Model
    messages: tuple[Message, ...]
    choices: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Embed(Question):
    """Which unit vector does the model give this text or this picture?"""

    model: Model
    content: str | Picture


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised turn: the prompt that scoring will render, and the answer to learn."""

    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Train(Question):
    """What adapter does this recipe make of the examples with this digest?

    `examples` and `validation` travel with the Ask but stay out of its key: `digest` stands for both.
    """

    model: Model
    recipe: str  # canonical JSON
    digest: str
    examples: Sequence[Example] = field(default=(), compare=False, repr=False)
    validation: Sequence[Example] = field(default=(), compare=False, repr=False)


Ask = Fetch | Generate | Choose | Embed | Train
_KINDS: dict[type, Kind] = {Fetch: "fetch", Generate: "generate", Choose: "choose", Embed: "embed", Train: "train"}


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, or a failure of lasting or passing kind (`error` is its class, `value` then None).

    `value` by kind: Fetch `{"sha256", "width", "height"}` of the picture as kept, and with a limit `"original_sha256"`
    of the bytes that came; Generate the text; Choose `{"logprobs": {choice: float}, "mass": float}` (natural logs,
    unmasked, full vocabulary); Embed a list of floats of norm 1; Train `{"sha256", "curves": [...]}`.
    """

    value: Any = None
    error: str | None = None
    detail: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    engine: str = ""
    passing: bool = False


def pictures_in(messages: Sequence[Message]) -> list[Picture]:
    """The pictures in these messages, in the order in which the model sees them."""
    return [part for message in messages for part in message.parts if isinstance(part, Picture)]


def kind(ask: Ask) -> Kind:
    """The lower-case name of the question, as used in folder names."""
    return _KINDS[type(ask)]


def model_of(ask: Ask) -> str:
    """The folder name of the model an Ask goes to; `source` for a Fetch."""
    return "source" if isinstance(ask, Fetch) else ask.model.slug


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return _ENCODER.encode(value)


def render(ask: Ask) -> str:
    """The Ask as canonical JSON, as kept in the store for `why`; examples stand as their digest."""
    return getattr(ask, "_rendered", None) or _remember(ask, "_rendered", _render(ask))


def _remember(what: Rendered, name: str, value: T) -> T:
    object.__setattr__(what, name, value)
    return value


def _render(ask: Ask) -> str:
    content = {name: value for name, value in _fields(ask).items() if name not in ("examples", "validation")}
    if isinstance(ask, Fetch) and ask.max_pixels is None:
        del content["max_pixels"]
    content |= {"kind": kind(ask), "key_version": KEY_VERSION}
    return "{" + ",".join(f'"{name}":{_piece(content[name])}' for name in sorted(content)) + "}"


def _piece(value: Any) -> str:
    if not isinstance(value, Model):
        return _ENCODER.encode(value)
    return getattr(value, "_rendered", None) or _remember(value, "_rendered", _ENCODER.encode(value))


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass with slots as a dict; `dataclasses.asdict` copies deeply, which costs five times as much."""
    return {name: getattr(value, name) for name in value.__slots__}


_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_fields
)  # one for all: json.dumps builds a new one for every call with options


def key(ask: Ask) -> bytes:
    """The 32-byte name of this exact question."""
    return getattr(ask, "_key", None) or _remember(ask, "_key", sha256(render(ask).encode()).digest())


def digest(*values: Any) -> str:
    """A hex sha256 over JSON-able values, for fingerprints."""
    return sha256(canonical(values).encode()).hexdigest()
