"""What holds of files and blobs on a folder and in memory holds of them on S3, and what only S3 can show."""

import io
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import fsspec
import polars as pl

from storage.files import Files

# Collected here, they run on the `url` of this folder.
from tests.storage.test_blobs import (  # noqa: F401
    test_a_blob_that_is_gone_is_named_with_the_command_that_makes_it_again,
    test_bytes_that_are_not_what_their_name_says_are_never_handed_out,
    test_equal_bytes_are_kept_once_under_their_hash,
)
from tests.storage.test_files import (  # noqa: F401
    test_a_folder_is_no_file,
    test_a_later_write_replaces_an_earlier_one,
    test_names_with_signs_and_spaces_come_back_as_they_went,
    test_only_the_first_creates,
    test_what_another_writer_adds_is_seen,
    test_what_is_written_is_read_listed_and_removed,
)


def create(place):
    url, options, number = place
    return Files(url, options).create("seat", str(number).encode())


def test_of_processes_that_create_at_once_one_wins(url, options):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        won = pool.map(create, [(url, options, number) for number in range(8)], chunksize=1)
    assert won.count(True) == 1
    assert Files(url).read("seat") == str(won.index(True)).encode()


def test_of_threads_that_create_at_once_one_wins(files):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: files.create("seat", str(n).encode()), range(24)))
    assert won.count(True) == 1
    assert files.read("seat") == str(won.index(True)).encode()


def test_a_listing_has_more_files_than_a_page(files, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "20")  # 1,000 otherwise
    names = [f"many/{number:04d}" for number in range(45)]
    files.fs.pipe({files.path(name): b"x" for name in names})
    assert files.names("many") == names
    files.remove("many")
    assert files.names("many") == []


def test_a_frame_comes_back_as_it_went(files):
    frame = pl.DataFrame({"key": [b"\0\xff", None], "text": ["é", ""], "x": [0.1, float("nan")]})
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd")
    files.write("part-0.parquet", buffer.getvalue())
    assert pl.read_parquet(io.BytesIO(files.read("part-0.parquet"))).equals(frame)


def test_a_folder_that_a_console_made_is_no_file(files):
    files.fs.call_s3("put_object", Bucket=files.root.split("/")[0], Key="store/a/", Body=b"")
    files.write("a/b", b"x")
    assert files.names("a") == ["a/b"]


def test_a_name_with_signs_of_patterns_is_removed_and_nothing_else(files):
    for name in ("a[1]/x", "a[1]/y", "a1/x", "b*/x", "bc/x"):
        files.write(name, b"1")
    files.remove("a[1]")
    files.remove("b*")
    assert files.names("") == ["a1/x", "bc/x"]


def test_the_environment_alone_leads_to_a_server(url, line, monkeypatch):
    monkeypatch.delitem(fsspec.config.conf, "s3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", line.url)
    files = Files(url, {"max_concurrency": 2})  # a session that has not yet read the environment
    files.write("x", b"1")
    assert ("PUT", f"/{files.path('x')}", None) in line.seen
