"""What a chat completion of an OpenAI-compatible server says: a text, log-probabilities, tokens.

Knows JSON and nothing of requests. An answer in another form raises whatever reading it comes to; the caller says which
endpoint gave it.
"""

from __future__ import annotations

import math
from typing import Any

from mllmsrec_core.ask import Generate, Reply
from mllmsrec_core.errors import AskError, ContextTooLong, EmptyReply, EngineError
from tasks.engines.answers import log_sum
from tasks.engines.endpoints import Endpoint, Trouble

Form = str | int  # a surface form as text, or its first token's id
FLOOR = -9999.0  # what vLLM's server writes for minus infinity, which JSON has no word for


def again(error: type[AskError]) -> str:
    """The command that asks rows with this failure again, once the server has another setting."""
    return f"`mllmsrec retry --stage STAGE --class {error.error_class}`"


def too_long(endpoint: Endpoint, said: str) -> ContextTooLong:
    """A lasting failure that the server's setting may have made, and not the model."""
    return ContextTooLong(
        f"{said.rstrip('.')}. {endpoint.url} has the room it was started with: if the model itself has more, raise the "
        f"server's `--max-model-len` (vLLM; others have their own word for it), then {again(ContextTooLong)}"
    )


def text_of(endpoint: Endpoint, answer: Any, ask: Generate) -> Reply:
    """The text written. Raises EmptyReply, ContextTooLong where it was cut for lack of room, AskError if withheld."""
    choice = _choice(answer)
    if choice.get("finish_reason") == "content_filter":
        raise AskError(f"{endpoint.url} withholds its answer (content_filter)")
    read, written = usage_of(answer)
    cut = choice.get("finish_reason") == "length"
    if cut and 0 < written < ask.decoding.max_tokens:  # vLLM lowers the limit itself
        raise too_long(endpoint, f"the prompt has {read} tokens, and {endpoint.url} has room for only {written} more")
    text = (choice["message"].get("content") or "").strip()
    if not text:
        raise EmptyReply(f"{endpoint.url} wrote nothing ({written} tokens, none of them text)")
    return Reply(text, tokens_in=read, tokens_out=written)


def first_logs(endpoint: Endpoint, answer: Any) -> dict[Form, float]:
    """Log-probabilities at the first answer token, by text or by token id. Raises EngineError where none are given."""
    choice = _choice(answer)
    logprobs = choice.get("logprobs")
    steps = logprobs.get("content") if isinstance(logprobs, dict) else None
    if steps is None or (steps and not steps[0].get("top_logprobs")):
        raise EngineError(
            f"{endpoint.url} gives no log-probabilities; use a server that does (`vllm serve`), or answer this stage with "
            "the vllm or transformers engine."
        )
    if not steps:
        raise AskError(f"{endpoint.url} ended its answer before the first token")
    logs: dict[Form, list[float]] = {}
    for entry in steps[0]["top_logprobs"]:
        token_id = entry["token"].removeprefix("token_id:")
        form: Form = int(token_id) if token_id != entry["token"] and token_id.isdigit() else entry["token"]
        value = float(entry["logprob"])
        logs.setdefault(form, []).append(-math.inf if value <= FLOOR else value)
    return {form: log_sum(values) for form, values in logs.items()}  # two tokens may read alike


def usage_of(answer: Any) -> tuple[int, int]:
    """Tokens read and written; 0 where the server does not say."""
    usage = answer.get("usage") or {}
    return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)


def cached_of(answer: Any) -> int | None:
    """Tokens of the prompt that the server found in its cache; None where it does not say."""
    details = (answer.get("usage") or {}).get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return int(cached) if isinstance(cached, int | float) else None


def _choice(answer: Any) -> dict[str, Any]:
    """The one choice of a completion. Raises Trouble when there is none: proxies answer so in a bad minute."""
    try:
        choice = answer["choices"][0]
        choice["message"]["role"]
        return choice
    except (KeyError, IndexError, TypeError):
        raise Trouble("an answer without choices") from None
