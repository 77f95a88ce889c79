"""Writes one logical catalogue in the exact form of each Amazon collection, from their documented schemas.

`FORMS` maps a form to a function from a catalogue to the files of its folder.
"""

from __future__ import annotations

import gzip
import html
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from storage.source import FsspecSource


def folder(files: Mapping[str, bytes]) -> FsspecSource:
    """A source in memory that holds these files; the one before is gone, since a listing walks all that is in memory."""
    source = FsspecSource("memory://readers")
    if source.files.fs.exists(source.files.root):
        source.files.fs.rm(source.files.root, recursive=True)
    for name, content in files.items():
        source.files.fs.pipe_file(source.files.path(name), content)
    return source


@dataclass(frozen=True)
class Product:
    item_id: str
    title: str | None = None
    description: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    brand: str | None = None
    price: float | None = None
    image: str | None = None


@dataclass(frozen=True)
class Review:
    user_id: str
    item_id: str
    rating: float
    at: int  # seconds


@dataclass(frozen=True)
class Shop:
    products: tuple[Product, ...]
    reviews: tuple[Review, ...]
    details: Mapping[str, Any] = field(default_factory=dict)  # of every product, where the form can carry it


def filled(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value is not None}


def json_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def literals(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(repr(record) + "\n" for record in records).encode()


def escaped(text: str | None) -> str | None:
    return None if text is None else html.escape(text)


# --- 2014 and 2018 ----------------------------------------------------------------------------------------------------


def review_2014(review: Review) -> dict[str, Any]:
    return {
        "reviewerID": review.user_id,
        "asin": review.item_id,
        "reviewerName": "J. McDonald",
        "helpful": [2, 3],
        "reviewText": 'He said "user_id": fine',
        "overall": review.rating,
        "summary": "Heavenly",
        "unixReviewTime": review.at,
        "reviewTime": "09 13, 2009",
    }


def review_2018(review: Review) -> dict[str, Any]:
    return {
        "overall": review.rating,
        "vote": "1,003",
        "verified": True,
        "reviewTime": "09 13, 2009",
        "reviewerID": review.user_id,
        "asin": review.item_id,
        "style": {"Format:": " Paperback"},
        "reviewerName": "J. McDonald",
        "reviewText": "fine",
        "summary": "Heavenly",
        "unixReviewTime": review.at,
        "image": ["https://images-na.ssl-images-amazon.com/images/I/review._SY88.jpg"],
    }


def meta_2014(product: Product) -> dict[str, Any]:
    return filled(
        {
            "asin": product.item_id,
            "title": escaped(product.title),
            "description": escaped(" ".join(product.description)) or None,
            "price": product.price,
            "imUrl": product.image,
            "related": {"also_bought": ["B00JHONN1S"]},
            "salesRank": {"Toys & Games": 211836},
            "brand": escaped(product.brand),
            "categories": [[html.escape(name) for name in product.path], ["Another", "Path"]] if product.path else None,
        }
    )


def meta_2018(product: Product) -> dict[str, Any]:
    return {
        "category": [html.escape(name) for name in product.path],
        "tech1": "",
        "description": [html.escape(part) for part in product.description],
        "title": escaped(product.title) or '<span id="productTitle">var t = (new Date()).getTime();',
        "also_buy": [],
        "imageURL": [product.image.replace(".jpg", "._SX38.jpg")] if product.image else [],
        "imageURLHighRes": [product.image] if product.image else [],
        "feature": [],
        "rank": "3,032,092 in Books (",
        "also_view": [],
        "main_cat": "Toys",
        "price": "" if product.price is None else f"${product.price:,}",
        "brand": escaped(product.brand) or "",
        "asin": product.item_id,
    }


def files_2014(shop: Shop) -> dict[str, bytes]:
    return {
        "reviews_Baby_5.json.gz": gzip.compress(json_lines(map(review_2014, shop.reviews))),
        "meta_Baby.json.gz": gzip.compress(literals(map(meta_2014, shop.products))),
    }


def files_2018(shop: Shop) -> dict[str, bytes]:
    return {
        "Baby_5.json.gz": gzip.compress(json_lines(map(review_2018, shop.reviews))),
        "meta_Baby.json.gz": gzip.compress(json_lines(map(meta_2018, shop.products))),
    }


# --- 2023 -------------------------------------------------------------------------------------------------------------


def review_2023(review: Review) -> dict[str, Any]:
    return {
        "rating": review.rating,
        "title": "Best Headphones",
        "text": 'He said "rating": 1.0, "timestamp": 3',
        "images": [],
        "asin": "VARIANT0001",
        "parent_asin": review.item_id,
        "user_id": review.user_id,
        "timestamp": 1_000 * review.at,
        "helpful_vote": 0,
        "verified_purchase": True,
    }


def pictures(product: Product) -> list[dict[str, Any]]:
    """The main picture behind another one; its largest size is missing now and then."""
    if product.image is None:
        return []
    other = {"thumb": "https://a/other._SS40_.jpg", "large": "https://a/other.jpg", "variant": "PT01", "hi_res": None}
    large_only = len(product.item_id) % 2 == 0
    main = {
        "thumb": "https://a/main._SS40_.jpg",
        "large": product.image if large_only else "https://a/smaller.jpg",
        "variant": "MAIN",
        "hi_res": None if large_only else product.image,
    }
    return [other, main]


def meta_2023(shop: Shop) -> list[dict[str, Any]]:
    return [
        {
            "main_category": "All Beauty",
            "title": escaped(product.title) or "",
            "average_rating": 4.8,
            "rating_number": 10,
            "features": [],
            "description": [html.escape(part) for part in product.description],
            "price": product.price,
            "images": pictures(product),
            "videos": [],
            "store": escaped(product.brand),
            "categories": [html.escape(name) for name in product.path],
            "details": shop.details,
            "parent_asin": product.item_id,
            "bought_together": None,
        }
        for product in shop.products
    ]


def plain_2023(shop: Shop) -> dict[str, bytes]:
    return {
        "Baby.jsonl": json_lines(map(review_2023, shop.reviews)),
        "meta_Baby.jsonl": json_lines(meta_2023(shop)),
    }


def files_2023(shop: Shop) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content) for name, content in plain_2023(shop).items()}


TEXTS = pl.List(pl.String)
HUB_META = {
    "main_category": pl.String,
    "title": pl.String,
    "average_rating": pl.Float64,
    "rating_number": pl.Int64,
    "features": TEXTS,
    "description": TEXTS,
    "price": pl.String,
    "images": pl.Struct({"hi_res": TEXTS, "large": TEXTS, "thumb": TEXTS, "variant": TEXTS}),
    "videos": pl.Struct({"title": TEXTS, "url": TEXTS, "user_id": TEXTS}),
    "store": pl.String,
    "categories": TEXTS,
    "details": pl.String,
    "parent_asin": pl.String,
    "bought_together": pl.String,
    "subtitle": pl.String,
    "author": pl.String,
}


def hub_meta(record: Mapping[str, Any]) -> dict[str, Any]:
    """As the hub's conversion to Parquet writes a record: parallel lists, prices and details as text."""
    names = ("hi_res", "large", "thumb", "variant")
    return dict(record) | {
        "price": str(record["price"]),
        "images": {name: [picture[name] for picture in record["images"]] for name in names},
        "videos": {"title": [], "url": [], "user_id": []},
        "details": json.dumps(record["details"]),
        "subtitle": None,
        "author": None,
    }


def parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def files_hub(shop: Shop) -> dict[str, bytes]:
    reviews = pl.DataFrame(
        [review_2023(review) | {"images": []} for review in shop.reviews],
        schema_overrides={"images": pl.List(pl.Struct({"large_image_url": pl.String})), "rating": pl.Float64},
    )
    meta = pl.DataFrame([hub_meta(record) for record in meta_2023(shop)], schema=HUB_META)
    half = reviews.height // 2
    return {
        "raw_review_Baby/full-00000-of-00002.parquet": parquet(reviews.slice(0, half)),
        "raw_review_Baby/full-00001-of-00002.parquet": parquet(reviews.slice(half)),
        "raw_meta_Baby/full-00000-of-00001.parquet": parquet(meta),
    }


def files_ids(shop: Shop) -> dict[str, bytes]:
    """The CSV of ids and ratings of 2023 beside its metadata."""
    rows = [f"{r.user_id},{r.item_id},{r.rating},{1_000 * r.at}\n" for r in shop.reviews]
    content = "".join(["user_id,parent_asin,rating,timestamp\n", *rows]).encode()
    return {"Baby.csv": content, "meta_Baby.jsonl": plain_2023(shop)["meta_Baby.jsonl"]}


FORMS: Mapping[str, Callable[[Shop], dict[str, bytes]]] = {
    "2014": files_2014,
    "2018": files_2018,
    "2023 jsonl": plain_2023,
    "2023 jsonl.gz": files_2023,
    "2023 parquet": files_hub,
    "2023 csv": files_ids,
}
