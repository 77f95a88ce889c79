"""demo: a built-in shop of drawn products and shoppers with drifting tastes, made from a seed alone.

Every picture is a pure function of its URI (`demo://mug/red/striped/7-I0012.png`), so nothing is stored or downloaded.
What a picture shows stands nowhere else: titles are an invented brand and a style word, now and then with the category,
and the other item columns are null.
The same generator, with other seeds, brands and ids and a tenth of all looks left out, is what the embedded models are
trained on. Beside the reader stand the ground truths a benchmark needs: the right words for a picture (`caption_text`),
the right preference after a block of choices (`update`), and `attributes`, which reads both back.
Knows nothing of models, prompts or stages.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from io import BytesIO
from itertools import accumulate, chain
from zlib import crc32

import numpy as np
import polars as pl
from PIL import Image, ImageDraw, ImageFilter
from pydantic import Field

from mllmsrec_core import stage
from mllmsrec_core.datasets import INTERACTIONS, ITEMS, Catalogue

COLOURS = {
    "red": (208, 36, 40),
    "orange": (242, 138, 24),
    "yellow": (246, 222, 50),
    "green": (44, 148, 62),
    "blue": (36, 82, 204),
    "purple": (124, 48, 156),
    "pink": (245, 150, 188),
    "black": (30, 30, 32),
}
PATTERNS = ("plain", "striped", "dotted")
CATEGORIES = ("mug", "lamp", "shirt", "chair", "bottle", "car", "ball", "kite")
ATTRIBUTES: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "pattern": PATTERNS, "category": CATEGORIES}

BACKDROPS = ((250, 250, 250), (233, 218, 188), (188, 222, 245), (192, 236, 208))
STYLES = ("Classic", "Modern", "Compact", "Deluxe", "Vintage", "Sport", "Urban", "Essential")
SYLLABLES = "ba co di fe ga ho ju ka lo mi na po qui ra so ta ve wi xa zo ren tor lin mar vel dor nix fen".split()

SIZE = 96  # pixels, both ways
BLOCK = 3  # choices between two moments at which a taste may drift; the preference stage's default block
NAMED = 0.2  # share of titles that name the category: enough to be lifelike, too few to rank by
DRIFT = 0.15  # chance that one attribute of a taste changes after a block
# How much more a matching attribute draws a shopper, in nats. Set so that the next choice can be told from a random
# item with an AUC of about .90 by whoever knows the taste, and of less than .60 from titles alone
# (`benchmarks/embedded_models.py` measures both). Kinds, the hardest words to compare, weigh least.
PULL = {"colour": 3.2, "pattern": 2.6, "category": 2.2}
OPENING = datetime(2024, 1, 1, tzinfo=UTC)

Look = dict[str, str]  # attribute -> value, for every attribute
Preference = dict[str, str | None]  # attribute -> value, None while nothing is known
NOTHING: Preference = dict.fromkeys(ATTRIBUTES)


class Params(stage.Params):
    items: int = Field(600, ge=1, le=100_000, description="of the shop")
    users: int = Field(400, ge=1, le=100_000, description="of the shop")
    seed: int = Field(default=7, description="another one is another shop")
    # A history is so many whole blocks of 3 choices, and two more: 11 to 20 choices.
    min_blocks: int = Field(3, ge=1, description="shortest history, in blocks of 3 choices")
    max_blocks: int = Field(6, ge=1, description="longest history, in blocks of 3 choices")


@dataclass(frozen=True, slots=True)
class Item:
    """A product: what the catalogue says of it, and its look, which only its picture shows."""

    item_id: str
    title: str
    colour: str
    pattern: str
    category: str
    seed: int

    @property
    def look(self) -> Look:
        return {name: getattr(self, name) for name in ATTRIBUTES}

    @property
    def uri(self) -> str:
        return f"demo://{self.category}/{self.colour}/{self.pattern}/{self.seed}-{self.item_id}.png"


def seeded(*names: object) -> random.Random:
    """Chance that depends on these names alone."""
    return random.Random(" ".join(map(str, names)))


# --- the shop ---------------------------------------------------------------------------------------------------------


def held_out(look: Look) -> bool:
    """Whether this look is one of the tenth that no model is trained on; the shop itself sells them all."""
    numbers = [values.index(look[name]) for name, values in ATTRIBUTES.items()]
    return sum(factor * number for factor, number in zip((7, 5, 3), numbers, strict=True)) % 10 == 0


def brand(rng: random.Random, training: bool) -> str:
    """An invented name. The checksum of a name says which side it is on, so the two sides share none."""
    while True:
        name = "".join(rng.choices(SYLLABLES, k=rng.choice((2, 3)))).capitalize()
        if crc32(name.encode()) % 2 == training:
            return name


def item(rng: random.Random, item_id: str, seed: int, training: bool = False) -> Item:
    """A random product, all looks equally likely; a `training` product never has a held-out look."""
    look = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
    while training and held_out(look):
        look = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
    title = f"{brand(rng, training)} {rng.choice(STYLES)}"
    if rng.random() < NAMED:
        title += f" {look['category'].capitalize()}"
    return Item(item_id, title, **look, seed=seed)


def assortment(count: int, seed: int, training: bool = False) -> list[Item]:
    """`count` products; those for training have ids T…, the shop's I…."""
    side = "T" if training else "I"
    rng = seeded("items", side, seed)
    return [item(rng, f"{side}{number:04d}", seed, training) for number in range(count)]


# --- its shoppers -----------------------------------------------------------------------------------------------------


def taste(rng: random.Random) -> Look:
    return {name: rng.choice(values) for name, values in ATTRIBUTES.items()}


def drift(rng: random.Random, now: Look) -> Look:
    """The taste one block later: with chance DRIFT, one attribute has become another value."""
    if rng.random() >= DRIFT:
        return now
    name = rng.choice(tuple(ATTRIBUTES))
    return now | {name: rng.choice([value for value in ATTRIBUTES[name] if value != now[name]])}


def pull(liked: Look, look: Look) -> float:
    """How strongly a taste is drawn to a look, in nats."""
    return sum(weight for name, weight in PULL.items() if liked[name] == look[name])


class Shelf:
    """Products to choose from; remembers how each taste weighs them, which depends on nothing else."""

    def __init__(self, products: Sequence[Item]) -> None:
        self.products = products
        self._weights: dict[tuple[str, ...], list[float]] = {}

    def choose(self, rng: random.Random, liked: Look) -> Item:
        """One product, drawn with weight exp(pull)."""
        key = tuple(liked.values())
        if key not in self._weights:
            self._weights[key] = list(accumulate(math.exp(pull(liked, product.look)) for product in self.products))
        return rng.choices(self.products, cum_weights=self._weights[key])[0]


def history(rng: random.Random, shelf: Shelf, blocks: int) -> tuple[list[Item], list[Look]]:
    """`blocks` whole blocks of choices and two more, and the taste behind each.

    Nothing is chosen twice while something is left: a repeated title would give the next choice away.
    """
    now, chosen, tastes = taste(rng), [], []
    for block in range(blocks + 1):
        for _ in range(BLOCK if block < blocks else 2):
            product = shelf.choose(rng, now)
            while product in chosen and len(chosen) < len(shelf.products):
                product = shelf.choose(rng, now)
            chosen.append(product)
            tastes.append(now)
        now = drift(rng, now)
    return chosen, tastes


def shoppers(params: Params) -> Iterable[tuple[str, list[Item], list[Look]]]:
    """Every user of the shop: id, choices from first to last, and the taste behind each."""
    shelf = Shelf(assortment(params.items, params.seed))
    for number in range(params.users):
        rng = seeded("user", params.seed, number)
        blocks = rng.randint(params.min_blocks, max(params.min_blocks, params.max_blocks))
        yield f"U{number:04d}", *history(rng, shelf, blocks)


def times(rng: random.Random, count: int) -> list[datetime]:
    """Strictly rising: most choices lie days apart, now and then weeks."""
    at, found = OPENING + timedelta(minutes=rng.randrange(180 * 1440)), []
    for _ in range(count):
        found.append(at)
        at += timedelta(minutes=60 + round(rng.expovariate(1 / (6 * 1440))))
    return found


def read(source: stage.Source | None, params: Params) -> Catalogue:
    """The shop as a catalogue; `source` is not read, since the shop is made from `params` alone."""
    products = [
        {"item_id": product.item_id, "title": product.title, "image_uri": product.uri}
        for product in assortment(params.items, params.seed)
    ]
    choices = []
    for user_id, chosen, _ in shoppers(params):
        moments = times(seeded("times", params.seed, user_id), len(chosen))
        choices += [
            {"user_id": user_id, "item_id": product.item_id, "at": at, "liked": True}
            for product, at in zip(chosen, moments, strict=True)
        ]
    return Catalogue(
        items=pl.DataFrame(products, schema=ITEMS | {"source": pl.String, "line": pl.UInt32}),
        interactions=pl.DataFrame(choices, schema=INTERACTIONS),
    )


# --- its pictures -----------------------------------------------------------------------------------------------------

_URI = re.compile(r"demo://(?P<category>\w+)/(?P<colour>\w+)/(?P<pattern>\w+)/(?P<name>[\w-]+)\.png")


def truth(uri: str) -> Look:
    """What the picture at `uri` shows. ValueError when it is no picture of the shop."""
    match = _URI.fullmatch(uri)
    look = {name: match[name] for name in ATTRIBUTES} if match else {}
    if not match or any(look[name] not in values for name, values in ATTRIBUTES.items()):
        wanted = "demo://<category>/<colour>/<pattern>/<name>.png"
        raise ValueError(f"{uri!r} is no picture of the demo shop, whose URIs look like {wanted}")
    return look


def picture(uri: str) -> bytes:
    """The PNG at `uri`, SIZE pixels square: pose, scale, place, backdrop and noise are drawn from the URI itself."""
    buffer = BytesIO()
    draw(uri).save(buffer, "PNG")
    return buffer.getvalue()


def draw(uri: str) -> Image.Image:
    """`picture` before it is encoded, for whoever needs the pixels."""
    look, rng = truth(uri), seeded(uri)
    side = 2 * SIZE  # drawn at twice the size, for smooth edges
    shape = _placed(_silhouette(look["category"], side, rng), side, rng)
    backdrop = _jitter(rng, rng.choice(BACKDROPS), 0.03)
    canvas = Image.new("RGB", (side, side), backdrop)
    shadow = Image.new("RGB", (side, side), tuple(int(value * 0.8) for value in backdrop))
    canvas.paste(shadow, (4, 6), shape.filter(ImageFilter.GaussianBlur(4)))
    canvas.paste(_cloth(look, side, rng), (0, 0), shape)
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float32)
    grain = np.frombuffer(rng.randbytes(pixels.size), dtype=np.uint8).reshape(pixels.shape) / 255 - 0.5
    return Image.fromarray(np.clip(pixels + 12 * grain, 0, 255).astype(np.uint8))


def _jitter(rng: random.Random, colour: tuple[int, ...], share: float) -> tuple[int, ...]:
    changed = (value * rng.uniform(1 - share, 1 + share) + rng.uniform(-8, 8) for value in colour)
    return tuple(min(255, max(0, int(value))) for value in changed)


def _placed(shape: Image.Image, side: int, rng: random.Random) -> Image.Image:
    """The silhouette turned, scaled, perhaps mirrored, and put somewhere within the frame."""
    if rng.random() < 0.5:
        shape = shape.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    extent = int(side * rng.uniform(0.7, 0.96))
    shape = shape.resize((extent, extent)).rotate(rng.uniform(-12, 12), resample=Image.Resampling.BILINEAR)
    frame = Image.new("L", (side, side), 0)
    frame.paste(shape, (int(rng.random() * (side - extent)), int(rng.random() * (side - extent))))
    return frame


def _cloth(look: Look, side: int, rng: random.Random) -> Image.Image:
    """The surface of the product: its colour, and in near-white what its pattern adds."""
    cloth = Image.new("RGB", (side, side), _jitter(rng, COLOURS[look["colour"]], 0.07))
    brush, white = ImageDraw.Draw(cloth), _jitter(rng, (244, 244, 244), 0.03)
    gap, upright = side * rng.uniform(0.1, 0.13), rng.random() < 0.3
    start = rng.uniform(-gap, 0)
    lines = [start + gap * number for number in range(int(side / gap) + 3)]
    if look["pattern"] == "striped":
        for at in lines:
            brush.rectangle((at, 0, at + 0.42 * gap, side) if upright else (0, at, side, at + 0.42 * gap), fill=white)
    elif look["pattern"] == "dotted":
        for x, y in ((x, y) for x in lines for y in lines):
            brush.ellipse((x - 0.28 * gap, y - 0.28 * gap, x + 0.28 * gap, y + 0.28 * gap), fill=white)
    return cloth


# The parts of each silhouette in a unit square: shape, its coordinates, and whether it adds (1) or cuts away (0).
_PARTS: dict[str, tuple[tuple[str, tuple[float, ...], int], ...]] = {
    "mug": (
        ("ellipse", (0.46, 0.3, 0.94, 0.74), 1),
        ("ellipse", (0.58, 0.4, 0.82, 0.64), 0),
        ("rectangle", (0.12, 0.18, 0.64, 0.82), 1),
        ("ellipse", (0.12, 0.74, 0.64, 0.9), 1),
    ),
    "lamp": (
        ("polygon", (0.36, 0.08, 0.64, 0.08, 0.86, 0.48, 0.14, 0.48), 1),
        ("rectangle", (0.46, 0.48, 0.54, 0.86), 1),
        ("ellipse", (0.26, 0.8, 0.74, 0.94), 1),
    ),
    "shirt": (
        ("polygon", (0.34, 0.12, 0.66, 0.12, 0.98, 0.32, 0.86, 0.5, 0.72, 0.4, 0.72, 0.92, 0.28, 0.92, 0.28, 0.4), 1),
        ("polygon", (0.34, 0.12, 0.02, 0.32, 0.14, 0.5, 0.28, 0.4, 0.5, 0.3), 1),
        ("ellipse", (0.4, 0.02, 0.6, 0.22), 0),
    ),
    "chair": (
        ("rectangle", (0.18, 0.06, 0.32, 0.94), 1),
        ("rectangle", (0.18, 0.5, 0.82, 0.66), 1),
        ("rectangle", (0.7, 0.5, 0.82, 0.94), 1),
    ),
    "bottle": (
        ("rectangle", (0.43, 0.04, 0.57, 0.36), 1),
        ("polygon", (0.43, 0.26, 0.57, 0.26, 0.7, 0.44, 0.3, 0.44), 1),
        ("rectangle", (0.3, 0.43, 0.7, 0.96), 1),
    ),
    "car": (
        ("polygon", (0.26, 0.32, 0.66, 0.32, 0.8, 0.52, 0.18, 0.52), 1),
        ("rectangle", (0.03, 0.5, 0.97, 0.7), 1),
        ("ellipse", (0.14, 0.58, 0.38, 0.82), 1),
        ("ellipse", (0.62, 0.58, 0.86, 0.82), 1),
    ),
    "ball": (("ellipse", (0.12, 0.12, 0.88, 0.88), 1),),
    "kite": (
        ("polygon", (0.5, 0.02, 0.86, 0.32, 0.5, 0.78, 0.14, 0.32), 1),
        ("polygon", (0.5, 0.76, 0.64, 0.98, 0.36, 0.98), 1),
    ),
}


def _silhouette(category: str, side: int, rng: random.Random) -> Image.Image:
    """The outline of a category as a mask, each of its parts' coordinates moved by up to 2 % of the side."""
    mask = Image.new("L", (side, side), 0)
    brush = ImageDraw.Draw(mask)
    for shape, points, adds in _PARTS[category]:
        moved = [side * (value + rng.uniform(-0.02, 0.02)) for value in points]
        getattr(brush, shape)(moved, fill=255 * adds)
    return mask


# --- what is right to say ---------------------------------------------------------------------------------------------


def caption_text(look: Look) -> str:
    return f"A {look['pattern']} {look['colour']} {look['category']}."


def text_summary_text(title: str) -> str:
    return f"{title}."


def summary_text(title: str, look: Look) -> str:
    return f"{title}: a {look['pattern']} {look['colour']} {look['category']}."


def answers(look: Look) -> tuple[str, str, str]:
    """The answers to the summary stage's visual questions: what it is, its colour, its pattern."""
    return f"a {look['category']}", look["colour"], look["pattern"]


def update(before: Preference, looks: Sequence[Preference]) -> Preference:
    """The preference after one more block: per attribute the value of at least two of its items, else what it was."""
    return {name: _favourite([look[name] for look in looks]) or before[name] for name in ATTRIBUTES}


def _favourite(values: Sequence[str | None]) -> str | None:
    """The most frequent value if it occurs twice, the latest of equals; unknown values do not count."""
    counts = Counter(value for value in reversed(values) if value)
    value, count = counts.most_common(1)[0] if counts else (None, 0)
    return value if count >= 2 else None


def preference_text(preference: Preference) -> str:
    """A preference in words; each value stands before a noun of its own, by which a small model finds it again."""
    colour = f"{preference['colour']} colours" if preference["colour"] else "any colour"
    pattern = f"{preference['pattern']} patterns" if preference["pattern"] else "any pattern"
    category = f"{preference['category']} shapes" if preference["category"] else "any shape"
    return f"The user likes {colour}, {pattern} and {category}."


@cache
def _words() -> re.Pattern[str]:
    every = "|".join(chain.from_iterable(ATTRIBUTES.values()))
    return re.compile(rf"\b({every})s?\b", re.IGNORECASE)


def attributes(text: str | None) -> Preference:
    """The attributes a caption, summary or preference speaks of: the last word of each kind, None without one."""
    found: Preference = dict(NOTHING)
    for word in _words().findall(text or ""):
        name = next(name for name, values in ATTRIBUTES.items() if word.lower() in values)
        found[name] = word.lower()
    return found
