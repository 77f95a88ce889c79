"""A very small shop as files of one's own: items with pictures, and clicks; every edit of it is one line of a test."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from PIL import Image

FIRST_DAY = date(2026, 1, 1)
N_ITEMS, N_USERS, N_CLICKS = 30, 8, 13
COLOURS = ("red", "green", "blue", "orange", "purple")


@dataclass(frozen=True)
class Item:
    title: str
    category: str
    colour: str  # of its picture, which also holds the item's number

    def picture(self, number: int) -> bytes:
        buffer = io.BytesIO()
        picture = Image.new("RGB", (24, 24), self.colour)
        picture.putpixel((number % 24, number // 24), (1, 2, 3))
        picture.save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True)
class Shop:
    """Items by id, and clicks (user, item, day) in no order that matters."""

    items: dict[str, Item] = field(default_factory=dict)
    clicks: tuple[tuple[str, str, int], ...] = ()

    def with_item(self, name: str, item: Item) -> Shop:
        return replace(self, items={**self.items, name: item})

    def with_click(self, user: str, item: str, day: int) -> Shop:
        return replace(self, clicks=(*self.clicks, (user, item, day)))

    def write(self, root: Path) -> None:
        """The shop's files; a picture that is there already is left as it is."""
        (root / "pictures").mkdir(parents=True, exist_ok=True)
        lines = ["item_id,title,category,picture"]
        for name, item in self.items.items():
            path = root / "pictures" / f"{name}.png"
            content = item.picture(int(name[1:]))
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
            lines.append(f"{name},{item.title},{item.category},pictures/{name}.png")
        (root / "items.csv").write_text("\n".join(lines) + "\n")
        clicks = [f"{user},{item},{FIRST_DAY + timedelta(days=day)}T12:00:00Z" for user, item, day in self.clicks]
        (root / "clicks.csv").write_text("\n".join(["user_id,item_id,at", *clicks]) + "\n")


def a_shop() -> Shop:
    """30 items, and 8 users who click one of them every third day; no two histories are alike."""
    items = {
        f"i{n:02d}": Item(f"Thing number {n}", ("mugs", "caps", "bags")[n % 3], COLOURS[n % 5]) for n in range(N_ITEMS)
    }
    clicks = [
        (f"u{user}", f"i{(user * 7 + click * (user + 2)) % N_ITEMS:02d}", 3 * click + user)
        for user in range(N_USERS)
        for click in range(N_CLICKS)
    ]
    return Shop(items, tuple(clicks))


def sets(root: Path, store: Path, **others: Any) -> list[str]:
    """`--set` options of a scripted run on the files below `root`; `sft__rank=4` overrides."""
    values = {
        "settings.store": f'"{store}"',
        "model": '"scripted"',
        "audit.model": '"scripted"',
        "ingest.dataset": '"generic"',
        "ingest.path": f'"{root}"',
        "ingest.generic.items_file": '"items.csv"',
        "ingest.generic.interactions_file": '"clicks.csv"',
        "ingest.generic.at_unit": '"iso"',
        "ingest.generic.item_columns.category": '"category"',
        "ingest.generic.item_columns.image": '"picture"',
        "examples.n_negatives": 5,
        "audit.null_images": 4,
        **{name.replace("__", "."): value for name, value in others.items()},
    }
    return [f"{name}={value}" for name, value in values.items()]
