"""score: how much more likely "yes" is than "no" for each user and candidate, ranks, and metrics beside baselines.

Both papers ask a tuned multimodal model whether the user would take the candidate and read p(yes) / (p(yes) + p(no))
off the first token; the logit (yes - no) does not round. A candidate without an answer stays: null logit, last rank.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp
from typing import Annotated, Any, Literal

import dataframely as dy
import polars as pl
from pydantic import Field

from mllmsrec_core import baselines, metrics
from mllmsrec_core.ask import Choose, Message, Picture, key
from mllmsrec_core.profile import PAIR, profile, usual_rating
from mllmsrec_core.protocol import SPLITS, training
from mllmsrec_core.stage import AskParams, Chain, Inputs, Row, Stage, fields
from mllmsrec_core.text import fence

PROMPT = "{user}\nCandidate: {item}\nWould the user choose this candidate next? Answer yes or no."
IMAGE_FIRST = "Candidate: {item}\n{user}\nWould the user choose this candidate next? Answer yes or no."
NO_PICTURE = " It has no picture."
YES_NO = (("yes", ("yes", "Yes", " yes", " Yes")), ("no", ("no", "No", " no", " No")))


class Params(AskParams):
    model: str = Field("", description="empty: the model of all stages")
    prompt: Annotated[str, fields("user", "item")] = Field(PROMPT, description="the question, in training too")
    layout: Literal["user_first", "image_first"] = Field("user_first", description="which part all prompts share")
    item: Literal["summary", "title"] = Field("summary", description="what is said of the candidate")
    picture: bool = Field(True, description="the candidate's picture stands in the prompt")
    profile: bool = Field(True, description="the deterministic user profile stands in the prompt")
    keep_last: int = Field(0, description="this many raw titles, newest last, stand beside the preference")
    top_k: int = Field(10, description="recommendations a user gets")
    max_pixels: int = Field(1_000_000, ge=1, description="larger pictures are scaled down to this")


class Scores(dy.Schema):
    user_id = dy.String(primary_key=True)
    split = dy.Enum(SPLITS, primary_key=True)
    target_seq = dy.Int32(primary_key=True)
    item_id = dy.String(primary_key=True)
    label = dy.Bool()
    logit = dy.Float64(nullable=True)  # log p(yes) - log p(no)
    p_yes = dy.Float64(nullable=True)  # p(yes) / (p(yes) + p(no))
    p_calibrated = dy.Float64(nullable=True)  # Platt scaling fitted on valid
    mass = dy.Float64(nullable=True)  # p(yes) + p(no): how much of the model's next word is an answer at all
    rank = dy.Float64(min=1)  # expected rank in its list, ties shared
    ask = dy.Binary(nullable=True)
    error = dy.String(nullable=True)
    stale_since = dy.Datetime(time_unit="us", time_zone="UTC", nullable=True)


class Metrics(dy.Schema):
    scorer = dy.String(primary_key=True)
    metric = dy.String(primary_key=True)
    k = dy.Int32(primary_key=True)  # 0 where the metric has no cut-off
    slice = dy.String(primary_key=True)
    value = dy.Float64(nullable=True)
    low = dy.Float64(nullable=True)
    high = dy.Float64(nullable=True)
    n_users = dy.Int64()
    tie_rate = dy.Float64()
    missing_rate = dy.Float64()
    candidate_set = dy.String()  # the commonest among the lists: figures compare only within one


class Recommendations(dy.Schema):
    user_id = dy.String(primary_key=True)
    rank = dy.Int32(primary_key=True, min=1)
    item_id = dy.String()
    score = dy.Float64()


def user_text(row: Row) -> str:
    """What the prompt says of the user: profile, preference, last titles; each line only where there is something."""
    lines = [
        row["profile"] and f"User profile: {fence(row['profile'])}",
        row["preference"] and f"The user's preference: {fence(row['preference'])}",
        row["last_titles"] and "Chosen last: " + "; ".join(fence(title) for title in row["last_titles"]),
    ]
    return "\n".join(line for line in lines if line) or "Nothing is known of the user."


def prompt(params: Params, row: Row) -> tuple[Message, ...]:
    """The question for one user and candidate, laid out so that a user's candidates, or an item's users, begin alike.

    `row`: profile, preference, last_titles, item_text, sha256 (None where there is no picture). `image_first`: the
    picture, then the item, then the user; in a `prompt` of one's own item and user stay where they are.
    """
    image_first = params.layout == "image_first"
    item = fence(row["item_text"]) + (NO_PICTURE if params.picture and not row["sha256"] else "")
    words = IMAGE_FIRST if image_first and params.prompt == PROMPT else params.prompt
    text = words.format(user=user_text(row), item=item)
    parts: tuple[Any, ...] = (text, Picture(row["sha256"])) if params.picture and row["sha256"] else (text,)
    return (Message("user", parts[::-1] if image_first else parts),)


def contexts(inputs: Inputs, examples: pl.DataFrame) -> pl.DataFrame:
    """`examples` with all that `prompt` reads: profile, preference, last_titles, item_text, sha256.

    Of the user only what lies before the target: the named preference step, and interactions with a smaller seq.
    """
    params: Params = inputs.params["score"]
    interactions, items = inputs["interactions"], inputs["items"]
    pairs = examples.select(PAIR).unique()
    if params.profile:
        usual = usual_rating(training(interactions, inputs["examples"], inputs.params["examples"].valid_from))
        profiles = profile(pairs, interactions, items, usual)
    else:
        profiles = pairs.with_columns(profile=pl.lit(None, pl.String))
    titles = items.select("item_id", title=pl.col("title").fill_null("an unknown item"))
    last = (
        interactions.filter("liked")
        .join(titles, on="item_id")
        .join(pairs, on="user_id")
        .filter(pl.col("seq") < pl.col("target_seq"))
        .sort("seq")
        .group_by(PAIR)
        .agg(last_titles=pl.col("title").tail(params.keep_last))
    )
    text = titles.join(inputs["item_summaries"].select("item_id", "summary"), on="item_id", how="left")
    item_text = pl.coalesce("summary", "title") if params.item == "summary" else pl.col("title")
    images = inputs["images"].filter(pl.col("status") == "ok").select("item_id", "sha256")
    return (
        examples.join(profiles, on=PAIR, how="left")
        .join(inputs["preferences"].select("user_id", "step", "preference"), on=("user_id", "step"), how="left")
        .join(last, on=PAIR, how="left")
        .join(text.select("item_id", item_text=item_text), on="item_id", how="left")
        .join(images, on="item_id", how="left")
        .sort(*PAIR, "item_id")
    )


def rows(inputs: Inputs) -> pl.DataFrame:
    """Valid and test examples with their contexts; those whose prompts begin alike stand side by side."""
    adapter = inputs["adapters"]["sha256"].drop_nulls().first()
    examples = inputs["examples"].filter(pl.col("split") != "train")
    image_first = inputs.params["score"].layout == "image_first"
    order = ("sha256", "item_text", *PAIR, "item_id") if image_first else (*PAIR, "item_text", "sha256", "item_id")
    return contexts(inputs, examples).sort(order).with_columns(adapter=pl.lit(adapter, pl.String))


def ask(inputs: Inputs, row: Row) -> Chain:
    model = replace(inputs.need_model(), adapter=row["adapter"])
    question = Choose(model, prompt(inputs.params["score"], row), YES_NO)
    reply = yield question
    logit = reply.value and reply.value["logprobs"]["yes"] - reply.value["logprobs"]["no"]
    mass = reply.value and reply.value["mass"]
    done = {name: row[name] for name in ("user_id", "split", "target_seq", "item_id", "label")}
    p_yes = None if logit is None else 1 / (1 + exp(-logit)) if logit >= 0 else exp(logit) / (1 + exp(logit))
    return [{**done, "logit": logit, "p_yes": p_yes, "mass": mass, "ask": key(question), "error": reply.error}]


def measured(inputs: Inputs, test: pl.DataFrame) -> pl.DataFrame:
    """The metrics table: the model beside random, popularity and ItemKNN on the same candidates."""
    interactions, examples = inputs["interactions"], inputs["examples"].filter(pl.col("split") == "test")
    trained = training(interactions, inputs["examples"], inputs.params["examples"].valid_from)
    scorers = {
        "model": test["logit"],
        "random": baselines.random(test),
        "popularity": baselines.popularity(test, trained),
        "itemknn": baselines.itemknn(test, interactions, trained),
    }
    target = examples.join(test, on=(*PAIR, "item_id"), how="semi").filter("label").sort(PAIR)
    cuts = metrics.slices(target["n_history"].to_numpy(), baselines.popularity(target, trained))
    commonest = examples["candidate_set"].mode().sort().first()
    figures = metrics.evaluate(test.with_columns(pl.Series(n, s) for n, s in scorers.items()), list(scorers), cuts)
    return figures.with_columns(candidate_set=pl.lit(commonest, pl.String))


def tables(inputs: Inputs, done: pl.DataFrame) -> dict[str, pl.DataFrame]:
    params: Params = inputs.params["score"]
    done = done.sort(*PAIR, "item_id").with_columns(pl.col("logit").fill_nan(None))  # figures know no layout
    valid, test = (done.filter(pl.col("split") == name) for name in ("valid", "test"))
    scores = done.with_columns(
        metrics.calibrated(done["logit"], valid["logit"], valid["label"]),
        rank=metrics.expected_rank(pl.col("logit")).over("user_id", "split", "target_seq"),
    )
    newest = test.filter(pl.col("target_seq") == pl.col("target_seq").max().over("user_id"))
    best = metrics.top(newest.select("user_id", "item_id", score="logit"), params.top_k)
    return {"scores": scores, "metrics": measured(inputs, test), "recommendations": best}


STAGE = Stage(
    name="score",
    params=Params,
    reads=("examples", "interactions", "items", "images", "item_summaries", "preferences", "adapters"),
    writes={"scores": Scores, "metrics": Metrics, "recommendations": Recommendations},
    rows=rows,
    ask=ask,
    tables=tables,
    done={name: column.dtype for name, column in Scores.columns().items() if name not in ("p_calibrated", "rank")},
    needs=("examples",),
    unit=("user_id", "split", "target_seq", "item_id"),
)
