"""The embedded default for real: a small shop through every stage with the models that ship, on pictures they never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mllmsrec_core.datasets import demo
from mllmsrec_core.metrics import pooled_auc
from mllmsrec_core.stages.audit import swapped
from tasks.stage_task import STAGE_BY_NAME

FOLDER = Path(__file__).parents[2] / "tasks" / "embedded"
SETS = [
    "ingest.demo.items=60",
    "ingest.demo.users=12",
    "ingest.demo.seed=11",
    "sft.max_examples=192",
    "sft.epochs=2",
    "settings.flush_rows=50",
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, run_all: Any) -> dict[str, Any]:
    """Every table of one run; `store` is where it stands."""
    from flows.settings import load
    from tasks.work import open_work

    store = tmp_path_factory.mktemp("embedded") / "store"
    config = load(["demo"], [*SETS, f"settings.store={store}"], {})
    stages = run_all(config)
    work = open_work(config.to_json())
    tables = {
        table: work.store.tables.read(table, made["write_id"])
        for record in stages.values()
        for table, made in record["tables"].items()
    }
    return {**tables, "stages": stages, "work": work}


def test_every_stage_finishes_without_a_failed_row(shop):
    assert {name: record["counts"]["failed"] for name, record in shop["stages"].items()} == dict.fromkeys(
        STAGE_BY_NAME, 0
    )


def test_captions_are_read_off_the_pixels(shop):
    """Nine attributes in ten; a guess would have one in eight, three and eight. The benchmark has the exact shares."""
    seen = shop["items"].join(shop["item_summaries"], on="item_id")
    right = [
        demo.attributes(row["caption"])[name] == value
        for row in seen.iter_rows(named=True)
        for name, value in demo.truth(row["image_uri"]).items()
    ]
    assert sum(right) / len(right) > 0.9


def test_summaries_hold_the_title_and_the_look(shop):
    for row in shop["items"].join(shop["item_summaries"], on="item_id").iter_rows(named=True):
        assert row["modality"] == "both"
        assert demo.attributes(row["summary"]) == demo.attributes(row["caption"])


def test_preferences_follow_the_items_better_than_standing_still_would(shop):
    """Against the rule on true looks, each step on the model's own step before."""
    looks = {row["item_id"]: demo.truth(row["image_uri"]) for row in shop["items"].iter_rows(named=True)}
    right, still = [], []
    for user in shop["preferences"].partition_by("user_id"):
        chosen = shop["interactions"].filter(pl.col("user_id") == user["user_id"][0]).sort("seq")["item_id"].to_list()
        truth = demo.NOTHING
        for step, text in enumerate(user["preference"]):
            before, truth = truth, demo.update(truth, [looks[i] for i in chosen[step * 3 : step * 3 + 3]])
            said = demo.attributes(text)
            right += [said[name] == truth[name] for name in truth]
            still += [before[name] == truth[name] for name in truth]
    assert sum(right) / len(right) > 0.85
    assert sum(right) > sum(still)


def test_the_adapter_was_trained_and_its_scores_are_of_yes_and_no(shop):
    (adapter,) = shop["adapters"].to_dicts()
    assert adapter["sha256"] and adapter["strategy"] == "qlora"
    assert shop["scores"]["mass"].min() > 0.9
    assert shop["scores"]["logit"].n_unique() > 1


def test_clip_tells_a_right_caption_from_one_with_a_wrong_colour(shop):

    from mllmsrec_core.ask import Embed, Picture

    work = shop["work"]
    model = work.models["audit"]
    engine = work.engine_for

    async def cosine(sha256: str, text: str) -> float:
        picture, words = [await engine(ask).answer(ask) for ask in (Embed(model, Picture(sha256)), Embed(model, text))]
        return sum(a * b for a, b in zip(picture.value, words.value, strict=True))

    async def both() -> list[tuple[bool, float]]:
        rows = shop["items"].join(shop["images"], on="item_id").head(24).iter_rows(named=True)
        pairs = []
        for row in rows:
            right = demo.caption_text(demo.truth(row["image_uri"]))
            wrong = swapped(right, demo.ATTRIBUTES["colour"])
            pairs += [(True, await cosine(row["sha256"], right)), (False, await cosine(row["sha256"], wrong))]
        return pairs

    from tasks.loop import ENGINE_LOOP

    pairs = ENGINE_LOOP.run(both())
    labels, scores = zip(*pairs, strict=True)
    assert pooled_auc(np.array(labels), np.array(scores)) > 0.95


def test_the_checkpoints_are_safetensors_alone_and_small():
    files = [path for folder in ("vlm", "clip") for path in (FOLDER / folder).iterdir()]
    assert not [path.name for path in files if path.suffix in (".bin", ".pt", ".pkl")]
    assert sum(path.stat().st_size for path in files) < 10_000_000
