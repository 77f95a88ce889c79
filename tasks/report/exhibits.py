"""The report's exhibits: captions, preferences and flagged claims, each beside the pictures they speak of.

A few, drawn by hash, so that nobody picks the good ones and a second run shows the same. Knows nothing of HTML.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import polars as pl

from tasks.report.shown import Shown, Thumbnails, few, first, lookup, of, read_by

CAPTIONS, USERS, FLAGGED = 6, 2, 8
STEPS = 8  # of one user; the first ones and the newest
PICTURES = 6  # of one step
RECOMMENDED = 5


@dataclass(frozen=True)
class Tile:
    """An item as the page shows it; `picture` is a data URI, or None."""

    item_id: str
    title: str
    picture: str | None
    note: str = ""


@dataclass(frozen=True)
class Caption:
    """A picture, what was written of it, and the texts of one item that shows it."""

    tile: Tile
    shared_by: int
    caption: str | None
    text_summary: str | None
    summary: str | None
    modality: str | None
    error: str | None


@dataclass(frozen=True)
class Step:
    number: int
    tiles: tuple[Tile, ...]
    n_items: int
    preference: str | None
    error: str | None


@dataclass(frozen=True)
class User:
    """One user's preference over time, and what the scores made of it."""

    user_id: str
    steps: tuple[Step, ...]
    n_steps: int
    recommended: tuple[Tile, ...]
    held_out: Tile | None
    rank: float | None
    n_candidates: int


@dataclass(frozen=True)
class Flag:
    """A claim that the picture does not bear out, and the text it stands in."""

    tile: Tile
    subject: str
    subject_id: str
    claim: str
    text: str | None
    similarity: float | None
    quantile: float | None


class Exhibits:
    """Draws exhibits from one environment."""

    def __init__(self, shown: Shown) -> None:
        self.shown, self.thumbnail = shown, Thumbnails(shown.store)

    def tiles(self, item_ids: Iterable[str], notes: dict[str, str] | None = None) -> tuple[Tile, ...]:
        """One tile per item, in the order given; an item the catalogue lacks is shown by its id."""
        wanted = list(item_ids)
        titles = lookup(self.shown.table("items"), "item_id", wanted, "title")
        pictures = lookup(self.shown.table("images"), "item_id", wanted, "sha256")
        return tuple(
            Tile(
                item,
                titles.get(item, {}).get("title") or item,
                self.thumbnail(pictures.get(item, {}).get("sha256")),
                (notes or {}).get(item, ""),
            )
            for item in wanted
        )

    def captions(self) -> list[Caption] | None:
        """Captions drawn by hash, with the item of smallest id that shows the picture."""
        tables = self.shown.tables("captions", "images")
        if tables is None:
            return None
        captions, images = tables
        chosen = few(captions, "sha256", CAPTIONS)
        owners = (
            images.filter(pl.col("sha256").is_in(chosen["sha256"].implode()))
            .group_by("sha256")
            .agg(pl.col("item_id").min(), shared_by=pl.len())
        )
        rows = chosen.join(owners, on="sha256", how="left", maintain_order="left")
        texts = lookup(
            self.shown.table("item_summaries"),
            "item_id",
            rows["item_id"].drop_nulls(),
            "text_summary",
            "summary",
            "modality",
        )
        return [self._caption(row, texts.get(row["item_id"], {})) for row in rows.iter_rows(named=True)]

    def _caption(self, row: dict[str, Any], text: dict[str, Any]) -> Caption:
        tile = self.tiles([row["item_id"] or row["sha256"][:12]])[0]
        texts = (text.get(name) for name in ("text_summary", "summary", "modality"))
        return Caption(tile, row["shared_by"] or 0, row["caption"], *texts, error=row["error"])

    def users(self) -> list[User] | None:
        """Users drawn by hash among those with at least two steps, if there are such."""
        tables = self.shown.tables("preferences", "interactions")
        if tables is None:
            return None
        preferences, interactions = tables
        last = preferences.filter("is_latest")
        drawn = few(last.filter(pl.col("step") >= 2) if (last["step"] >= 2).any() else last, "user_id", USERS)
        return [self._user(user, of(user, "user_id", preferences), interactions) for user in drawn["user_id"]]

    def _user(self, user: str, steps: pl.DataFrame, interactions: pl.DataFrame) -> User:
        liked = of(user, "user_id", interactions).filter("liked").sort("seq")
        steps = steps.sort("step")
        kept = steps if len(steps) <= STEPS else pl.concat([steps.head(2), steps.tail(STEPS - 2)])
        scores = self._scores(user)
        held = first(scores.filter("label")) if scores is not None else {}
        return User(
            user,
            tuple(self._step(row, liked) for row in kept.iter_rows(named=True)),
            len(steps),
            self._recommended(user, held.get("item_id")),
            self.tiles([held["item_id"]])[0] if held else None,
            held.get("rank"),
            len(scores) if scores is not None else 0,
        )

    def _step(self, row: dict[str, Any], liked: pl.DataFrame) -> Step:
        tiles = self.tiles(read_by(row, liked).tail(PICTURES))
        return Step(row["step"], tiles, row["n_items"], row["preference"], row["error"])

    def _scores(self, user: str) -> pl.DataFrame | None:
        """The candidates of the user's newest test target."""
        scores = self.shown.table("scores")
        if scores is None:
            return None
        mine = of(user, "user_id", scores).filter(pl.col("split") == "test")
        return mine.filter(pl.col("target_seq") == pl.col("target_seq").max())

    def _recommended(self, user: str, held_out: str | None) -> tuple[Tile, ...]:
        table = self.shown.table("recommendations")
        if table is None:
            return ()
        items = of(user, "user_id", table).sort("rank").head(RECOMMENDED)["item_id"].to_list()
        return self.tiles(items, {held_out: "the held-out choice"} if held_out else None)

    def flags(self) -> list[Flag]:
        """The claims furthest below their null, one per text, worst first."""
        audit = self.shown.table("audit")
        if audit is None:
            return []
        worst = (
            audit.filter(pl.col("verdict") == "unsupported")
            .sort("quantile", "similarity", "subject", "subject_id", "n")
            .unique(["subject", "subject_id"], keep="first", maintain_order=True)
            .head(FLAGGED)
        )
        return [self._flag(row) for row in worst.iter_rows(named=True)]

    def _flag(self, row: dict[str, Any]) -> Flag:
        of_picture = row["subject"] == "caption"
        images, captions, summaries = (self.shown.table(name) for name in ("images", "captions", "item_summaries"))
        item = row["subject_id"]
        if of_picture:
            owners = (
                of(item, "sha256", images)["item_id"].sort() if images is not None else pl.Series([], dtype=pl.String)
            )
            item = owners[0] if len(owners) else item[:12]
        table, key, column = (captions, "sha256", "caption") if of_picture else (summaries, "item_id", "summary")
        text = lookup(table, key, [row["subject_id"]], column).get(row["subject_id"], {}).get(column)
        figures = (row["similarity"], row["quantile"])
        return Flag(self.tiles([item])[0], row["subject"], row["subject_id"], row["claim"], text, *figures)
