"""audit: is what the captions and summaries say to be seen in the picture? Claim by claim, with CLIP.

MLLM-SRec reports a hallucination study by CLIP distance and publishes neither formula nor threshold; this design is
ours. A bare cosine has no scale (LAION and DataComp use 0.25 to 0.30 for one model), so each claim is compared with
itself on other pictures: its quantile in that null distribution says how much better it fits its own. Claims are
sentences and their phrases, because CLIP reads a long text as a bag of words. Words taken from the item's own text are
not the picture's to confirm: "not_visual", never "unsupported". Use a CLIP of another family than the captioner's
vision tower.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import dataframely as dy
import numpy as np
import polars as pl
from pydantic import Field

from mllmsrec_core.ask import Embed, Picture, Reply, key
from mllmsrec_core.errors import ContextTooLong
from mllmsrec_core.protocol import by_hash, hash64, mix
from mllmsrec_core.stage import AskParams, Chain, Inputs, Row, Stage
from mllmsrec_core.text import clean

_SENTENCE = re.compile(r"(?<=[.!?;])\s+")
_PHRASE = re.compile(r",|\b(?:and|with)\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+")
# Words that hold for any picture: a claim made of nothing else claims nothing.
_EMPTY = frozenset(
    "a an and are as at by for from has have in is it its item of on or picture that the this to with".split()
)


class Params(AskParams):
    model: str = Field("embedded-clip", description="a CLIP of another family than the captioner: other mistakes")
    null_images: int = Field(16, ge=1, description="other pictures that a claim is compared with")
    # With 16 others, at most two may fit better. Let a claim hold for one picture in eight and CLIP be perfect: then
    # 89 % of true claims pass and 7 % of false ones; at 0.9 it would be 73 % and 3 % (binomial, in the tests).
    grounded_from: float = Field(0.85, gt=0, lt=1, description="least share of them that the claim fits worse")
    max_words: int = Field(45, ge=1, description="longest claim")  # about 60 tokens; CLIP's context holds 77
    seed: int = Field(0, description="of the choice of other pictures")


class Audit(dy.Schema):
    subject = dy.Enum(["caption", "summary"], primary_key=True)
    subject_id = dy.String(primary_key=True)  # the picture's sha256, or the item's id
    n = dy.Int32(primary_key=True, min=1)
    claim = dy.String()
    similarity = dy.Float64(nullable=True)
    quantile = dy.Float64(nullable=True)  # share of the null below the claim, ties counted half
    verdict = dy.Enum(["grounded", "unsupported", "not_visual"], nullable=True)
    ask = dy.Binary(nullable=True)
    error = dy.String(nullable=True)
    stale_since = dy.Datetime(time_unit="us", time_zone="UTC", nullable=True)


def words(text: str | None) -> frozenset[str]:
    """The lower-case words of a text that can claim something."""
    return frozenset(_WORD.findall((text or "").lower())) - _EMPTY


def claims(text: str) -> list[str]:
    """Each sentence, then its phrases between commas, "and" and "with" where there are several; no claim twice."""
    found: list[str] = []
    for sentence in _SENTENCE.split(clean(text)):
        phrases = [part.strip(" .!?;") for part in _PHRASE.split(sentence)]
        found += [sentence.strip(" .!?;"), *(part for part in phrases if words(part))]
    return list(dict.fromkeys(claim for claim in found if claim))


def visual(claim: str, quoted: str | None, seen: str | None) -> bool:
    """False where a claim holds no word at all, or only words of the item's own text and none of the caption."""
    said = words(claim)
    return bool(said) and not (said <= words(quoted) and said.isdisjoint(words(seen)))


def quantile(similarity: float, null: Sequence[float]) -> float:
    """The share of the null below `similarity`, ties counted half."""
    others = np.asarray(null)
    return float(((others < similarity) + 0.5 * (others == similarity)).mean())


def swapped(claim: str, group: Sequence[str], seed: int = 0) -> str | None:
    """`claim` with its first word of `group` (colours, say) replaced by another of them, by hash; None without one.

    Planted swaps are false claims of known kind: the AUC of quantiles, true against swapped, measures the audit.
    """
    for found in _WORD.finditer(claim):
        if (word := found.group().lower()) in group:
            others = sorted(set(group) - {word})
            chosen = others[int(mix(seed, hash64([claim]))[0] % np.uint64(len(others)))] if others else word
            return claim[: found.start()] + chosen + claim[found.end() :] if others else None
    return None


def rows(inputs: Inputs) -> pl.DataFrame:
    """One row per picture: the texts about it (`subjects`) and the other pictures of its null (`null`).

    The null of a picture is the next ones on a circle ordered by hash: a new picture enters the null of few others.
    """
    params: Params = inputs.params["audit"]
    items, shown = inputs["items"], inputs["images"].filter(pl.col("status") == "ok").select("item_id", "sha256")
    circle = by_hash(shown.select("sha256").unique(), ("sha256",), params.seed)
    size, n = len(circle), min(params.null_images, len(circle) - 1)
    places = (np.arange(size)[:, None] + np.arange(1, n + 1)) % max(size, 1)
    null = pl.Series("null", [circle["sha256"][row].to_list() for row in places], pl.List(pl.String))

    captions = inputs["captions"].drop_nulls("caption").select("sha256", "caption")
    text = pl.concat_str("title", "category", "description", separator=" ", ignore_nulls=True)
    described = (
        shown.join(inputs["item_summaries"].select("item_id", "summary").drop_nulls(), on="item_id")
        .join(items.select("item_id", quoted=text), on="item_id", how="left")
        .join(captions, on="sha256", how="left")
    )
    subject = ("sha256", "subject", "subject_id", "text", "quoted", "seen")
    none = pl.lit(None, pl.String)
    texts = [
        captions.select(
            "sha256",
            pl.lit("caption").alias("subject"),
            pl.col("sha256").alias("id"),
            "caption",
            none.alias("q"),
            none.alias("s"),
        ),
        described.select("sha256", pl.lit("summary"), "item_id", "summary", "quoted", "caption"),
    ]
    subjects = (
        pl.concat([part.rename(dict(zip(part.columns, subject, strict=True))) for part in texts])
        .sort("subject", "subject_id")
        .group_by("sha256", maintain_order=True)
        .agg(subjects=pl.struct(subject[1:]))
    )
    return circle.with_columns(null).join(subjects, on="sha256").sort("sha256")


def ask(inputs: Inputs, row: Row) -> Chain:
    params: Params = inputs.params["audit"]
    model = inputs.need_model()
    replies: dict[str, Reply] = {}
    for sha256 in (row["sha256"], *row["null"]):
        replies[sha256] = yield Embed(model, Picture(sha256))
    picture = replies.pop(row["sha256"])
    null = [np.array(reply.value) for reply in replies.values() if reply.value is not None]

    done: list[Row] = []
    for subject in row["subjects"]:
        for n, claim in enumerate(claims(subject["text"]), 1):
            verdict: Row = dict.fromkeys(("similarity", "quantile", "verdict", "ask", "error"))
            if not visual(claim, subject["quoted"], subject["seen"]):
                verdict["verdict"] = "not_visual"
            elif len(claim.split()) > params.max_words:
                verdict["error"] = ContextTooLong.error_class
            else:
                question = Embed(model, claim)
                reply = yield question
                verdict |= {"ask": key(question), "error": reply.error or picture.error}
                if reply.value is not None and picture.value is not None:
                    verdict |= judged(params, np.array(reply.value), np.array(picture.value), null)
            done.append(
                {"subject": subject["subject"], "subject_id": subject["subject_id"], "n": n, "claim": claim} | verdict
            )
    return done


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """The dot product of two unit vectors; a plan's stand-in may be shorter and is met on its own length."""
    size = min(len(one), len(other))
    return float(np.dot(one[:size], other[:size]))


def judged(params: Params, claim: np.ndarray, picture: np.ndarray, null: Sequence[np.ndarray]) -> Row:
    """Similarity, quantile and verdict of one claim; without other pictures there is nothing to compare with."""
    similarity = cosine(claim, picture)
    if not null:
        return {"similarity": similarity}
    place = quantile(similarity, [cosine(claim, other) for other in null])
    verdict = "grounded" if place >= params.grounded_from else "unsupported"
    return {"similarity": similarity, "quantile": place, "verdict": verdict}


def tables(inputs: Inputs, done: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {"audit": done}


STAGE = Stage(
    name="audit",
    params=Params,
    reads=("items", "images", "captions", "item_summaries"),
    writes={"audit": Audit},
    rows=rows,
    ask=ask,
    tables=tables,
    unit=("sha256",),
)
