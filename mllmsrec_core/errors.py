"""Everything this package raises on purpose, in three branches with three behaviours.

MllmsrecError
├── AskError            one row: recorded as a failed Reply, the run goes on
│   ├── ContextTooLong       the rendered prompt does not fit the model
│   ├── EmptyReply           the model wrote nothing
│   ├── ImageMissing         nothing is at the URI
│   ├── ImageUnreadable      the bytes are no picture we can decode
│   ├── ImageRefused         a picture we will not decode: too large, or an address outside what is allowed
│   └── Passing              trouble that may be over at the next run: 429, 5xx, a timeout
├── EngineError         this run: the engine is dead or cannot start; nothing answered so far is lost
├── TooManyErrors       this stage: the share of failed rows passed its `max_error_rate`
├── OutOfTime           this stage: the run's budget was over before anything of it could be published
├── ContractError       this table: a column or key is not what the contract promises
├── SourceError         this dataset: a file or column is missing, or nothing usable is left
├── StoreError          this store: another schema version, a missing table, no space left
└── UsageError          this command: a wrong name, profile or option (exit code 2)

Every message says what is wrong, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MllmsrecError(Exception):
    """Base of all errors raised on purpose."""


class AskError(MllmsrecError):
    """One question failed; `error_class` is what is stored in the failed Reply."""

    error_class = "ask_failed"
    passing = False


class ContextTooLong(AskError):
    """The rendered prompt does not fit the model's context."""

    error_class = "context_too_long"


class EmptyReply(AskError):
    """The model wrote nothing."""

    error_class = "empty_reply"


class ImageMissing(AskError):
    """Nothing is at the image's URI."""

    error_class = "image_missing"


class ImageUnreadable(AskError):
    """The bytes are no picture we can decode."""

    error_class = "image_unreadable"


class ImageRefused(AskError):
    """A picture that is too large, or lies at an address outside what is allowed."""

    error_class = "image_refused"


class Passing(AskError):
    """Trouble that may be over at the next run (429, 5xx, timeout): never counts as an answer."""

    error_class = "passing"
    passing = True


class EngineError(MllmsrecError):
    """An engine died or cannot start. Everything answered so far is kept."""


class TooManyErrors(MllmsrecError):
    """The share of failed rows passed the stage's `max_error_rate`."""


class OutOfTime(MllmsrecError):
    """The run's budget was over before a stage that never published anything reached its first row."""


class ContractError(MllmsrecError):
    """A table breaks its declared contract."""


class SourceError(MllmsrecError):
    """A dataset lacks a file or column, or holds nothing usable."""


class StoreError(MllmsrecError):
    """The store is of another version, lacks a table, or cannot be written."""


class UsageError(MllmsrecError):
    """A wrong name, option or profile key."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt `name`: the closest known one, else all of them."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(names)}"
