"""images: one question for each picture, and a state for each item."""

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from flows.settings import load
from mllmsrec_core.ask import Fetch, Reply
from mllmsrec_core.datasets import ITEMS
from mllmsrec_core.errors import AskError, TooManyErrors
from mllmsrec_core.stage import Inputs, conform
from mllmsrec_core.stages import STAGES, caption, images, ingest, score, summary
from storage.blobs import Blobs
from storage.files import Files
from storage.source import FsspecSource
from tasks.engines.fetch import FetchEngine
from tasks.runner import How
from tasks.stage_task import perform
from tasks.work import open_work
from tests.tasks.shop import a_shop, sets

POSTERS = Path(__file__).parents[4] / "shared" / "data" / "movielens-posters"


def catalogue(*rows):
    """Items from (item_id, image_uri, image_version) rows."""
    frame = pl.DataFrame(rows, schema=dict.fromkeys(("item_id", "image_uri", "image_version"), pl.String), orient="row")
    return frame.with_columns(pl.lit(None, pl.String).alias(name) for name in ITEMS if name not in frame.columns)


SHOWN = {"caption": caption.Params(), "summary": summary.Params(), "score": score.Params()}
LIMIT = 1_000_000  # their `max_pixels`


def inputs_of(items, versions=None, **params):
    return Inputs({"items": items}, {"images": images.Params(**params), **SHOWN}, versions=versions)


def finish(inputs, answer):
    """The published table when `answer` replies to each Ask, and the Asks."""
    asked, done = [], []
    for row in images.rows(inputs).iter_rows(named=True):
        chain = images.ask(inputs, row)
        asked.append(next(chain))
        with pytest.raises(StopIteration) as end:
            chain.send(answer(asked[-1]))
        done += end.value.value
    made = images.tables(inputs, pl.DataFrame(done, schema=images.DONE))["images"]
    return conform(made, images.Images), asked


def run(inputs, source):
    """`finish` with a real engine over a store in memory."""

    async def go():
        engine = FetchEngine(Blobs(Files(f"memory://store-{uuid.uuid4().hex}")), allow_roots=[source.uri("")])

        async def one(ask):
            try:
                return ask, await engine.answer(ask)
            except AskError as error:
                return ask, Reply(error=error.error_class, detail=str(error), passing=error.passing)

        limit = images.most_pixels(inputs)
        asks = [Fetch(row["uri"], row["version"], limit) for row in images.rows(inputs).iter_rows(named=True)]
        try:
            return dict(await asyncio.gather(*map(one, asks)))
        finally:
            await engine.close()

    replies = asyncio.run(go())
    return finish(inputs, replies.__getitem__)


FOUND = Reply({"sha256": "f" * 64, "width": 4, "height": 3})


def test_a_picture_that_many_items_share_is_asked_once():
    table, asked = finish(inputs_of(catalogue(("a", "x", None), ("b", "x", None), ("c", "y", None))), lambda _: FOUND)
    assert asked == [Fetch("x", "unknown", LIMIT), Fetch("y", "unknown", LIMIT)]
    assert table["status"].to_list() == ["ok"] * 3


@pytest.mark.parametrize("stage", images.SHOWING)
def test_pictures_are_asked_for_as_large_as_any_stage_shows_them(stage):
    inputs = inputs_of(catalogue(("a", "x", None)))

    def limit(pixels):
        params = {**inputs.params, stage: inputs.params[stage].model_copy(update={"max_pixels": pixels})}
        return images.most_pixels(replace(inputs, params=params))

    assert (limit(1), limit(LIMIT), limit(LIMIT + 1)) == (LIMIT, LIMIT, LIMIT + 1)


def test_every_stage_that_limits_pictures_is_asked_how_large_it_shows_them():
    assert {stage.name for stage in STAGES if "max_pixels" in stage.params.model_fields} == set(images.SHOWING)


def test_pictures_kept_as_they_are_are_the_questions_of_before():
    _, asked = finish(inputs_of(catalogue(("a", "x", None)), normalise=False), lambda _: FOUND)
    assert asked == [Fetch("x", "unknown")]


def test_the_table_names_the_picture_as_kept_and_as_it_came():
    items = catalogue(("a", "large", None), ("b", "old", None), ("c", "gone", None))
    found = {"large": Reply({**FOUND.value, "original_sha256": "e" * 64}), "old": FOUND}
    table, _ = finish(inputs_of(items), lambda ask: found.get(ask.uri, Reply(error="image_missing")))
    named = table.select("sha256", "original_sha256").rows()
    assert named == [("f" * 64, "e" * 64), ("f" * 64, "f" * 64), (None, None)]


def test_an_item_without_a_picture_is_missing_one_and_asks_nothing():
    table, asked = finish(inputs_of(catalogue(("a", None, None))), lambda _: FOUND)
    assert asked == []
    assert table.select("status", "sha256", "error").rows() == [("missing", None, None)]


def test_the_version_is_the_datasets_own_or_else_the_listed_one():
    items = catalogue(("a", "x", "v7"), ("b", "x", None), ("c", "y", None), ("d", "x", "v8"))
    listed = []
    inputs = inputs_of(items, lambda uris: listed.extend(uris) or [f"listed {uri}" for uri in uris])
    table, asked = finish(inputs, lambda ask: Reply({"sha256": ask.version, "width": 1, "height": 1}))
    assert listed == ["x", "y"]
    assert table["sha256"].to_list() == ["v7", "listed x", "listed y", "v8"]
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("error", "status", "counted"),
    [
        ("image_missing", "missing", None),
        ("image_unreadable", "unreadable", None),
        ("image_refused", "refused", None),
        ("passing", "missing", "passing"),
        ("ask_failed", "missing", "ask_failed"),
    ],
)
def test_lasting_trouble_is_a_state_and_only_other_trouble_counts_as_an_error(error, status, counted):
    inputs = inputs_of(catalogue(("a", "x", None)), max_host_error_rate=1.0)
    table, _ = finish(inputs, lambda _: Reply(error=error, detail="what happened"))
    assert table.select("status", "reason", "detail", "error").rows() == [(status, error, "what happened", counted)]


def hosted(**pictures):
    """Items whose pictures lie on hosts of these names, `n` on each."""
    return catalogue(
        *((f"{host}-{i}", f"https://{host}.shop/{i}.jpg", None) for host, n in pictures.items() for i in range(n))
    )


def failing(share):
    """Answers of hosts of which this share of pictures fails in passing: `{"dead": 1.0}`."""

    def answer(ask):
        host, _, name = ask.uri.removeprefix("https://").partition(".shop/")
        down = int(name.removesuffix(".jpg")) < 100 * share.get(host, 0)
        return Reply(error="passing", passing=True) if down else FOUND

    return answer


def test_a_dead_host_ends_nothing_while_another_one_works():
    table, _ = finish(inputs_of(hosted(dead=100, fine=1)), failing({"dead": 1.0}))
    assert table["error"].to_list() == ["passing"] * 100 + [None]
    assert table["status"].to_list() == ["missing"] * 100 + ["ok"]


@pytest.mark.parametrize(
    ("pictures", "share"),
    [({"dead": 5}, {"dead": 1.0}), ({"a": 9, "b": 9}, {"a": 1.0, "b": 1.0}), ({"fine": 9, "weak": 100}, {"weak": 0.2})],
)
def test_where_no_host_works_or_a_working_one_fails_too_often_nothing_is_published(pictures, share):
    with pytest.raises(TooManyErrors, match=r"max_host_error_rate = 0.1.*run --stage images"):
        finish(inputs_of(hosted(**pictures)), failing(share))
    finish(inputs_of(hosted(**pictures), max_host_error_rate=1.0), failing(share))


def test_a_host_that_only_says_no_works():
    table, _ = finish(inputs_of(hosted(gone=3)), lambda _: Reply(error="image_missing", detail="HTTP 404"))
    assert table["error"].null_count() == 3


@pytest.mark.parametrize(
    ("uri", "host"),
    [
        ("/shop/a.jpg", None),
        ("https://user:word@a.shop:8080/x?y=z", "a.shop:8080"),
        ("https://a.shop?x/y", "a.shop"),
        ("s3://bucket/a.jpg", "bucket"),
        ("zip://a.jpg::/shop/covers.zip", None),
        ("zip://a.jpg::s3://bucket/covers.zip", "bucket"),
    ],
)
def test_a_host_is_what_may_be_down_as_one(uri, host):
    assert pl.DataFrame({"uri": [uri]}).select(images.HOST).item() == host


def test_a_catalogue_without_any_picture_is_a_table_of_missing_ones():
    table, _ = finish(inputs_of(catalogue(("a", None, None), ("b", None, None)), lambda uris: []), lambda _: FOUND)
    assert table["status"].to_list() == ["missing", "missing"]


def test_files_on_disk_get_the_state_they_deserve_and_a_later_repair_is_another_question(tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "ok.png")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    source = FsspecSource(str(tmp_path))
    names = ("empty.jpg", "gone.jpg", "ok.png", "text.jpg")
    items = catalogue(*((name, source.uri(name), None) for name in names), ("zz", "/etc/passwd", None))
    table, before = run(inputs_of(items, source.versions), source)
    assert table["status"].to_list() == ["unreadable", "missing", "ok", "unreadable", "refused"]
    assert table.filter(item_id="ok.png").select("width", "height").rows() == [(8, 6)]
    assert table["error"].null_count() == table.height

    Image.new("RGB", (2, 2), "blue").save(tmp_path / "gone.jpg")
    table, after = run(inputs_of(items, source.versions), source)
    assert table["status"].to_list() == ["unreadable", "ok", "ok", "unreadable", "refused"]
    assert len(set(after) - set(before)) == 1


def two_stages(config):
    """The records of ingest and images, and the store, after a run of these two as a new process would make it."""
    open_work.cache_clear()
    work = open_work(config.to_json())
    before, records = work.store.envs.current("dev")["stages"], {}
    for name in ("ingest", "images"):
        records[name], _ = perform(work, name, records, How(), before)
    work.store.envs.move("dev", records)
    return records["images"], work.store


@pytest.fixture
def shop(tmp_path):
    """`shop("copy", caption__max_pixels=...)`: a shop of 30 pictures of 24 x 24, every other one to be made smaller."""
    a_shop().write(tmp_path / "files")
    for path in sorted((tmp_path / "files" / "pictures").iterdir())[::2]:
        Image.open(path).resize((48, 12)).crop((0, 0, 20, 12)).save(path)
    limits = {f"{stage}__max_pixels": 400 for stage in images.SHOWING}

    def config(keep="copy", **others):
        others = {"settings__keep_images": f'"{keep}"', **limits, **others}
        return load((), sets(tmp_path / "files", tmp_path / keep, **others), {})

    return config


def test_pictures_copied_or_kept_by_reference_give_the_same_table(shop):
    copied, store = two_stages(shop("copy"))
    kept, beside = two_stages(shop("reference"))
    assert copied["tables"]["images"]["digest"] == kept["tables"]["images"]["digest"]
    table = store.tables.read("images", copied["tables"]["images"]["write_id"])
    large = table.filter(pl.col("sha256") != pl.col("original_sha256"))
    assert (len(table), len(large)) == (30, 15)
    assert (table["width"] * table["height"]).max() <= 400
    assert store.files.names("blobs", ".ref") == []
    assert len(beside.files.names("blobs", ".ref")) == table.join(large, on="item_id", how="anti")["sha256"].n_unique()
    for sha256 in table["sha256"]:
        assert store.blobs.get(sha256) == beside.blobs.get(sha256)


def test_a_second_run_asks_nothing_and_larger_pictures_are_asked_for_where_the_plan_says_so(shop, planned):
    first, _ = two_stages(shop())
    assert first["counts"]["asked"] == 30
    assert two_stages(shop())[0]["fingerprint"] == first["fingerprint"]
    assert planned(shop())["images"].why == ""

    larger = planned(shop(caption__max_pixels=500))["images"]
    assert (larger.why, larger.due.low, larger.due.high) == ("param caption.max_pixels", 30, 30)
    again, store = two_stages(shop(caption__max_pixels=500))
    assert again["counts"]["asked"] == 30
    table = store.tables.read("images", again["tables"]["images"]["write_id"])
    assert 400 < (table["width"] * table["height"]).max() <= 500

    assert two_stages(shop())[0] == first
    assert planned(shop(caption__max_pixels=300))["images"].due.high == 0, "score still shows them as large"
    assert planned(shop(caption__prompt='"Name it."'))["images"].why == "", "of other stages only their limits count"


@pytest.mark.skipif(not POSTERS.exists(), reason="the MovieLens release with posters is not beside the repository")
def test_every_poster_of_the_real_release_is_ok():
    source = FsspecSource(str(POSTERS))
    params = ingest.Params(dataset="movielens", path=str(POSTERS))
    items = ingest.tables(Inputs({}, {"ingest": params}, source=source), pl.DataFrame())["items"]
    table, asked = run(inputs_of(items, source.versions), source)
    assert len(asked) == 3_025
    assert dict(table["status"].value_counts().iter_rows()) == {"ok": 3_025, "missing": 6_100}
    assert table["sha256"].drop_nulls().n_unique() == 3_017
    assert table["error"].null_count() == table.height
