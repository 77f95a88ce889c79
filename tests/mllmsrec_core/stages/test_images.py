"""images: one question for each picture, and a state for each item."""

import asyncio
import uuid
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from mllmsrec_core.ask import Fetch, Reply
from mllmsrec_core.datasets import ITEMS
from mllmsrec_core.errors import AskError
from mllmsrec_core.stage import Inputs, conform
from mllmsrec_core.stages import images, ingest
from storage.blobs import Blobs
from storage.files import Files
from storage.source import FsspecSource
from tasks.engines.fetch import FetchEngine

POSTERS = Path(__file__).parents[4] / "shared" / "data" / "movielens-posters"


def catalogue(*rows):
    """Items from (item_id, image_uri, image_version) rows."""
    frame = pl.DataFrame(rows, schema=dict.fromkeys(("item_id", "image_uri", "image_version"), pl.String), orient="row")
    return frame.with_columns(pl.lit(None, pl.String).alias(name) for name in ITEMS if name not in frame.columns)


def inputs_of(items, versions=None):
    return Inputs({"items": items}, {"images": images.Params()}, versions=versions)


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

        asks = [Fetch(row["uri"], row["version"]) for row in images.rows(inputs).iter_rows(named=True)]
        try:
            return dict(await asyncio.gather(*map(one, asks)))
        finally:
            await engine.close()

    replies = asyncio.run(go())
    return finish(inputs, replies.__getitem__)


FOUND = Reply({"sha256": "f" * 64, "width": 4, "height": 3})


def test_a_picture_that_many_items_share_is_asked_once():
    table, asked = finish(inputs_of(catalogue(("a", "x", None), ("b", "x", None), ("c", "y", None))), lambda _: FOUND)
    assert asked == [Fetch("x", "unknown"), Fetch("y", "unknown")]
    assert table["status"].to_list() == ["ok"] * 3


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
    table, _ = finish(inputs_of(catalogue(("a", "x", None))), lambda _: Reply(error=error, detail="what happened"))
    assert table.select("status", "reason", "detail", "error").rows() == [(status, error, "what happened", counted)]


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
