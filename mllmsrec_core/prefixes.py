"""What prompts share from their beginning: counted for plans and reports, and laid out so that it is computed once.

A language model reads from left to right, so two prompts cost their common beginning once where its state is
kept.
Knows nothing of models: a token here is whatever can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import polars as pl

from mllmsrec_core.ask import Message, Picture
from mllmsrec_core.plan import CHARS_PER_TOKEN, TOKENS_PER_PICTURE

WORTH = 0.8  # a saving below a fifth is within what the rule of thumb can miss
_Part = str | Picture | tuple[str]  # a turn's role is a part of its own


def common(a: Sequence[Any], b: Sequence[Any], start: int = 0) -> int:
    """How long the common beginning of two sequences of one type is, the first `start` elements being equal."""
    low, high = start, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


# --- counting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """Tokens of some prompts, and how many of them are left where each beginning is read once."""

    total: int
    unique: int

    @property
    def ratio(self) -> float:
        """The share of the tokens that need not be read again; 0 for no prompts."""
        return 1 - self.unique / self.total if self.total else 0.0


def shared(prompts: Iterable[Sequence[Message]]) -> Shared:
    """Of prompts in the order in which they are asked, each beside the one before it.

    By rule of thumb, as `plan` counts. Linear in the length of all prompts; holds two of them.
    """
    total, again, before = 0, 0, list[_Part]()
    for messages in prompts:
        parts: list[_Part] = [part for one in messages for part in ((one.role,), *one.parts)]
        total += sum(map(_size, parts))
        again += _size_alike(before, parts)
        before = parts
    return Shared(total // CHARS_PER_TOKEN, (total - again) // CHARS_PER_TOKEN)


def _size(part: _Part) -> int:
    """In characters, so that pieces of a word add up; who speaks counts as nothing."""
    return {str: len, Picture: lambda _: TOKENS_PER_PICTURE * CHARS_PER_TOKEN, tuple: lambda _: 0}[type(part)](part)


def _size_alike(a: list[_Part], b: list[_Part]) -> int:
    size = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            return size + (common(one, other) if isinstance(one, str) and isinstance(other, str) else 0)
        size += _size(one)
    return size


def nested(rows: pl.DataFrame, parts: Sequence[tuple[Sequence[str], pl.Expr]]) -> Shared:
    """Of prompts made of parts in this order: for each part the columns that tell it apart, and its tokens.

    Counts whole parts only, as columns: for rows in any order, once they are sorted by these columns.
    """
    sizes = rows.with_columns(expr.alias(f"__{n}") for n, (_, expr) in enumerate(parts))
    total, unique, by = 0, 0, list[str]()
    for n, (columns, _) in enumerate(parts):
        by += [name for name in columns if name not in by]
        total += int(sizes[f"__{n}"].sum())
        unique += int((sizes.unique(by) if by else sizes.head(1))[f"__{n}"].sum())
    return Shared(total, unique)


def layouts(rows: pl.DataFrame, prompt: str, pictures: bool) -> dict[str, Shared]:
    """What each `score.layout` would share, from the rows of score, its prompt, and whether pictures stand in it."""
    said = pl.concat_str("profile", "preference", pl.col("last_titles").list.join(" "), ignore_nulls=True)
    shown = pl.when(pl.col("sha256").is_not_null() & pictures).then(TOKENS_PER_PICTURE).otherwise(0)
    user = (("user_id", "target_seq"), said.str.len_chars() // CHARS_PER_TOKEN)
    item = (("item_text",), pl.col("item_text").str.len_chars() // CHARS_PER_TOKEN)
    picture, question = (("sha256",), shown), (("item_id",), pl.lit(len(prompt) // CHARS_PER_TOKEN))
    orders = {"user_first": (user, item, picture, question), "image_first": (picture, item, user, question)}
    return {layout: nested(rows, parts) for layout, parts in orders.items()}


def cheaper(rows: pl.DataFrame, layout: str, prompt: str, pictures: bool) -> str:
    """What `plan` says of another layout of score that leaves less to read; empty where this one is about the best."""
    found = layouts(rows, prompt, pictures)
    best = min(found, key=lambda name: found[name].unique)
    if found[best].unique > WORTH * found[layout].unique or not found[layout].unique:
        return ""
    ratio = found[layout].unique / found[best].unique
    return f"score.layout = {best} would leave {ratio:.1f} times fewer tokens to read; an adapter is then trained anew"


# --- laying out -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Segment:
    """Tokens `start` to `end` of the sequence `row`, read on top of `parent`; the sequences `ends` end with it."""

    row: int
    start: int
    end: int
    parent: int | None  # a place in the level before
    ends: list[int] = field(default_factory=list)


def levels(sequences: Sequence[tuple[Any, ...]], least: int) -> list[list[Segment]]:
    """Segments that spell every sequence from its beginning, level by level: each stands on one of the level before.

    A beginning becomes a segment of its own where that saves at least `least` tokens, 1 or more; a level more is a pass more.
    """
    made: list[list[Segment]] = []
    order = sorted(range(len(sequences)), key=lambda row: sequences[row])
    open_groups: list[tuple[list[int], int, int, int | None]] = [(order, 0, 0, None)] if order else []
    while open_groups:
        rows, start, level, parent = open_groups.pop()
        first, last = sequences[rows[0]], sequences[rows[-1]]
        end = common(first, last, start)
        alike = end == len(first) == len(last)
        if alike or (end - start) * (len(rows) - 1) >= least:
            made += [[] for _ in range(level + 1 - len(made))]
            ends = [row for row in rows if len(sequences[row]) == end]
            made[level].append(Segment(rows[0], start, end, parent, ends))
            rows, start, level, parent = rows[len(ends) :], end, level + 1, len(made[level]) - 1
        open_groups += [(group, start, level, parent) for group in _branches(sequences, rows, end)]
    return made


def _branches(sequences: Sequence[tuple[Any, ...]], rows: list[int], end: int) -> list[list[int]]:
    """Sorted rows that are alike up to `end`, by the token they go on with; a row that ends there comes alone."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(sequences[row][end : end + 1], []).append(row)
    return list(groups.values())


def neighbours(ordered: Sequence[tuple[Any, ...]], place: int, most: int) -> slice:
    """Up to `most` of the sorted sequences, that at `place` among them, which share least with those left out.

    At least half of `most`, where there are as many: a batch that is nearly empty costs more than a beginning.
    """
    edges = [-1, *(common(a, b) for a, b in pairwise(ordered)), -1]  # edges[n]: of n - 1 and n
    start, stop, most = place, place + 1, min(most, len(ordered))
    best, cost = slice(start, stop), None
    while True:
        cut = max(edges[start], edges[stop])
        if 2 * (stop - start) >= most and (cost is None or cut <= cost):
            best, cost = slice(start, stop), cut
        if stop - start == most:
            return best
        start, stop = (start - 1, stop) if edges[start] > edges[stop] else (start, stop + 1)
