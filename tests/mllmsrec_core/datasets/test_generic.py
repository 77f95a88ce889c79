"""generic reads files of any of the formats under any column names."""

import gzip
import json
from datetime import UTC, date, datetime, timedelta
from typing import get_args

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.datasets import generic
from mllmsrec_core.errors import SourceError
from storage.source import FsspecSource

ITEMS = [
    {"sku": "a", "name": "Mug", "brand": "Bo", "picture": "img/a.jpg"},
    {"sku": "b", "name": None, "brand": None, "picture": "https://example.org/b.jpg"},
]
CLICKS = [{"who": "u", "sku": "a", "time": 1_700_000_000_000, "stars": 4.5}]
COLUMNS = {
    "item_columns": {"item_id": "sku", "title": "name", "attributes": ["brand"], "image": "picture"},
    "interaction_columns": {"user_id": "who", "item_id": "sku", "at": "time", "rating": "stars"},
}


def write(folder, name, rows):
    frame = pl.DataFrame(rows)
    text = "\n".join(json.dumps(row) for row in rows)
    match name.split(".", 1)[1]:
        case "parquet":
            frame.write_parquet(folder / name)
        case "csv":
            frame.write_csv(folder / name)
        case "tsv":
            frame.write_csv(folder / name, separator="\t")
        case "jsonl":
            (folder / name).write_text(text)
        case "jsonl.gz":
            (folder / name).write_bytes(gzip.compress(text.encode()))


def read(folder, items, clicks, **params):
    source = FsspecSource(str(folder))
    return generic.read(source, generic.Params(items_file=items, interactions_file=clicks, **params))


@pytest.mark.parametrize("end", ["parquet", "csv", "tsv", "jsonl", "jsonl.gz"])
def test_every_format_gives_the_same_catalogue(tmp_path, end):
    write(tmp_path, f"items.{end}", ITEMS)
    write(tmp_path, f"clicks.{end}", CLICKS)
    catalogue = read(tmp_path, f"items.{end}", f"clicks.{end}", at_unit="ms", liked_from=4.0, **COLUMNS)
    assert catalogue.items.select("item_id", "title", "image_uri").rows() == [
        ("a", "Mug", f"{tmp_path}/img/a.jpg"),
        ("b", None, "https://example.org/b.jpg"),
    ]
    assert json.loads(catalogue.items["attributes"][0]) == {"brand": "Bo"}
    assert catalogue.interactions.drop("source", "line").rows() == [
        ("u", "a", datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC), 4.5, True)
    ]
    assert catalogue.rejects.is_empty()


def times(folder, values, unit, dtype=None):
    pl.DataFrame(
        {"user_id": ["u"] * len(values), "item_id": ["a"] * len(values), "at": pl.Series(values, dtype=dtype)}
    ).write_parquet(folder / "clicks.parquet")
    good, bad = generic.interactions_in(
        FsspecSource(str(folder)), "clicks.parquet", generic.InteractionColumns(), unit, None
    )
    return good["at"].to_list(), bad["reason"].to_list()


MOMENT = datetime(2024, 2, 29, 12, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("unit", "values"),
    [
        ("s", [int(MOMENT.timestamp())]),
        ("s", [MOMENT.timestamp()]),
        ("s", [f" {MOMENT.timestamp():.1f} "]),
        ("ms", [int(MOMENT.timestamp()) * 1_000]),
        ("us", [int(MOMENT.timestamp()) * 1_000_000]),
        ("ns", [int(MOMENT.timestamp()) * 1_000_000_000 + 999]),
        ("ns", [f"{MOMENT.timestamp() * 1e9:.0f}"]),
        (
            "iso",
            [
                "2024-02-29T12:30:00Z",
                "2024-02-29 12:30:00",
                "2024-02-29T12:30:00.000",
                "2024-02-29T14:30:00+02:00",
                "2024-02-29 07:30:00.0-0500",
                "2024-02-29 12:30",
                "2024-02-29T12:30Z",
                "2024-02-29 14:30+02",
                "2024-02-29 12:30:00+00",
                "2024-02-29 12:30:00.000000+00",
                "2024-02-29 12:30:00 UTC",
                "2024-02-29 12:30 UTC",
                "2024/02/29 12:30:00",
            ],
        ),
        ("s", [MOMENT]),
        ("s", [MOMENT.replace(tzinfo=None)]),
    ],
)
def test_a_time_is_read_in_its_unit(tmp_path, unit, values):
    assert times(tmp_path, values, unit) == ([MOMENT] * len(values), [])


@pytest.mark.parametrize("dtype", [pl.Float64, pl.String, pl.Decimal(20, 3)])
@pytest.mark.parametrize(("unit", "second"), [("s", 1), ("ms", 1_000)])
def test_a_fraction_of_a_tick_is_kept_to_the_microsecond(tmp_path, unit, second, dtype):
    ticks = [int(MOMENT.timestamp()) * second + part for part in (0.25, 0.75)]
    values = pl.Series(ticks).cast(dtype).to_list()
    expected = [MOMENT + timedelta(seconds=part / second) for part in (0.25, 0.75)]
    assert times(tmp_path, values, unit, dtype) == (expected, [])


def test_a_date_alone_is_its_midnight(tmp_path):
    midnight = datetime(2024, 2, 29, tzinfo=UTC)
    assert times(tmp_path, ["2024-02-29", "2024/2/29"], "iso") == ([midnight] * 2, [])
    assert times(tmp_path, [date(2024, 2, 29)], "s") == ([midnight], [])


@pytest.mark.parametrize(
    ("unit", "value"),
    [
        ("s", 1_700_000_000_000),  # milliseconds
        ("ms", 1_700_000_000),  # seconds
        ("us", 1_700_000_000_000),
        ("ns", 1_700_000_000_000_000),
        ("s", 1e18),
        ("s", float("nan")),
        ("s", -1),
        ("s", 2**62),  # would wrap around if it were multiplied first
        ("s", "1e300"),
        ("s", "inf"),
        ("s", "2024-02-29"),
        ("iso", "1700000000"),
        ("iso", "2024-02-30"),
        ("iso", "1889-01-01"),
        ("s", datetime(1980, 1, 1)),
    ],
)
def test_a_time_outside_1990_to_2100_is_a_reject(tmp_path, unit, value):
    good, bad = times(tmp_path, [value], unit)
    assert good == []
    assert "is not a time between 1990 and 2100" in bad[0]


@settings(deadline=None)
@given(st.integers(1, 20_000), st.sampled_from(["[{}]", "[[{}]]", "['{}', {}]", '{{"url": {}}}']))
def test_text_that_looks_like_a_list_of_pictures_never_fails(depth, form):
    form = form.replace("{}", "[" * depth + "'a.jpg'" + "]" * depth)
    frame = pl.DataFrame({"image": [form, form[:-1], "[" * depth]})
    assert frame.select(generic.first_filled("image", pl.String())).height == 3


@settings(deadline=None)
@given(st.sampled_from(get_args(generic.Unit)), st.lists(st.text(max_size=30), min_size=1, max_size=8))
def test_any_text_is_a_time_or_a_reject(unit, values):
    frame = pl.DataFrame({"at": values}, schema={"at": pl.String})
    at = frame.select(generic.moment("at", pl.String(), unit))["at"]
    assert all(moment is None or 1990 <= moment.year <= 2100 for moment in at)


def test_without_a_time_column_rows_have_no_time(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\na,A\n")
    (tmp_path / "clicks.csv").write_text("user_id,item_id\nu,a\n")
    catalogue = read(tmp_path, "items.csv", "clicks.csv", interaction_columns={"at": None})
    assert catalogue.interactions["at"].to_list() == [None]


def test_without_ratings_everything_is_liked_and_with_a_threshold_an_empty_rating_is_a_reject(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\na,A\n")
    (tmp_path / "clicks.csv").write_text("user_id,item_id,at,stars\nu,a,1700000000,\nv,a,1700000000,2\n")
    assert read(tmp_path, "items.csv", "clicks.csv").interactions["liked"].to_list() == [True, True]
    rated = {"interaction_columns": {"rating": "stars"}}
    lenient = read(tmp_path, "items.csv", "clicks.csv", **rated)
    assert lenient.interactions.select("rating", "liked").rows() == [(None, True), (2.0, True)]
    strict = read(tmp_path, "items.csv", "clicks.csv", liked_from=3.0, **rated)
    assert strict.interactions.select("rating", "liked").rows() == [(2.0, False)]
    assert strict.rejects.rows() == [("clicks.csv", 2, "stars is empty")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["", None, "None", " x.jpg ", "y.jpg"], "/x.jpg"),
        ([], None),
        (["http://a/b.jpg"], "http://a/b.jpg"),
        (["/abs/a.jpg"], "/abs/a.jpg"),
        (["../up.jpg"], "/../up.jpg"),
    ],
)
@pytest.mark.parametrize("end", ["parquet", "jsonl"])
def test_of_a_list_of_pictures_the_first_that_is_not_empty_is_taken(tmp_path, value, expected, end):
    if end == "parquet":
        pl.DataFrame(
            {"item_id": ["a"], "image": [value]}, schema={"item_id": pl.String, "image": pl.List(pl.String)}
        ).write_parquet(tmp_path / "items.parquet")
    else:
        (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "a", "image": value}))
    columns = generic.ItemColumns(title=None, image="image")
    items, _ = generic.items_in(FsspecSource(str(tmp_path)), f"items.{end}", columns)
    relative = expected and (expected.startswith("/x") or expected.startswith("/.."))
    assert items["image_uri"].to_list() == [f"{tmp_path}{expected}" if relative else expected]


@pytest.mark.parametrize(
    ("images", "place", "expected"),
    [
        ("covers.zip", "./a.jpg", "zip://a.jpg::{root}/covers.zip"),
        ("zip://img::covers.zip", "a.jpg", "zip://img/a.jpg::{root}/covers.zip"),
        ("/shop/covers.ZIP", "img/a.jpg", "zip://img/a.jpg::/shop/covers.ZIP"),
        ("s3://shop/covers.zip", "a.jpg", "zip://a.jpg::s3://shop/covers.zip"),
        ("img/", "a.jpg", "{root}/img/a.jpg"),
        ("https://x.org/img", "a.jpg", "https://x.org/img/a.jpg"),
        (None, "a.jpg", "{root}/a.jpg"),
        ("covers.zip", "https://x.org/a.jpg", "https://x.org/a.jpg"),
        ("covers.zip", "/shop/a.jpg", "/shop/a.jpg"),
        ("covers.zip", "zip://a.jpg::b.zip", "zip://a.jpg::{root}/b.zip"),
        ("covers.zip", "", None),
    ],
)
def test_relative_places_of_pictures_begin_in_the_folder_or_archive_that_is_named(tmp_path, images, place, expected):
    (tmp_path / "items.csv").write_text(f"item_id,title,image\na,A,{place}\n")
    (tmp_path / "clicks.csv").write_text("user_id,item_id,at\nu,a,1700000000\n")
    items = read(tmp_path, "items.csv", "clicks.csv", images=images, item_columns={"image": "image"}).items
    assert items["image_uri"].to_list() == [expected and expected.format(root=tmp_path)]


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("['a.jpg', 'b.jpg']", "a.jpg"),  # pandas
        ("['a.jpg' 'b.jpg'\n 'c.jpg']", "a.jpg"),  # numpy
        ("[None, 'b\\d.jpg']", "b\\d.jpg"),
        ("[]", None),
        ('[{"alt": "a mug", "url": "a.jpg"}]', "a.jpg"),
        ("{'alt': 'a mug', 'large': 'http://x/a.jpg'}", "http://x/a.jpg"),
        ('{"hi_res": [null, "http://x/a.jpg"]}', "http://x/a.jpg"),
        ("[cover] a.jpg", "[cover] a.jpg"),
        ("{odd} a.jpg", "{odd} a.jpg"),
        ("nan", None),
    ],
)
def test_a_list_or_object_of_pictures_in_text_gives_its_first(written, place):
    frame = pl.DataFrame({"image": [written]})
    assert frame.select(generic.first_filled("image", pl.String()))["image"].to_list() == [place]


@pytest.mark.parametrize(
    "value",
    [
        [{"alt": "a mug", "url": "http://x/a.jpg"}],
        [{"alt": None, "large": " http://x/a.jpg"}],
        {"bytes": b"", "path": "http://x/a.jpg"},
        [[None, "http://x/a.jpg"]],
    ],
)
def test_a_typed_list_or_object_of_pictures_gives_its_first(value):
    frame = pl.DataFrame({"image": [value]})
    first = frame.select(generic.first_filled("image", frame.schema["image"]))
    assert first["image"].to_list() == ["http://x/a.jpg"]


def test_a_description_that_is_a_list_is_read_as_one_text(tmp_path):
    pl.DataFrame({"item_id": [7], "words": [["red", None, "mug"]], "dims": [{"cm": 9}]}).write_parquet(
        tmp_path / "i.parquet"
    )
    columns = generic.ItemColumns(title="dims", description="words")
    items, _ = generic.items_in(FsspecSource(str(tmp_path)), "i.parquet", columns)
    assert items.select("item_id", "title", "description").rows() == [("7", '{"cm":9}', "red, mug")]


def test_column_names_may_hold_anything(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,{title}\na,A\n")
    (tmp_path / "clicks.csv").write_text("user_id,item_id,{at}\nu,a,x\n")
    catalogue = read(
        tmp_path, "items.csv", "clicks.csv", item_columns={"title": "{title}"}, interaction_columns={"at": "{at}"}
    )
    assert catalogue.rejects["reason"].to_list() == ["{at} `x` is not a time between 1990 and 2100 in at_unit `s`"]


def test_a_missing_column_says_what_it_was_wanted_for(tmp_path):
    (tmp_path / "items.csv").write_text("sku,title\na,A\n")
    with pytest.raises(SourceError, match=r"no column `item_id` \(wanted as item_id\)"):
        read(tmp_path, "items.csv", "clicks.csv")


@pytest.mark.parametrize("end", ["csv", "jsonl", "parquet"])
def test_a_reject_from_a_folder_of_parts_names_the_part_and_its_own_line(tmp_path, end):
    (tmp_path / "items").mkdir()
    (tmp_path / "clicks").mkdir()
    write(tmp_path / "items", f"0.{end}", [{"item_id": "a", "title": "A"}])
    for n, at in enumerate(("1700000000", "soon")):
        write(tmp_path / "clicks", f"{n}.{end}", [{"user_id": "u", "item_id": "a", "at": at}])
    catalogue = read(tmp_path, "items", "clicks")
    line = 2 if end == "csv" else 1
    assert catalogue.interactions.select("source", "line").rows() == [(f"clicks/0.{end}", line)]
    assert catalogue.rejects.select("source", "line").rows() == [(f"clicks/1.{end}", line)]


@pytest.mark.parametrize("dtype", [pl.Int64, pl.Float64, pl.Float32])
def test_an_id_is_the_same_text_whether_parquet_holds_it_as_an_integer_or_as_a_whole_float(dtype):
    values = [1, 20_000_000, None] if dtype == pl.Float64 else [1, 2_000, None]
    frame = pl.DataFrame({"id": pl.Series(values, dtype=dtype)})
    expected = [None if value is None else str(value) for value in values]
    assert frame.select(generic.text("id", frame.schema["id"]))["id"].to_list() == expected


def test_a_float_that_is_not_whole_or_fits_no_integer_stays_as_it_is():
    frame = pl.DataFrame({"x": [0.1, -2.0, 1e300, float("inf"), float("nan")]})
    assert frame.select(generic.text("x", pl.Float64()))["x"].to_list() == ["0.1", "-2", "1e+300", "inf", "NaN"]
