"""Turning untrusted titles, descriptions and model answers into text that is safe inside a prompt.

Knows nothing of any particular model; chat-control tokens are recognised by their common shapes.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_CHARS = 600  # about 150 tokens: ten such items still fit a 2,048-token context

# <|im_start|>, <image>, [INST], <s>, <<SYS>>, <start_of_turn>: the shapes chat templates and processors give meaning to.
_CONTROL = re.compile(r"<\|[^<>|]{0,64}\|>|<{1,2}/?[A-Za-z_][\w-]{0,30}>{1,2}|\[(/?[gs]?[A-Z_]{2,20})\]")
# In brackets stand titles, too ([REC], a film; Diablo [PC]): only these words go (Mistral's, GLM's and BERT's).
_WORDS = frozenset(
    "INST SYS SYSTEM_PROMPT IMG IMG_BREAK IMG_END AVAILABLE_TOOLS TOOL_CALLS TOOL_RESULTS TOOL_CONTENT CALL_ID "
    "BEGIN_AUDIO MASK gMASK sMASK CLS SEP PAD UNK BOS EOS".split()
)
_CUT = "..."  # NFKC would turn the one-character ellipsis into this
_FENCE = str.maketrans({"«": '"', "»": '"'})


@lru_cache(maxsize=65_536)  # a user's texts come up once for each of their candidates
def clean(text: str | None, limit: int = MAX_CHARS) -> str:
    """One line of normalised text, at most `limit` characters, without control characters or chat-control tokens.

    Invisible format characters go and Unicode is brought to NFKC before tokens are looked for, so that neither split nor
    full-width look-alikes slip through. Removal repeats until nothing is found: `<|<|x|>|>` leaves no token behind. Other
    words in capitals change their brackets, `[REC]` to `(REC)`, as some template may know them. Cleaning twice is cleaning
    once.
    """
    if not text:
        return ""
    text = text[: 8 * limit]
    if not (text.isascii() and text.isprintable()):  # of such a text nothing would change, and most are such
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")
        text = "".join(c if c.isprintable() else " " for c in unicodedata.normalize("NFKC", text)).translate(_FENCE)
    while (stripped := " ".join(_CONTROL.sub(_neutral, text).split())) != text:
        text = stripped
    return text if len(text) <= limit else text[: max(0, limit - len(_CUT))].rstrip() + _CUT[:limit]


def _neutral(found: re.Match[str]) -> str:
    """What stands for a piece in the shape of a token: nothing, or a word that is none that we know, in parentheses."""
    word = found[1]
    return " " if word is None or word.removeprefix("/") in _WORDS else f"({word})"


def fence(text: str | None, limit: int = MAX_CHARS) -> str:
    """`clean(text)` between guillemets, which the text itself can no longer contain."""
    return f"«{clean(text, limit)}»"
