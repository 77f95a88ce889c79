"""amazon reads every collection in every form it is published in, and the same catalogue is the same tables."""

import gzip
import json
from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.datasets import INTERACTIONS, ITEMS, REJECTS, amazon
from mllmsrec_core.errors import SourceError
from tests.mllmsrec_core.datasets.amazon_files import (
    FORMS,
    Product,
    Review,
    Shop,
    files_2014,
    files_2018,
    files_2023,
    files_hub,
    folder,
    json_lines,
    plain_2023,
)

DAY = 1_252_800_000  # 13 September 2009
PRODUCTS = (
    Product(
        "0000031852",
        'Girls\' "Ballet" Tutu & Zebra',
        ("A tutu.", "Pink & <soft>."),
        ("Clothing, Shoes & Jewelry", "Dance"),
        "Coxlures & Co",
        3.17,
        "http://ecx.images-amazon.com/images/I/51fAmVkTbyL.jpg",
    ),
    Product("B01CUPMQZE", price=1234.5),
    Product("B0", "Leather", image="https://m.media-amazon.com/images/I/71i77AuI9xL._SL1500_.jpg"),
)
REVIEWS = (
    Review("A2SUAM1J3GNN3B", "0000031852", 5.0, DAY),
    Review("A2SUAM1J3GNN3B", "B0", 3.0, DAY),
    Review("B", "B0", 1.0, DAY + 86_400),
)
SHOP = Shop(PRODUCTS, REVIEWS)


def read(files, **params):
    return amazon.read(folder(files), amazon.Params(**params))


def tables(files, **params):
    """What is read, without the places where it stood."""
    catalogue = read(files, **params)
    assert catalogue.rejects.is_empty(), catalogue.rejects.rows()
    return catalogue.items.drop("source", "line").rows(), catalogue.interactions.drop("source", "line").rows()


def item_of(record, version="auto"):
    """The item that one line of metadata makes, by column."""
    files = {
        "meta_Baby.jsonl": json_lines([{"parent_asin": "X"} | record]),
        "Baby.jsonl": json_lines([{"user_id": "u"}]),
    }
    items, rejects = amazon.items_in(folder(files), "meta_Baby.jsonl", version)
    assert rejects.is_empty()
    return items.row(0, named=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_catalogue_is_read_from_every_form(form):
    items, interactions = tables(FORMS[form](SHOP))
    tutu = json.loads(items[0][4])
    assert tutu == {"brand": "Coxlures & Co", "price": 3.17}
    assert items[0][:4] + items[0][5:] == (
        "0000031852",
        'Girls\' "Ballet" Tutu & Zebra',
        "A tutu. Pink & <soft>.",
        "Clothing, Shoes & Jewelry > Dance",
        "http://ecx.images-amazon.com/images/I/51fAmVkTbyL.jpg",
    )
    category = {"2014": None, "2018": "Toys"}.get(form, "All Beauty")  # where the path is empty, the top of it
    assert items[1] == ("B01CUPMQZE", None, None, category, '{"price": 1234.5}', None)
    assert interactions[1:] == [
        ("A2SUAM1J3GNN3B", "B0", datetime(2009, 9, 13, tzinfo=UTC), 3.0, False),
        ("B", "B0", datetime(2009, 9, 14, tzinfo=UTC), 1.0, False),
    ]
    assert interactions[0][3:] == (5.0, True)


words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda text: text == text.strip() and not text.startswith("<")
)
products = st.builds(
    Product,
    item_id=st.text("B0123456789", min_size=1, max_size=10),
    title=st.none() | words,
    description=st.lists(words, max_size=2).map(tuple),
    path=st.lists(words, min_size=1, max_size=3).map(tuple),
    brand=st.none() | words,
    price=st.none() | st.integers(0, 10**7).map(lambda cents: cents / 100),
    image=st.none() | st.text("abc/%20", min_size=1, max_size=8).map(lambda path: f"https://a/{path}.jpg"),
)
reviews = st.builds(
    Review,
    user_id=st.text("A123", min_size=1, max_size=4),
    item_id=st.text("B0123456789", min_size=1, max_size=10),
    rating=st.integers(1, 5).map(float),
    at=st.integers(700_000_000, 1_700_000_000),
)
shops = st.builds(
    Shop,
    st.lists(products, min_size=1, max_size=4).map(tuple),
    st.lists(reviews, min_size=1, max_size=6, unique_by=lambda review: (review.user_id, review.item_id)).map(tuple),
)


@settings(max_examples=25, deadline=None)
@given(shops)
def test_the_same_catalogue_is_the_same_tables_whichever_collection_and_form_it_comes_in(shop):
    first, *others = [tables(files(shop)) for files in FORMS.values()]
    assert all(other == first for other in others)


def test_details_are_the_same_from_json_lines_and_from_the_hubs_parquet():
    shop = Shop(PRODUCTS, REVIEWS, details={"UPC": "617390882781", "Best Sellers Rank": {"Toys": 3}, "Größe": None})
    found = [tables(files(shop)) for files in (plain_2023, files_2023, files_hub)]
    assert found[0] == found[1] == found[2]
    assert json.loads(found[0][0][2][4])["details"] == shop.details


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([{"variant": "PT01", "hi_res": "p"}, {"variant": "MAIN", "hi_res": "h", "large": "l", "thumb": "t"}], "h"),
        ([{"variant": "MAIN", "hi_res": None, "large": "l", "thumb": "t"}], "l"),
        ([{"variant": "MAIN", "hi_res": "None", "large": " ", "thumb": "t"}], "t"),
        ([{"variant": "MAIN", "hi_res": None}, {"variant": "PT01", "large": "p"}], "p"),
        ({"hi_res": [None, "p"], "large": ["l", "pl"], "thumb": ["t"], "variant": ["MAIN", "PT01"]}, "l"),
        ({"hi_res": ["p", None], "large": ["pl", "l"], "variant": ["PT01", "MAIN"]}, "l"),
        ({"hi_res": [], "large": [], "thumb": [], "variant": []}, None),
        ([], None),
        ("None", None),
        ([None, 3, {"variant": ["MAIN"], "hi_res": {}}], None),
    ],
)
def test_the_picture_is_the_main_one_in_its_largest_size(images, expected):
    assert item_of({"images": images})["image_uri"] == expected


def test_without_a_large_picture_2018_gives_its_thumbnail():
    assert item_of({"imageURL": ["https://a/t.jpg"], "imageURLHighRes": []})["image_uri"] == "https://a/t.jpg"


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Tom &amp; Jerry &quot;x&quot;", 'Tom & Jerry "x"'),
        ("<span>x</span>", None),
        ("&lt;span&gt;x", None),
        ("var aPageStart = (new Date()).getTime();", None),
        ("  ", None),
        ("", None),
        (None, None),
        (["x"], None),
        ("5 < 6", "5 < 6"),
    ],
)
def test_a_title_is_read_without_entities_and_a_broken_one_is_none(title, expected):
    item = item_of({"title": title})
    assert (item["item_id"], item["title"]) == ("X", expected)


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        (3.17, 3.17),
        (3, 3.0),
        ("3.17", 3.17),
        ("$3.17", 3.17),
        ("$1,234.56", 1234.56),
        ("$12.99 - $24.99", 12.99),
        ("None", None),
        ("", None),
        (None, None),
        (True, None),
        ('.a-box-inner{background-color:#fff} var x = "$3"', None),
        (10**400, None),
        ({"from": 3}, None),
    ],
)
def test_a_price_is_a_number_or_nothing(price, expected):
    attributes = item_of({"price": price})["attributes"]
    assert (json.loads(attributes)["price"] if attributes else None) == expected


def test_a_description_is_read_without_tags_and_features_stand_in_for_it():
    described = {"description": ["<p>Red<br/>mug &amp; lid</p>", "2 < 3"], "features": ["f"]}
    assert item_of(described)["description"] == "Red mug & lid  2 < 3"
    assert item_of({"description": [], "features": ["big", "round"]})["description"] == "big round"
    assert item_of({"description": "", "feature": ["big"]})["description"] == "big"


def test_half_of_a_surrogate_pair_does_not_break_the_item():
    assert item_of({"title": "a\ud800", "details": {"k": "\udfff"}})["title"] == "a?"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"asin": "X"', "neither JSON nor a Python literal"),
        (b"[1, 2]", "an object was expected, not list"),
        (b"null", "an object was expected, not NoneType"),
        (b"\x00\x00", "neither JSON nor a Python literal"),
        (b"{'asin': open('x')}", "neither JSON nor a Python literal"),
        (b"{'asin': " + b"-" * 20_000 + b"1}", "neither JSON nor a Python literal"),
        (b"[" * 100_000, "neither JSON nor a Python literal"),
        (b"{'asin': '" + b"x" * 1_000_000 + b"'}", "neither JSON nor a Python literal"),
        (b'{"asin": "X", "details": {"size": NaN}}', "its details cannot be kept as JSON"),
        (b'{"asin": "X", "details": {"size": 1e999}}', "its details cannot be kept as JSON"),
    ],
)
@pytest.mark.parametrize("form", ["2014", "2018"])
def test_a_broken_line_of_metadata_is_a_reject_and_costs_no_other(form, line, reason):
    files = FORMS[form](SHOP)
    rows = gzip.decompress(files["meta_Baby.json.gz"]).splitlines(keepends=True)
    files["meta_Baby.json.gz"] = gzip.compress(b"".join([rows[0], line, b"\n\n", *rows[1:]]))
    catalogue = read(files)
    assert catalogue.items["line"].to_list() == [1, 4, 5]
    assert catalogue.rejects.select("source", "line").rows() == [("meta_Baby.json.gz", 2)]
    assert catalogue.rejects["reason"][0].startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"overall": "five"}, "overall `five` is not a number"),
        ({"overall": None}, "overall is empty"),
        ({"unixReviewTime": DAY * 1_000}, f"unixReviewTime `{DAY * 1_000}` is not a time between 1990 and 2100"),
        ({"unixReviewTime": None}, "unixReviewTime is empty"),
    ],
)
def test_a_review_whose_rating_or_time_is_none_is_a_reject(change, reason):
    files = files_2018(SHOP)
    rows = [json.loads(row) for row in gzip.decompress(files["Baby_5.json.gz"]).splitlines()]
    rows[1] |= change
    files["Baby_5.json.gz"] = gzip.compress(json_lines(rows) + b'{"broken":\n')
    rejects = read(files).rejects
    assert rejects.select("source", "line").rows() == [("Baby_5.json.gz", 4), ("Baby_5.json.gz", 2)]
    assert rejects["reason"][0].startswith("no JSON")
    assert rejects["reason"][1].startswith(reason)


def test_seconds_in_a_file_of_2023_are_rejects_and_not_the_year_1970():
    shop = Shop(PRODUCTS, (Review("u", "B0", 5.0, DAY // 1_000),))
    catalogue = read(plain_2023(shop))
    assert catalogue.interactions.is_empty()
    assert catalogue.rejects["reason"][0].startswith(f"timestamp `{DAY}` is not a time")


def test_liked_and_disliked_have_thresholds_of_their_own():
    files = files_2014(SHOP)
    liked = [row["liked"] for row in read(files, liked_from=3.0).interactions.iter_rows(named=True)]
    assert liked == [True, True, False]
    both = read(files, liked_from=4.0, disliked_to=2.0)
    assert both.interactions.select("rating", "liked").rows() == [(5.0, True), (1.0, False)]
    assert both.rejects.rows() == [
        ("reviews_Baby_5.json.gz", 2, "a rating of 3.0 is neither liked (from 4) nor disliked (to 2)")
    ]


@pytest.mark.parametrize("form", FORMS)
def test_of_repeated_reviews_the_earliest_stays_and_the_others_are_rejects(form):
    repeated = (
        Review("u", "B0", 1.0, DAY + 86_400),
        Review("v", "B0", 5.0, DAY),
        Review("u", "B0", 2.0, DAY),
        Review("u", "B0", 4.0, DAY),
        Review("u", "B01CUPMQZE", 4.0, DAY),
    )
    files = FORMS[form](Shop(PRODUCTS, repeated))
    catalogue = read(files)
    assert catalogue.interactions.select("user_id", "item_id", "rating").rows() == [
        ("v", "B0", 5.0),
        ("u", "B0", 4.0),
        ("u", "B01CUPMQZE", 4.0),
    ]
    assert catalogue.rejects.height == 2
    kept = set(catalogue.rejects["reason"])
    where, line = catalogue.interactions.select("source", "line").row(1)
    said = f"the same user reviewed the item already, in line {line}"
    assert kept <= {said, f"{said} of {where}"}, "another part of the reviews is named"
    assert read(files, repeats="all").interactions.height == 5


repeats = st.builds(
    Review, st.sampled_from("uv"), st.sampled_from("ab"), st.sampled_from([1.0, 5.0]), st.sampled_from([DAY, DAY + 1])
)


@settings(max_examples=40, deadline=None)
@given(st.lists(repeats, min_size=1), st.randoms())
def test_which_of_repeated_reviews_stays_does_not_depend_on_their_order(rows, random):
    def kept(rows):
        frame = read(plain_2023(Shop(PRODUCTS, tuple(rows)))).interactions
        return sorted(frame.select("user_id", "item_id", "at", "rating").rows())

    assert kept(rows) == kept(random.sample(rows, len(rows)))


def test_reviews_and_metadata_are_found_by_their_names_in_any_folder():
    pair = plain_2023(SHOP)
    files = {
        "raw/review_categories/Baby.jsonl": pair["Baby.jsonl"],
        "raw/meta_categories/meta_Baby.jsonl": pair["meta_Baby.jsonl"],
        "raw/meta_categories/meta_Toys.jsonl": b"not read",
        "README.md": b"not read",
        "covers/Toys.jpg": b"not read",
    }
    assert tables(files) == tables(pair)


def test_of_several_categories_one_is_chosen_and_without_a_choice_they_are_named():
    toys = {name.replace("Baby", "Toys"): content for name, content in plain_2023(Shop(PRODUCTS[:1], REVIEWS)).items()}
    files = plain_2023(SHOP) | toys
    assert len(tables(files, category="Toys")[0]) == 1
    assert len(tables(files, reviews_file="Baby.jsonl")[0]) == 3
    assert len(tables(files, reviews_file="Baby.jsonl", meta_file="meta_Toys.jsonl")[0]) == 1
    with pytest.raises(SourceError, match=r"Baby\.jsonl, Toys\.jsonl.*ingest\.amazon\.category"):
        read(files)
    with pytest.raises(SourceError, match="no reviews of Books with their metadata"):
        read(files, category="Books")


def test_a_folder_of_parquet_may_be_given_by_name():
    files = {f"hub/{name}": content for name, content in files_hub(SHOP).items()}
    assert tables(files, reviews_file="hub/raw_review_Baby", meta_file="hub/raw_meta_Baby") == tables(files_hub(SHOP))
    assert tables(files, reviews_file="hub/raw_review_Baby") == tables(files_hub(SHOP))


def test_an_empty_folder_says_what_is_wanted():
    with pytest.raises(SourceError, match=r"meta_Baby\.jsonl\.gz.*ingest\.amazon\.reviews_file"):
        read({"README.md": b"x"})


def test_a_file_of_another_kind_is_named_with_its_keys():
    files = plain_2023(SHOP) | {"Baby.jsonl": b'{"who": "u", "what": "B0"}\n'}
    with pytest.raises(
        SourceError, match=r"cannot tell the version of .*Baby\.jsonl.*what, who.*ingest\.amazon\.version"
    ):
        read(files)
    with pytest.raises(SourceError, match=r"has no column `user_id`"):
        read(files, version="2023")
    files = plain_2023(SHOP) | {"meta_Baby.jsonl": b'{"sku": "B0"}\n'}
    with pytest.raises(SourceError, match=r"meta_Baby\.jsonl has no column `parent_asin`.*sku"):
        read(files)
    with pytest.raises(SourceError, match=r"has no column `asin`.*ingest\.amazon\.version"):
        read(plain_2023(SHOP), version="2018")


def test_a_version_that_is_given_is_not_guessed():
    assert tables(files_2014(SHOP), version="2014") == tables(files_2014(SHOP))
    assert tables(files_2018(SHOP), version="2018") == tables(files_2018(SHOP))
    assert tables(files_hub(SHOP), version="2023") == tables(files_hub(SHOP))


def test_a_file_cut_short_is_named():
    for name, content in files_2014(SHOP).items():
        with pytest.raises(SourceError, match=f"cannot read .*{name}"):
            read(files_2014(SHOP) | {name: content[:-9]})


@pytest.mark.parametrize("form", FORMS)
def test_the_tables_have_the_columns_every_reader_gives(form):
    catalogue = read(FORMS[form](SHOP))
    assert catalogue.items.schema == ITEMS | {"source": pl.String, "line": pl.UInt32}
    assert catalogue.interactions.schema == INTERACTIONS
    assert catalogue.rejects.schema == REJECTS
