"""Turning untrusted titles, descriptions and model answers into text that is safe inside a prompt.

Knows nothing of any particular model; chat-control tokens are recognised by their common shapes.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS = 600  # about 150 tokens: ten such items still fit a 2,048-token context

# <|im_start|>, <image>, [INST], <s>, <<SYS>>, <start_of_turn>: the shapes chat templates and processors give meaning to.
_CONTROL = re.compile(r"<\|[^<>|]{0,64}\|>|<{1,2}/?[A-Za-z_]\w{0,30}>{1,2}|\[/?[A-Z_]{2,20}\]")
_FENCE = str.maketrans({"«": '"', "»": '"'})


def clean(text: str | None, limit: int = MAX_CHARS) -> str:
    """One line of normalised text, at most `limit` characters, without control characters or chat-control tokens.

    Unicode is brought to NFKC before tokens are looked for, so that full-width look-alikes do not slip through.
    Removal repeats until nothing is found: `<|<|x|>|>` leaves no token behind.
    """
    if not text:
        return ""
    text = unicodedata.normalize("NFKC", text[: 8 * limit])
    text = "".join(c if c.isprintable() else " " for c in text)
    while (stripped := _CONTROL.sub(" ", text)) != text:
        text = stripped
    text = " ".join(text.translate(_FENCE).split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def fence(text: str | None, limit: int = MAX_CHARS) -> str:
    """`clean(text)` between guillemets, which the text itself can no longer contain."""
    return f"«{clean(text, limit)}»"
