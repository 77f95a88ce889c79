"""microlens reads pairs, titles, covers and counts in every form they are published in."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from zipfile import ZipFile

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.datasets import INTERACTIONS, ITEMS, REJECTS, microlens
from mllmsrec_core.errors import SourceError
from storage.source import FsspecSource
from tests.mllmsrec_core.datasets.amazon_files import folder

REAL = Path(__file__).parents[4] / "shared" / "data" / "microlens-50k"
MOMENT = datetime(2023, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
MS = int(MOMENT.timestamp() * 1_000)
TIMED = f"user,item,timestamp\n1,10,{MS}\n1,7,{MS + 1}\n2,10,{MS}\n".encode()
HISTORIES = b"1\t10 7\r\n2\t10\r\n"
TITLES = b'item,title\r\n7,"Duck, fried"\r\n10,Plain\r\n'
RELEASE = {"MicroLens-50k_pairs.tsv": HISTORIES, "MicroLens-50k_titles.csv": TITLES}


def read(files, **params):
    return microlens.read(folder(files), microlens.Params(**params))


def titled(content, name="MicroLens-50k_titles.csv"):
    catalogue = read({"MicroLens-50k_pairs.tsv": HISTORIES, name: content})
    assert catalogue.rejects.is_empty(), catalogue.rejects.rows()
    return catalogue.items.select("item_id", "title").rows()


def pairs(catalogue):
    return catalogue.interactions.select("user_id", "item_id", "at").rows()


def test_histories_come_in_their_order_without_times_and_windows_line_ends_are_no_part_of_an_item():
    catalogue = read(RELEASE)
    assert pairs(catalogue) == [("1", "10", None), ("1", "7", None), ("2", "10", None)]
    assert catalogue.interactions.select("liked", "rating", "source", "line").rows()[1:] == [
        (True, None, "MicroLens-50k_pairs.tsv", 1),
        (True, None, "MicroLens-50k_pairs.tsv", 2),
    ]
    assert catalogue.rejects.is_empty()


@pytest.mark.parametrize("header", ["user,item,timestamp", "user_id,item_id,time", "", '"user","item","timestamp"'])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_clicks_come_with_their_times_under_any_header_and_without_one(header, end):
    text = f"{header}\n" * bool(header) + f"1,10,{MS}\n1,7,{MS}\n"
    files = {
        "MicroLens-100k_pairs.csv": text.replace("\n", end).encode(),
        "MicroLens-100k_title_en.csv": b"7,a\n10,b\n",
    }
    catalogue = read(files)
    assert pairs(catalogue) == [("1", "10", MOMENT), ("1", "7", MOMENT)]
    assert catalogue.interactions["line"].to_list() == [1 + bool(header), 2 + bool(header)]
    assert catalogue.rejects.is_empty()


def test_columns_may_stand_in_another_order_beside_others():
    content = f"timestamp,item,x,user\n{MS},10,?,1\n".encode()
    assert pairs(read(RELEASE | {"MicroLens-50k_pairs.csv": content})) == [("1", "10", MOMENT)]


def test_where_both_forms_lie_the_one_with_times_is_read():
    assert pairs(read(RELEASE | {"MicroLens-50k_pairs.csv": TIMED}))[0] == ("1", "10", MOMENT)
    given = read(RELEASE | {"MicroLens-50k_pairs.csv": TIMED}, pairs_file="MicroLens-50k_pairs.tsv")
    assert pairs(given)[0] == ("1", "10", None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'item,title\n7,"Duck, ""fried"""\n', [("7", 'Duck, "fried"')]),
        (b"7,Duck, fried, hot\n10,\n", [("7", "Duck, fried, hot"), ("10", None)]),
        (b'\xef\xbb\xbf"item","title"\r\n"7","Duck"\r\n', [("7", "Duck")]),
        (b'7,"one\nand two"\n10,"x"\n', [("7", "one\nand two"), ("10", "x")]),
        (b'7,"never closed\n10,x\n', [("7", '"never closed'), ("10", "x")]),
        (b'7,5" screen\n10,say "hi"\n', [("7", '5" screen'), ("10", 'say "hi"')]),
        (b"7,&lt; Episode 2 &gt; &amp; more\n", [("7", "< Episode 2 > & more")]),
        (b'7,""\n10,"  "\n', [("7", None), ("10", None)]),
        (b'7,"\n', [("7", '"')]),
        (b"7,caf\xe9\n", [("7", "caf�")]),
    ],
)
def test_titles_are_read_with_and_without_header_and_quotes(content, expected):
    assert titled(content) == expected
    assert titled(content, "MicroLens-100k_title_en.csv") == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\n&"), max_size=12), min_size=1)
)
def test_any_title_that_csv_can_write_is_read_back(titles):
    frame = pl.DataFrame({"item": range(len(titles)), "title": titles})
    found = titled(frame.write_csv(quote_style="non_numeric").encode())
    assert found == [(str(n), pl.Series([title]).str.strip_chars()[0] or None) for n, title in enumerate(titles)]


@pytest.mark.parametrize("under", ["MicroLens-50k_covers", "MicroLens-50k/covers", "a/b/Covers"])
def test_covers_are_the_pictures_and_an_item_without_one_or_without_a_title_stays(under):
    covers = {f"{under}/7.jpg": b"x", f"{under}/99.PNG": b"x", f"{under}/thumb.jpg": b"x", "videos/10.jpg": b"x"}
    source = folder(RELEASE | covers)
    items = microlens.read(source, microlens.Params()).items
    assert items.select("item_id", "title", "image_uri", "line").rows() == [
        ("7", "Duck, fried", f"{source.uri('')}/{under}/7.jpg", 2),
        ("10", "Plain", None, 3),
        ("99", None, f"{source.uri('')}/{under}/99.PNG", None),
    ]


def archived(*names):
    content = io.BytesIO()
    with ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return content.getvalue()


@pytest.mark.parametrize("covers", [None, "MicroLens-50k_covers.zip"])
def test_covers_may_lie_in_an_archive(covers):
    files = RELEASE | {"MicroLens-50k_covers.zip": archived("MicroLens-50k_covers/7.jpg", "thumb.jpg")}
    items = read(files, covers=covers).items
    assert items["item_id"].to_list() == ["7", "10"]
    assert items["image_uri"][0].startswith("zip://MicroLens-50k_covers/7.jpg::memory:")
    assert items["image_uri"][0].endswith("/MicroLens-50k_covers.zip") and items["image_uri"][1] is None


def test_a_folder_of_covers_goes_before_the_archive_it_was_unpacked_from():
    files = RELEASE | {"M_covers.zip": archived("7.jpg"), "M_covers/7.jpg": b"x"}
    assert read(files).items["image_uri"][0].endswith("/M_covers/7.jpg")


def test_of_several_folders_of_covers_one_is_named():
    files = RELEASE | {"a_covers/7.jpg": b"x", "b_covers/7.jpg": b"x"}
    with pytest.raises(SourceError, match=r"a_covers, b_covers.*ingest\.microlens\.covers"):
        read(files)
    assert read(files, covers="b_covers/").items["image_uri"][0].endswith("/b_covers/7.jpg")


def test_likes_and_views_are_attributes_and_lines_that_are_none_are_rejects():
    counts = b"10\t5\t700\r\n7\t5\t5\n10\t6\t6\nx\t1\t2\n7\t1\n99\t1\t2\n"
    catalogue = read(RELEASE | {"MicroLens-50k_likes_and_views.txt": counts})
    assert [json.loads(text) for text in catalogue.items["attributes"]] == [
        {"likes": 5, "views": 5},
        {"likes": 5, "views": 700},
    ]
    assert catalogue.rejects.select("line", "reason").rows() == [
        (3, "second line of item `10`"),
        (4, "an item, its likes and its views are wanted, with tabs between them"),
        (5, "an item, its likes and its views are wanted, with tabs between them"),
        (6, "likes and views of item `99`, which has neither title nor cover"),
    ]


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("MicroLens-50k_pairs.tsv", "3 10 7", "1 fields where a user and the items of a history are wanted"),
        ("MicroLens-50k_pairs.tsv", "3\t10\t7", "3 fields where a user and the items of a history are wanted"),
        ("MicroLens-50k_pairs.tsv", "3\t ", "a history of no items"),
        ("MicroLens-50k_pairs.tsv", "Ada\t10", "the user is no number"),
        ("MicroLens-50k_pairs.tsv", "\t10", "the user is no number"),
        ("MicroLens-50k_pairs.tsv", "3\tx", "item `x` is no number"),
        ("MicroLens-50k_pairs.csv", "1,10", "2 fields where 3 are wanted"),
        ("MicroLens-50k_pairs.csv", "Ada,10,1", "the user is no number"),
        ("MicroLens-50k_pairs.csv", "1,,1", "item `` is no number"),
        ("MicroLens-50k_pairs.csv", "1,10,", "timestamp is empty"),
        (
            "MicroLens-50k_pairs.csv",
            "1,10,1672628645",
            "timestamp `1672628645` is not a time between 1990 and 2100 in ms",
        ),
        ("MicroLens-50k_titles.csv", "ten,x", "the line does not begin with an item's number"),
    ],
)
def test_a_line_that_cannot_be_used_is_a_reject_with_file_line_and_reason(name, line, reason):
    files = RELEASE | ({"MicroLens-50k_pairs.csv": TIMED} if name.endswith("pairs.csv") else {})
    whole = read(files)
    catalogue = read(files | {name: files[name] + line.encode() + b"\n"})
    last = files[name].count(b"\n") + 1
    assert catalogue.rejects.rows() == [(name, last, reason)]
    assert catalogue.interactions.equals(whole.interactions)
    assert catalogue.items.equals(whole.items)


def test_the_other_items_of_a_history_with_a_broken_one_stay():
    catalogue = read(RELEASE | {"MicroLens-50k_pairs.tsv": b"1\t10 x 7\n"})
    assert pairs(catalogue) == [("1", "10", None), ("1", "7", None)]
    assert catalogue.rejects["reason"].to_list() == ["item `x` is no number"]


def test_a_missing_file_or_column_says_what_is_wanted():
    with pytest.raises(SourceError, match=r"no file of pairs.*MicroLens-50k_pairs\.csv.*ingest\.microlens\.pairs_file"):
        read({"MicroLens-50k_titles.csv": TITLES})
    with pytest.raises(SourceError, match=r"no file of titles.*ingest\.microlens\.titles_file"):
        read({"MicroLens-50k_pairs.tsv": HISTORIES})
    with pytest.raises(SourceError, match=r"no column `timestamp`.*`user,item,timestamp`"):
        read(RELEASE | {"MicroLens-50k_pairs.csv": b"user,item,timestamps\n1,10,3\n"})
    with pytest.raises(SourceError, match=r"nothing\.csv"):
        read(RELEASE, titles_file="nothing.csv")


def test_of_several_releases_in_one_folder_one_is_named():
    files = RELEASE | {"MicroLens-100k_titles.csv": TITLES}
    with pytest.raises(SourceError, match=r"several.*MicroLens-100k_titles\.csv.*ingest\.microlens\.titles_file"):
        read(files)
    assert read(files, titles_file="MicroLens-50k_titles.csv").items.height == 2


def test_the_tables_have_the_columns_every_reader_gives():
    for files in (
        RELEASE,
        RELEASE | {"MicroLens-50k_pairs.csv": TIMED, "x_covers/1.jpg": b"", "x_likes_and_views.txt": b"7\t1\t1"},
    ):
        catalogue = read(files)
        assert catalogue.items.schema == ITEMS | {"source": pl.String, "line": pl.UInt32}
        assert catalogue.interactions.schema == INTERACTIONS
        assert catalogue.rejects.schema == REJECTS


@pytest.mark.skipif(not REAL.exists(), reason="the MicroLens-50k release is not beside the repository")
def test_every_row_of_the_real_release_is_read():
    catalogue = microlens.read(FsspecSource(str(REAL)), microlens.Params())
    assert catalogue.interactions["user_id"].n_unique() == 50_000
    assert catalogue.interactions["item_id"].n_unique() == catalogue.items["item_id"].n_unique() == 19_220
    assert catalogue.interactions.height == 359_708
    assert catalogue.items.height == 19_220
    assert catalogue.rejects.is_empty()
    first = catalogue.interactions.filter(pl.col("user_id") == "1")["item_id"].to_list()
    assert first == ["1958", "6346", "15223", "17700", "1707"]
    assert catalogue.items["title"].null_count() == 0
