"""Files are told by what is in them, and what is only likely says so."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from zipfile import ZipFile

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.datasets import generic
from mllmsrec_core.errors import SourceError
from storage.source import ABSENT, FsspecSource
from tasks.init import NAMES, Proposal, propose

T = 1_700_000_000
SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(folder: Path, **files: str | pl.DataFrame) -> str:
    """Files by name, `__` for a dot; text as it is, frames as Parquet."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pl.DataFrame):
            content.write_parquet(path)
        else:
            path.write_text(content)
    return str(folder)


def told(proposal: Proposal) -> dict[str, object]:
    return {f"{line.table.removeprefix('ingest.')}.{line.key}": line.value for line in proposal.lines if not line.off}


def doubts(proposal: Proposal) -> dict[str, str]:
    return {line.key: line.unsure for line in proposal.lines if line.unsure}


ITEMS = "sku,name,picture,brand\nb1,Mug,img/b1.jpg,Acme\nb2,Lamp,img/b2.jpg,Acme\n"
CLICKS = f"customer_id,sku,created_at,stars\nu1,b1,{T}000,5\nu2,b2,{T + 9}000,1\nu1,b2,{T + 99}000,4\n"


def test_a_shop_with_plain_names_is_mapped_without_a_doubt(tmp_path):
    found = propose(write(tmp_path, products__csv=ITEMS, orders__csv=CLICKS, **{"img/b1__jpg": "", "img/b2__jpg": ""}))
    assert found.unsure == []
    assert told(found) == {
        "generic.items_file": "products.csv",
        "generic.interactions_file": "orders.csv",
        "generic.at_unit": "ms",
        "generic.liked_from": 4.0,
        "generic.item_columns.item_id": "sku",
        "generic.item_columns.title": "name",
        "generic.item_columns.image": "picture",
        "generic.item_columns.attributes": ["brand"],
        "generic.interaction_columns.user_id": "customer_id",
        "generic.interaction_columns.item_id": "sku",
        "generic.interaction_columns.at": "created_at",
        "generic.interaction_columns.rating": "stars",
    }


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([str(T), str(T + 5)], "s"),
        ([f"{T}000", f"{T}123"], "ms"),
        ([f"{T}000000", f"{T}123456"], "us"),
        ([f"{T}000000000", f"{T}123456789"], "ns"),
        ([f"{T}.5", f"{T}.25"], "s"),
        (["2024-01-02", "2024-01-02 10:00:00"], "iso"),
        (["2024-01-02 10:00", "2024-01-02 10:00:00+00"], "iso"),
        (["2024-01-02 10:00:00 UTC", "2024/01/02"], "iso"),
    ],
)
def test_the_unit_of_time_is_told_by_its_size(tmp_path, values, unit):
    clicks = "user,item_id,time\n" + "".join(f"u,b{n},{value}\n" for n, value in enumerate(values))
    found = propose(write(tmp_path, items__csv="item_id,title\nb0,Mug\nb1,Lamp\n", clicks__csv=clicks))
    assert told(found)["generic.at_unit"] == unit and "at_unit" not in doubts(found)


def test_typed_times_need_no_unit_and_any_name(tmp_path):
    clicks = pl.DataFrame({"user": ["u"], "item_id": ["b0"], "x": [datetime.fromtimestamp(T, UTC)]})
    found = propose(write(tmp_path, items__csv="item_id,title\nb0,Mug\n", clicks__parquet=clicks))
    assert "generic.at_unit" not in told(found)
    assert told(found)["generic.interaction_columns.at"] == "x"
    assert doubts(found) == {"at": "chosen because it holds times"}


def test_times_in_no_unit_and_no_time_at_all_are_doubts(tmp_path):
    items = "item_id,title\nb0,Mug\n"
    found = propose(write(tmp_path / "a", items__csv=items, clicks__csv="user,item_id,time\nu,b0,soon\n"))
    assert "no such time" in doubts(found)["at_unit"]
    found = propose(write(tmp_path / "b", items__csv=items, clicks__csv="user,item_id\nu,b0\n"))
    assert told(found)["generic.interaction_columns.at"] == "" and "at" in doubts(found)


@pytest.mark.parametrize(
    ("ratings", "liked_from", "sure"),
    [
        (["1", "5", "3.5"], 4.0, True),
        (["0", "1"], 1.0, False),
        (["2", "9", "10"], 8.0, False),
        (["35", "90"], 80.0, False),
        (["5", "5"], None, False),
        (["good", "bad"], None, False),
    ],
)
def test_liking_begins_where_the_scale_suggests(tmp_path, ratings, liked_from, sure):
    clicks = "user,item_id,time,rating\n" + "".join(f"u{n},b0,{T},{value}\n" for n, value in enumerate(ratings))
    found = propose(write(tmp_path, items__csv="item_id,title\nb0,Mug\n", clicks__csv=clicks))
    assert told(found).get("generic.liked_from") == liked_from
    assert ("liked_from" not in doubts(found)) == sure


def test_a_column_of_another_name_is_the_item_when_its_values_are(tmp_path):
    clicks = f"user_id,product_type_id,thing,time\nu,7,b0,{T}\nv,8,b1,{T}\n"
    found = propose(write(tmp_path, items__csv="item_id,title\nb0,Mug\nb1,Lamp\n", clicks__csv=clicks))
    assert told(found)["generic.interaction_columns.item_id"] == "thing"
    assert "are not" in doubts(found)["item_id"]


def test_ids_that_no_item_has_are_a_doubt(tmp_path):
    found = propose(write(tmp_path, products__csv=ITEMS, orders__csv=CLICKS.replace("b", "x")))
    assert "0 % of its first values" in doubts(found)["item_id"]


def zipped(path, *names):
    with ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")


def test_where_relative_paths_of_pictures_begin_is_found(tmp_path):
    files = {
        "products__csv": ITEMS.replace("img/", ""),
        "orders__csv": CLICKS,
        "shop/img/b1__jpg": "",
        "shop/img/b2__jpg": "",
    }
    found = propose(write(tmp_path, **files))
    assert told(found)["generic.images"] == "shop/img" and found.unsure == []
    (tmp_path / "shop/img/b2.jpg").unlink()
    assert doubts(propose(str(tmp_path))) == {"images": "1 of the first pictures are not there"}
    (tmp_path / "shop/img/b1.jpg").unlink()
    assert doubts(propose(str(tmp_path))) == {"image": "2 of the first pictures are not below the root"}


@pytest.mark.parametrize(
    ("members", "images"),
    [
        (("img/b1.jpg", "img/b2.jpg"), "pictures.zip"),
        (("shop/img/b1.jpg", "shop/img/b2.jpg", "other/b1.jpg"), "zip://shop::pictures.zip"),
    ],
)
def test_pictures_in_an_archive_are_found_and_read_from_there(tmp_path, members, images):
    root = write(tmp_path, products__csv=ITEMS, orders__csv=CLICKS, broken__zip="no archive")
    zipped(tmp_path / "pictures.zip", *members)
    found = propose(root)
    assert told(found)["generic.images"] == images and found.unsure == []
    source = FsspecSource(root)
    columns = generic.ItemColumns(item_id="sku", title="name", image="picture")
    uris = generic.items_in(source, "products.csv", columns, images)[0]["image_uri"].to_list()
    assert len(uris) == 2 and ABSENT not in source.versions(uris)


def test_an_archive_of_pictures_named_by_numbers_is_proposed_like_a_folder(tmp_path):
    pairs = {"M-50k_pairs__tsv": "1\t2 3\n", "M-50k_titles__csv": "item,title\n2,x\n"}
    root = write(tmp_path, **pairs)
    zipped(tmp_path / "pictures.zip", "covers/2.jpg", "covers/3.jpg")
    assert told(propose(root))["microlens.covers"] == "pictures.zip"


@pytest.mark.parametrize(
    "views",
    [
        ["https://x.org/1.JPG?w=300", "https://x.org/2.jpg"],
        "https://x.org/1.JPG",
        "['https://x.org/1.jpg', 'https://x.org/2.jpg']",
        [{"alt": "a mug", "url": "https://x.org/1.jpg"}],
    ],
)
def test_a_column_of_pictures_is_found_by_its_values_in_lists_too(tmp_path, views):
    rows = [{"sku": f"b{n}", "name": "Mug", "views": views} for n in (1, 2)]
    found = propose(write(tmp_path, products__jsonl="\n".join(map(json.dumps, rows)), orders__csv=CLICKS))
    assert told(found)["generic.item_columns.image"] == "views" and "image" in doubts(found)


def test_the_items_are_those_that_the_interactions_name_whatever_else_lies_there(tmp_path):
    users = "id,name,description,category,image\nu1,Ann,x,y,z\nu2,Bob,x,y,z\n"
    found = propose(write(tmp_path, users__csv=users, products__csv=ITEMS, orders__csv=CLICKS))
    assert told(found)["generic.items_file"] == "products.csv"
    assert "users.csv" in doubts(found)["items_file"]


@pytest.mark.parametrize("end", ["csv", "parquet"])
def test_a_table_cut_into_parts_goes_by_its_folder_and_the_reader_reads_all_of_them(tmp_path, end):
    days = {
        f"events/day=2024-01-0{n}/part-0__{end}": (
            pl.DataFrame({"user_id": [f"u{n}"], "sku": [f"b{n}"]}) if end == "parquet" else f"user_id,sku\nu{n},b{n}\n"
        )
        for n in (1, 2)
    }
    parts = {
        "products/part-00000__csv": ITEMS,
        "products/part-00001__csv": ITEMS.replace("b1", "b3").replace("b2", "b4"),
    }
    found = propose(write(tmp_path, **days, **parts))
    mapping = told(found)
    assert mapping["generic.items_file"] == "products" and mapping["generic.interactions_file"] == "events"
    assert mapping["generic.interaction_columns.at"] == "day" and mapping["generic.at_unit"] == "iso"
    columns = {name: mapping[f"generic.interaction_columns.{name}"] for name in ("user_id", "item_id", "at")}
    given = {"items_file": "products", "interactions_file": "events", "at_unit": "iso", "interaction_columns": columns}
    items = {"item_columns": {"item_id": "sku", "title": "name"}}
    read = generic.read(FsspecSource(str(tmp_path)), generic.Params.model_validate({**given, **items}))
    assert read.interactions.select("user_id", "item_id", pl.col("at").dt.day()).rows() == [
        ("u1", "b1", 1),
        ("u2", "b2", 2),
    ]
    assert read.items["item_id"].to_list() == ["b1", "b2", "b3", "b4"] and read.rejects.is_empty()


def test_one_file_may_hold_both(tmp_path):
    found = propose(write(tmp_path, log__csv=f"user_id,item_id,title,time\nu,b,Mug,{T}\nv,b,Mug,{T}\n"))
    assert told(found)["generic.items_file"] == told(found)["generic.interactions_file"] == "log.csv"
    assert "same file" in doubts(found)["items_file"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is no file below"),
        ({"a__csv": "x,y\n1,2\n"}, r"looks like interactions .*a\.csv \(x, y\)"),
        ({"a__csv": CLICKS}, r"looks like items"),
        ({"a__csv__gz": "no gzip"}, r"looks like interactions .*a\.csv\.gz"),
    ],
)
def test_where_nothing_fits_the_error_says_what_was_looked_at(tmp_path, files, message):
    with pytest.raises(SourceError, match=message):
        propose(write(tmp_path, **files))


def test_a_file_instead_of_its_folder_says_what_is_wanted(tmp_path):
    write(tmp_path, orders__csv=CLICKS)
    with pytest.raises(SourceError, match="wants the folder"):
        propose(str(tmp_path / "orders.csv"))


AMAZON = json.dumps({"user_id": "u", "parent_asin": "b", "rating": 5.0, "timestamp": T * 1000})


def test_layouts_our_readers_know_are_told_by_their_files(tmp_path):
    ratings = f"userId,movieId,rating,timestamp\n1,2,4.5,{T}\n"
    movies = "movieId,title,genres\n2,Up (2009),Comedy\n"
    lens = {"ml/ratings__csv": ratings, "ml/movies__csv": movies, "covers/2__jpg": ""}
    found = propose(write(tmp_path / "lens", **lens))
    assert found.dataset == "movielens" and found.unsure == []
    assert told(found)["movielens.ratings_file"] == "ml/ratings.csv"
    assert told(found)["movielens.posters"] == "covers"

    pairs = {"M-50k_pairs__tsv": "1\t2 3\n", "M-50k_titles__csv": "item,title\n2,x\n", "M_covers/2__jpg": ""}
    found = propose(write(tmp_path / "micro", **pairs))
    assert found.dataset == "microlens" and found.unsure == []
    assert told(found) == {
        "microlens.pairs_file": "M-50k_pairs.tsv",
        "microlens.titles_file": "M-50k_titles.csv",
        "microlens.covers": "M_covers",
    }

    baby = {"Baby__jsonl": AMAZON, "meta_Baby__jsonl": '{"parent_asin": "b"}'}
    found = propose(write(tmp_path / "amazon", **baby))
    assert found.dataset == "amazon" and found.unsure == [] and told(found)["amazon.category"] == "Baby"


def test_of_several_releases_the_first_is_chosen_and_the_others_are_named(tmp_path):
    pairs = {f"M-{size}_pairs__tsv": "1\t2 3\n" for size in ("100k", "50k")}
    titles = {f"M-{size}_titles__csv": "item,title\n2,x\n" for size in ("100k", "50k")}
    assert "M-50k_pairs.tsv" in doubts(propose(write(tmp_path / "micro", **pairs, **titles)))["pairs_file"]
    both = {f"{name}__jsonl": AMAZON for name in ("Baby", "Toys", "meta_Baby", "meta_Toys")}
    assert "Toys" in doubts(propose(write(tmp_path / "amazon", **both)))["category"]


@pytest.mark.skipif(not SHARED.exists(), reason="the shared datasets are not beside the repository")
@pytest.mark.parametrize(("folder", "dataset"), [("microlens-50k", "microlens"), ("movielens-posters", "movielens")])
def test_the_real_folders_are_told(folder, dataset):
    found = propose(str(SHARED / folder))
    assert found.dataset == dataset and found.unsure == []


@settings(deadline=None)
@given(st.lists(st.sampled_from(sorted(NAMES)), min_size=2, unique=True), st.randoms(use_true_random=False))
def test_a_column_is_never_taken_for_two(ours, rng):
    from storage.heads import Head
    from tasks.init import OF_INTERACTIONS, OF_ITEMS, mapped

    names = [rng.choice(NAMES[name]) for name in ours]
    frame = pl.DataFrame({name: ["x"] for name in names})
    for wanted in (OF_ITEMS, OF_INTERACTIONS):
        columns = [found.column for found in mapped(Head("a.csv", 1, frame), wanted).values()]
        assert len(set(columns)) == len(columns) and set(columns) <= set(names)
