"""What the stages of a run share: here, which places pictures may be read from."""

from __future__ import annotations

import json
import shutil

import polars as pl
import pytest

from flows.settings import load
from mllmsrec_core.errors import UsageError
from tasks.runner import How
from tasks.stage_task import perform
from tasks.work import open_work
from tests.tasks.shop import N_ITEMS, a_shop, sets


@pytest.fixture
def shop(tmp_path):
    """A shop whose items name pictures in a folder that is not the dataset's own."""
    root, pictures = tmp_path / "shop", tmp_path / "pictures"
    a_shop().write(root)
    shutil.move(root / "pictures", pictures)
    lines = (root / "items.csv").read_text().replace("pictures/", f"{pictures}/")
    (root / "items.csv").write_text(lines)
    return root


def states(shop, *roots):
    """What becomes of the pictures when these places may be read besides the dataset's own."""
    told = sets(shop, shop.parent / "store", settings__image_roots=json.dumps(roots))
    work, records = open_work(load((), told, {}).to_json()), {}
    for stage in ("ingest", "images"):
        records[stage], _ = perform(work, stage, records, How(), {})
    write_id = records["images"]["tables"]["images"]["write_id"]
    images, manifest = work.store.tables.read("images", write_id), work.store.tables.manifest("images", write_id)
    assert (
        manifest["failures"]
        == records["images"]["failures"]
        == dict(images["reason"].drop_nulls().value_counts().iter_rows())
    )
    return dict(images.group_by("status").agg(pl.len()).iter_rows())


@pytest.mark.parametrize("folder", ["{}/pictures", "file://{}/pictures", "{}/shop/../pictures/", "{}"])
def test_pictures_beside_the_dataset_are_read_once_their_folder_is_admitted(shop, folder):
    assert states(shop) == {"refused": N_ITEMS}
    assert states(shop, folder.format(shop.parent)) == {"ok": N_ITEMS}


def test_a_folder_beside_an_admitted_one_stays_closed(shop):
    assert states(shop, str(shop.parent / "picture"), f"{shop.parent}/pictures/i00.png") == {
        "ok": 1,
        "refused": N_ITEMS - 1,
    }


def test_an_admitted_place_that_holds_credentials_is_refused_without_repeating_them(shop):
    with pytest.raises(UsageError, match=r"^s3://\.\.\.@bucket holds credentials") as caught:
        states(shop, "s3://me:secret@bucket")
    assert "secret" not in str(caught.value)
