"""A dataset on S3 is a dataset like any other: listed by folder, read whole, whatever the line does."""

import gzip
import io

import polars as pl
import pytest
from faults import FAULTS

from mllmsrec_core.errors import SourceError
from storage.files import Files
from storage.source import ABSENT, UNKNOWN, FsspecSource


@pytest.fixture
def source(url):
    files = Files(url)
    files.write("items.csv", b"id,title\n1,Mug\n2,Cup\n")
    files.write("items.csv.gz", gzip.compress(b"id,title\n1,Mug\n"))
    for day in ("2024-01-01", "2024-01-02"):
        buffer = io.BytesIO()
        pl.DataFrame({"user": [day[-1]] * 1000}).write_parquet(buffer)
        files.write(f"clicks/day={day}/part-0.parquet", buffer.getvalue())
    for number in range(3):
        files.write(f"posters/{number}.jpg", b"x" * (number + 1))
    return FsspecSource(url)


def test_tables_are_read_from_s3(source):
    assert source.table("items.csv")[0].rows() == [("1", "Mug", 2), ("2", "Cup", 3)]
    assert source.table("items.csv.gz")[0].rows() == [("1", "Mug", 2)]
    rows, _ = source.table("clicks")
    assert rows["line"].to_list() == list(range(1, 2001))
    assert rows["day"].cast(pl.String).unique().sort().to_list() == ["2024-01-01", "2024-01-02"]
    assert source.names("posters") == ["posters/0.jpg", "posters/1.jpg", "posters/2.jpg"]


def test_a_missing_file_names_the_nearest(source):
    with pytest.raises(SourceError, match=r"no s3://.*/item\.csv; did you mean `items\.csv`"):
        source.table("item.csv")


def test_versions_of_pictures_come_from_one_listing_and_change_with_the_file(source, line):
    uris = [source.uri(f"posters/{number}.jpg") for number in range(4)]
    before = len(line.seen)
    first = source.versions([*uris, "s3://elsewhere/a.jpg"])
    assert len(line.seen) == before + 1
    assert first[3:] == [ABSENT, UNKNOWN]
    assert first[:3] == [source.version(f"posters/{number}.jpg") for number in range(3)]
    source.files.write("posters/0.jpg", b"other")
    assert [old == new for old, new in zip(first, source.versions(uris), strict=False)] == [False, True, True, True]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_read_and_listed_is_the_same_over_a_faulty_line(source, line, during, fault):
    uris = [source.uri(f"posters/{number}.jpg") for number in range(4)]
    expected = source.versions(uris), source.version("items.csv")
    assert (
        during([fault], lambda: source.versions(uris)),
        during([fault], lambda: source.version("items.csv")),
    ) == expected
    for name in ("items.csv", "clicks"):
        whole, requests = source.table(name)[0], len(line.seen)
        source.table(name)
        for position in range(len(line.seen) - requests):  # each request of the reading in its turn
            assert during([None] * position + [fault], lambda name=name: source.table(name)[0]).equals(whole)


def test_a_part_whose_key_leads_elsewhere_is_refused(source):
    source.files.write("odd/../../out.parquet", b"x")
    with pytest.raises(SourceError, match="leads out of its folder"):
        source.table("odd")


def test_a_listing_that_stays_refused_leaves_versions_unknown_and_one_that_fails_is_an_error(source, line, monkeypatch):
    uri = source.uri("posters/0.jpg")
    line.rate, line.faults = 1.0, ("denied",)
    assert source.versions([uri]) == [UNKNOWN]
    monkeypatch.setattr("storage.files.PATIENCE", 0.0)
    line.faults = ("internal",)
    with pytest.raises(SourceError, match="InternalError"):
        source.versions([uri])
