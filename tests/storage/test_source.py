"""Sources read what they can, say what they cannot, and list instead of asking one by one."""

import bz2
import gzip
import json
import lzma
import os
import sys
import tracemalloc
import uuid
from zipfile import ZipFile

import fsspec
import polars as pl
import pytest
from fsspec.implementations.local import LocalFileSystem

from mllmsrec_core.errors import SourceError
from storage import source as module
from storage.places import Places
from storage.source import ABSENT, UNKNOWN, FsspecSource, inside


def source_of(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return FsspecSource(str(folder))


def lines_of(table):
    rows, broken = table
    return rows["line"].to_list(), broken["line"].to_list()


def test_a_csv_comes_as_text_with_the_line_each_row_stands_on(tmp_path):
    rows, broken = source_of(tmp_path, a__csv="id,n\n007,1.50\nx,\n").table("a.csv")
    assert rows.rows() == [("007", "1.50", 2), ("x", None, 3)]
    assert rows.schema == {"id": pl.String, "n": pl.String, "line": pl.UInt32}
    assert broken.is_empty()


def test_columns_are_renamed_to_ours(tmp_path):
    rows, _ = source_of(tmp_path, a__csv="movieId,title\n1,Up\n").table("a.csv", {"item_id": "movieId"})
    assert rows.columns == ["item_id", "source", "line"]


@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.psv", "|"), ("a.ssv", ";"), ("A.CSV", ",")])
def test_the_extension_says_the_delimiter(tmp_path, name, delimiter):
    (tmp_path / name).write_text(f"a{delimiter}b\n1{delimiter}2\n")
    assert FsspecSource(str(tmp_path)).table(name)[0].rows() == [("1", "2", 2)]


def test_windows_line_ends_a_byte_order_mark_and_broken_utf_8_are_read(tmp_path):
    content = b"\xef\xbb\xbfid,title\r\n1,caf\xe9\r\n\r\n2,ok\r\n"
    rows, _ = source_of(tmp_path, a__csv=content).table("a.csv")
    assert rows.rows() == [("1", "caf�", 2), ("2", "ok", 4)]


@pytest.mark.parametrize("quoted", ["x", '"x"'])
def test_rows_with_too_few_or_too_many_fields_are_rejects_and_cost_no_others(tmp_path, quoted):
    rows, broken = source_of(tmp_path, a__csv=f"a,b\n1,{quoted}\n2\n3,4,5\n6,7\n").table("a.csv")
    assert rows["a"].to_list() == ["1", "6"]
    assert broken.rows() == [
        ("a.csv", 3, "1 field where the header has 2"),
        ("a.csv", 4, "3 fields where the header has 2"),
    ]


def test_a_quoted_field_may_hold_line_breaks_and_the_lines_after_it_keep_their_numbers(tmp_path):
    content = 'a,b\n1,"two\nlines, one field"\n2,x\n'
    rows, _ = source_of(tmp_path, a__csv=content).table("a.csv")
    assert rows.rows() == [("1", "two\nlines, one field", 2), ("2", "x", 4)]


def test_a_stray_quote_breaks_its_own_line_only(tmp_path):
    content = 'a,b\n1,"never closed\n' + "".join(f"{n},x\n" for n in range(2, 50_000)) + '9,"q" t\n10,y\n'
    kept, broken = lines_of(source_of(tmp_path, a__csv=content).table("a.csv"))
    assert broken == [2, 50_001]
    assert len(kept) == 49_999


def test_json_lines_come_as_text_with_nested_values_as_json(tmp_path):
    content = '{"id": 12345678901234567890, "r": 4.0, "ok": true, "t": ["a", {"b": 1}]}\n\n{"id": "x", "r": null}\n'
    rows, _ = source_of(tmp_path, a__jsonl=content).table("a.jsonl")
    assert rows.rows() == [
        ("12345678901234567890", "4", "true", '["a", {"b": 1}]', 1),
        ("x", None, None, None, 3),
    ]


def test_broken_json_lines_are_rejects_and_cost_no_others(tmp_path):
    content = '{"id": 1}\n{"id": \n[1]\n' + "[" * 100_000 + '\n{"id": 5}\n'
    rows, broken = source_of(tmp_path, a__jsonl=content).table("a.jsonl", {"item_id": "id"})
    assert rows.rows() == [("1", "a.jsonl", 1), ("5", "a.jsonl", 5)]
    assert broken["line"].to_list() == [2, 3, 4]
    assert "a JSON object was expected, not list" in broken["reason"][1]


ROWS = [{"id": 1, "t": ["a", "b"]}, {"id": 2, "t": []}]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "[" + ",\n".join(map(json.dumps, ROWS)) + "]",
        "\ufeff\n[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    ],
)
@pytest.mark.parametrize("columns", [None, {"item_id": "id"}])
def test_one_json_array_is_an_error_that_says_how_to_write_json_lines(tmp_path, content, columns):
    with pytest.raises(SourceError, match=r"a\.json .*line 1: a JSON object was expected, not list.*lines=True"):
        source_of(tmp_path, a__json=content).table("a.json", columns)


def test_a_first_line_that_is_a_list_costs_no_other(tmp_path):
    rows, broken = source_of(tmp_path, a__jsonl='[1]\n{"id": 2}\n').table("a.jsonl")
    assert rows["id"].to_list() == ["2"] and broken["line"].to_list() == [1]


def test_json_of_which_no_line_can_be_read_quotes_the_first(tmp_path):
    with pytest.raises(SourceError, match=r"no line of .*a\.json .* line 2: no JSON: .*; export it as JSON lines"):
        source_of(tmp_path, a__json='\n{\n"id": 1\n}\n').table("a.json", {"item_id": "id"})


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_csv_whose_header_has_no_comma_is_read_by_what_it_has(tmp_path, delimiter):
    content = f'id{delimiter}title\n1{delimiter}Mug, red\n2{delimiter}"a{delimiter}b"\n'
    rows, broken = source_of(tmp_path, a__csv=content).table("a.csv")
    assert rows.rows() == [("1", "Mug, red", 2), ("2", f"a{delimiter}b", 3)] and broken.is_empty()


@pytest.mark.parametrize(("end", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_text_is_read(tmp_path, end, pack):
    (tmp_path / f"a.jsonl{end}").write_bytes(pack(b'{"id": 1}\n'))
    (tmp_path / f"a.csv{end}").write_bytes(pack(b"id\n1\n"))
    source = FsspecSource(str(tmp_path))
    assert source.table(f"a.jsonl{end}")[0]["id"].to_list() == source.table(f"a.csv{end}")[0]["id"].to_list() == ["1"]


def test_a_truncated_gzip_file_is_an_error_that_says_so(tmp_path):
    source = source_of(tmp_path, a__csv__gz=gzip.compress(os.urandom(10_000))[:500])
    with pytest.raises(SourceError, match=r"cannot read .*a\.csv\.gz"):
        source.table("a.csv.gz")


@pytest.mark.parametrize(("end", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_a_damaged_compressed_file_is_an_error_that_says_so(tmp_path, end, pack):
    content = bytearray(pack(os.urandom(10_000)))
    content[20:60] = b"\xff" * 40
    (tmp_path / f"a.csv{end}").write_bytes(content)
    with pytest.raises(SourceError, match=r"cannot read .*a\.csv"):
        FsspecSource(str(tmp_path)).table(f"a.csv{end}")


def test_parquet_keeps_its_types_and_numbers_its_rows(tmp_path):
    pl.DataFrame({"id": [1, 2], "tags": [["a"], []]}).write_parquet(tmp_path / "a.parquet")
    rows, _ = FsspecSource(str(tmp_path)).table("a.parquet", {"item_id": "id", "t": "tags"})
    assert rows.rows() == [(1, ["a"], "a.parquet", 1), (2, [], "a.parquet", 2)]


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_folder_of_parquet_is_one_table_with_its_partitions_as_columns(tmp_path, where):
    root = str(tmp_path) if where == "local" else f"memory://{uuid.uuid4().hex}"
    for day in ("2024-01-01", "2024-01-02"):
        with fsspec.open(f"{root}/clicks/day={day}/part-0.parquet", "wb", auto_mkdir=True) as file:
            pl.DataFrame({"user": [day[-1]]}).write_parquet(file)
    rows, _ = FsspecSource(root).table("clicks")
    assert rows.select("user", pl.col("day").cast(pl.String), "line").rows() == [
        ("1", "2024-01-01", 1),
        ("2", "2024-01-02", 2),
    ]


def test_of_parquet_only_the_columns_that_are_wanted_are_read(tmp_path):
    texts = [f"{n} " + "long " * 2_000 for n in range(2_000)]
    pl.DataFrame({"id": range(2_000), "text": texts}).write_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    start = content.index(b"long ") - 20  # whoever reads the text meets damage
    (tmp_path / "a.parquet").write_bytes(content[:start] + b"\xff" * 40 + content[start + 40 :])
    source = FsspecSource(str(tmp_path))
    assert source.table("a.parquet", {"item_id": "id"})[0]["item_id"].to_list() == list(range(2_000))
    with pytest.raises(SourceError, match="as Parquet"):
        source.table("a.parquet", {"title": "text"})
    with pytest.raises(SourceError, match=r"no column `txt`.*did you mean `text`"):
        source.table("a.parquet", {"title": "txt"})


def test_a_row_of_parquet_knows_its_part_and_keys_keep_their_zeros_as_in_text(tmp_path):
    for n in (1, 2):
        (tmp_path / f"clicks/sku=00{n}/at=1%3A00").mkdir(parents=True)
        pl.DataFrame({"user": ["u"]}).write_parquet(tmp_path / f"clicks/sku=00{n}/at=1%3A00/0.parquet")
    rows, _ = FsspecSource(str(tmp_path)).table("clicks", {"u": "user", "item_id": "sku", "t": "at"})
    where = [f"clicks/sku=00{n}/at=1%3A00/0.parquet" for n in (1, 2)]
    assert rows.rows() == [("u", "001", "1:00", where[0], 1), ("u", "002", "1:00", where[1], 1)]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"image": pl.Series([None], dtype=pl.Null)}, {"image": ["b"]}, [None, "b"]),
        ({"image": ["a"]}, {"image": pl.Series([None], dtype=pl.Null)}, ["a", None]),
        ({}, {"image": ["b"]}, [None, "b"]),
        ({"image": ["a"]}, {}, ["a", None]),
        ({"image": [7]}, {"image": ["b"]}, ["7", "b"]),
        ({"image": pl.Series([[]], dtype=pl.List(pl.Null))}, {"image": [["b"]]}, [[], ["b"]]),
    ],
)
def test_a_part_may_lack_a_column_or_every_value_of_it(tmp_path, first, second, expected):
    (tmp_path / "items").mkdir()
    for n, columns in enumerate((first, second)):
        pl.DataFrame({"item_id": [str(n)], **columns}).write_parquet(tmp_path / f"items/part-{n}.parquet")
    rows, _ = FsspecSource(str(tmp_path)).table("items", {"item_id": "item_id", "image": "image"})
    assert rows["image"].to_list() == expected
    assert FsspecSource(str(tmp_path)).table("items")[0]["line"].to_list() == [1, 2]


def test_parts_whose_types_do_not_go_together_are_an_error_that_says_so(tmp_path):
    (tmp_path / "items").mkdir()
    for n, value in enumerate(("a", ["b"])):
        pl.DataFrame({"item_id": [value]}).write_parquet(tmp_path / f"items/part-{n}.parquet")
    with pytest.raises(SourceError, match=r"the parts of .*items hold different types"):
        FsspecSource(str(tmp_path)).table("items", {"item_id": "item_id"})


def test_text_named_parquet_is_an_error_that_says_so(tmp_path):
    with pytest.raises(SourceError, match="as Parquet"):
        source_of(tmp_path, a__parquet="id\n1\n").table("a.parquet")


def test_a_missing_file_names_the_nearest(tmp_path):
    with pytest.raises(SourceError, match=r"no .*rating\.csv; did you mean `ratings\.csv`"):
        source_of(tmp_path, ratings__csv="a\n1\n").table("rating.csv")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl"])
def test_a_missing_root_is_an_error_that_says_what_to_check(tmp_path, name):
    with pytest.raises(SourceError, match="check the path"):
        FsspecSource(str(tmp_path / "nowhere")).table(name)


@pytest.mark.parametrize(("name", "content"), [("a.csv", "userId,movieId\n1,2\n"), ("a.jsonl", '{"userId":1,"b":2}')])
def test_a_missing_column_names_the_nearest(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=r"no column `user_id` \(wanted as user\); did you mean `userId`"):
        FsspecSource(str(tmp_path)).table(name, {"user": "user_id"})


@pytest.mark.parametrize("end", ["csv", "jsonl", "parquet"])
def test_a_column_called_line_is_never_taken_for_the_line_of_a_row(tmp_path, end):
    frame = pl.DataFrame({"line": ["a", "b"], "title": ["A", "B"]})
    {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[end](tmp_path / f"a.{end}")
    with pytest.raises(SourceError, match="no column `line`"):
        FsspecSource(str(tmp_path)).table(f"a.{end}", {"item_id": "line"})


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", "\ufeff\n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    with pytest.raises(SourceError, match=r"a\.csv is empty"):
        source_of(tmp_path, a__csv=content).table("a.csv")


@pytest.mark.parametrize(("content", "why"), [("\na,b\n1,2\n", "is empty"), ("a" * 200_000 + "\n", "field limit")])
def test_a_header_that_cannot_be_read_is_an_error_that_says_so(tmp_path, content, why):
    with pytest.raises(SourceError, match=rf"a\.csv.*{why}|{why}.*a\.csv"):
        source_of(tmp_path, a__csv=content).table("a.csv")


def test_half_a_surrogate_pair_in_json_costs_one_character(tmp_path):
    rows, _ = source_of(tmp_path, a__jsonl='{"i\\ud800": "a\\ud800", "t": ["\\udfff"]}\n').table("a.jsonl")
    assert rows.to_dicts() == [{"i?": "a?", "t": '["?"]', "line": 1}]


def test_a_header_without_rows_is_an_empty_table(tmp_path):
    rows, _ = source_of(tmp_path, a__csv="a,b\n").table("a.csv", {"x": "a"})
    assert rows.shape == (0, 3)


def test_a_column_that_stands_twice_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="column `a` twice"):
        source_of(tmp_path, a__csv="a,b,a\n1,2,3\n").table("a.csv")


def test_an_unknown_format_names_the_known_ones(tmp_path):
    with pytest.raises(SourceError, match=r"\.parquet, \.csv"):
        source_of(tmp_path, a__xlsx="x").table("a.xlsx")


# --- listing ---------------------------------------------------------------------------------------------------


def test_names_are_relative_and_sorted(tmp_path):
    (tmp_path / "posters").mkdir()
    source = source_of(tmp_path, b__csv="x", a__csv="x")
    (tmp_path / "posters" / "1.jpg").write_bytes(b"x")
    assert source.names() == ["a.csv", "b.csv", "posters/1.jpg"]
    assert source.names("posters") == ["posters/1.jpg"]
    assert source.names("nothing") == []


def test_the_members_of_an_archive_are_named_as_they_are_read_and_versioned(tmp_path):
    with ZipFile(tmp_path / "covers.zip", "w") as archive:
        archive.mkdir("img")
        for name in ("img/b.jpg", "a.jpg", "odd::name.jpg"):
            archive.writestr(name, name)
    source = FsspecSource(str(tmp_path))
    assert source.names("covers.zip") == ["zip://a.jpg::covers.zip", "zip://img/b.jpg::covers.zip"]
    uri = f"zip://img/b.jpg::{source.uri('covers.zip')}"
    assert Places().read(uri, 100) == b"img/b.jpg" and source.versions([uri]) not in ([UNKNOWN], [ABSENT])


def test_an_archive_that_is_missing_or_damaged_is_an_error_that_says_so(tmp_path):
    source = source_of(tmp_path, covers__zip="no archive", a__csv="x")
    with pytest.raises(SourceError, match=r"cannot read .*covers\.zip: .*pack it again"):
        source.names("covers.zip")
    with pytest.raises(SourceError, match=r"there is no .*cover\.zip; did you mean `covers\.zip`"):
        source.names("cover.zip")


def test_versions_change_with_the_file_and_say_what_is_absent_or_unknown(tmp_path):
    source = source_of(tmp_path, a__jpg="x")
    uris = [source.uri("a.jpg"), source.uri("b.jpg"), "demo://mug/red/plain/1.png", "https://example.org/a.jpg"]
    before = source.versions(uris)
    assert before[0] == source.version("a.jpg")
    assert before[1:] == [ABSENT, "1", UNKNOWN]
    (tmp_path / "a.jpg").write_bytes(b"longer")
    assert source.versions(uris)[0] != before[0]
    assert source.version("b.jpg") is None


def test_versions_list_nothing_outside_the_roots(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    source = FsspecSource(str(tmp_path / "data"))
    outside = [str(tmp_path / "secret.jpg"), f"{source.uri('')}/../secret.jpg", "memory://x/a.jpg", "nul\0/a.jpg"]
    assert source.versions(outside) == [UNKNOWN] * 4
    assert FsspecSource(str(tmp_path / "data"), [str(tmp_path)]).versions(outside[:1]) != [UNKNOWN]


def test_a_folder_is_listed_once_however_many_pictures_it_holds(tmp_path, monkeypatch):
    source = source_of(tmp_path, **{f"{n}__jpg": "x" for n in range(300)})
    listed, ls = [], LocalFileSystem.ls
    monkeypatch.setattr(LocalFileSystem, "ls", lambda fs, path, **k: listed.append(path) or ls(fs, path, **k))
    assert ABSENT not in source.versions([source.uri(f"{n}.jpg") for n in range(300)])
    assert listed == [str(tmp_path)]


def test_memory_is_a_source_like_any_other():
    root = f"memory://{uuid.uuid4().hex}"
    source = FsspecSource(root)
    source.files.fs.pipe_file(f"{source.files.root}/a.csv", b"id\n1\n")
    assert source.table("a.csv")[0]["id"].to_list() == ["1"]
    assert source.names() == ["a.csv"]
    uri = source.uri("a.csv")
    assert fsspec.open(uri).open().read() == b"id\n1\n"
    assert source.versions([uri, source.uri("b")]) == [source.version("a.csv"), ABSENT]


def test_inside_follows_links_and_dots(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    assert inside(str(root / "a.jpg"), str(root))
    assert inside(f"file://{root}/a.jpg", str(root))
    assert not inside(str(root / "link" / "a.jpg"), str(root))
    assert not inside(f"{root}/../a.jpg", str(root))
    assert not inside(f"{root}-other/a.jpg", str(root))
    assert inside("s3://bucket/shop/a.jpg", "s3://bucket/shop/")
    assert not inside("s3://bucket/shop/../a.jpg", "s3://bucket/shop")
    assert not inside("s3://bucket/shopping/a.jpg", "s3://bucket/shop")
    assert not inside(f"simplecache::file://{root}/a.jpg", str(root))


def test_json_numbers_keep_their_digits(tmp_path):
    rows, _ = source_of(tmp_path, a__jsonl=json.dumps({"at": 1676601581238})).table("a.jsonl")
    assert rows["at"].to_list() == ["1676601581238"]


def write_parts(folder, parts):
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("wanted", [None, {"user": "user", "day": "day"}])
@pytest.mark.parametrize(
    ("end", "first", "second"),
    [
        (".csv", b"user,n\n1,x\nbroken\n", b"user,n\n2,y\n"),
        (".jsonl", b'\n{"user": 1, "n": "x"}\nbroken\n', b'\n{"user": 2, "n": "y"}'),
        (
            ".jsonl.gz",
            gzip.compress(b'\n{"user": 1, "n": "x"}\nbroken', mtime=0),
            gzip.compress(b'\n{"user": 2, "n": "y"}', mtime=0),
        ),
    ],
)
def test_a_folder_of_text_parts_is_one_table_and_a_row_knows_its_part(tmp_path, wanted, end, first, second):
    days = {f"clicks/day=2024-01-0{n}/at=1%3A00/part-0{end}": content for n, content in ((1, first), (2, second))}
    beside = {
        "clicks/_SUCCESS": b"",
        "clicks/_later/part-0.csv": b"x",
        f"clicks/day=3/empty{end.removesuffix('.gz')}": b"",
    }
    write_parts(tmp_path, days | beside)
    rows, broken = FsspecSource(str(tmp_path)).table("clicks", wanted)
    first, second = days
    assert broken.select("source", "line").rows() == [(first, 3)]
    if wanted:
        assert rows.select("user", "day", "source").rows() == [("1", "2024-01-01", first), ("2", "2024-01-02", second)]
        assert rows["line"].to_list() == [2, 2]
    else:  # lines go on from part to part
        assert rows.select("user", "day", "line").rows() == [("1", "2024-01-01", 2), ("2", "2024-01-02", 5)]
        assert rows["at"].to_list() == ["1:00", "1:00"]
    with pytest.raises(SourceError, match=r"no column `dya`.*did you mean `day`"):
        FsspecSource(str(tmp_path)).table("clicks", {"at": "dya"})


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_part_without_a_byte_may_be_packed(tmp_path, pack):
    end = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[pack]
    write_parts(tmp_path, {f"c/0.csv.{end}": pack(b"x\n1\n"), f"c/1.csv.{end}": pack(b"")})
    assert FsspecSource(str(tmp_path)).table("c")[0]["x"].to_list() == ["1"]


def test_a_folder_of_rows_without_a_value_is_null_in_every_format(tmp_path):
    write_parts(tmp_path, {"c/day=__HIVE_DEFAULT_PARTITION__/0.csv": b"x\n1\n", "c/day=2/0.csv": b"x\n2\n"})
    assert dict(FsspecSource(str(tmp_path)).table("c")[0].select("x", "day").rows()) == {"1": None, "2": "2"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a.csv": b"x\n1\n", "b.parquet": b""}, r"several formats \(\.csv, \.parquet\): name"),
        ({"a.txt": b"x"}, "holds no file with rows"),
        ({"a.csv": b""}, "is empty"),
    ],
)
def test_a_folder_that_is_no_table_says_what_is_wanted(tmp_path, parts, message):
    write_parts(tmp_path / "clicks", parts)
    with pytest.raises(SourceError, match=message):
        FsspecSource(str(tmp_path)).table("clicks")


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz"])
def test_text_is_read_a_bounded_piece_at_a_time_and_keeps_its_lines(tmp_path, monkeypatch, end):
    monkeypatch.setattr(module, "PIECE", 100)
    texts = [f'{{"id": {n}, "t": "{"x" * (n % 300)}"}}' if n % 7 else ("" if n % 2 else "broken") for n in range(500)]
    content = b"\xef\xbb\xbf" + "\n".join(texts).encode()
    source = source_of(
        tmp_path, **{f"a{end.replace('.', '__')}": gzip.compress(content, mtime=0) if end == ".jsonl.gz" else content}
    )
    rows, broken = source.table(f"a{end}", {"id": "id"})
    assert rows.select("id", "line").rows() == [(str(n), n + 1) for n in range(500) if n % 7]
    assert broken["line"].to_list() == [n + 1 for n in range(500) if texts[n] == "broken"]
    assert pl.concat(source.lines(f"a{end}")).rows() == [(text, n) for n, text in enumerate(texts, 1) if text]


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_local_text_is_never_held_whole(tmp_path, monkeypatch, end):
    monkeypatch.setattr(module, "PIECE", 1 << 16)
    content = b"".join(b"%d %s\n" % (n, os.urandom(2_000).hex().encode()) for n in range(2_000))
    (tmp_path / f"a.txt{end}").write_bytes(gzip.compress(content) if end else content)
    tracemalloc.start()
    try:
        lines = sum(piece.height for piece in FsspecSource(str(tmp_path)).lines(f"a.txt{end}"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lines == 2_000
    assert peak < 2e6 < len(content) / 3


def test_a_json_column_without_values_is_known_and_one_that_is_nowhere_is_not(tmp_path):
    content = '{"id": "a", "etag": null}\n' * 3
    write_parts(tmp_path / "parts", {"part-0.jsonl": content.encode(), "part-1.jsonl": b'{"id": "b", "etag": ""}'})
    for name in ("a.jsonl", "parts"):
        source = source_of(tmp_path, a__jsonl=content)
        assert source.table(name, {"id": "id", "version": "etag"})[0]["version"].null_count() == 3 + (name == "parts")
        with pytest.raises(SourceError, match=r"no column `tag` .*did you mean `etag`"):
            source.table(name, {"id": "id", "version": "tag"})


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="such names cannot be made here")
def test_a_file_whose_name_is_no_text_is_not_listed_and_hinders_nothing(tmp_path):
    write_parts(tmp_path, {"a.csv": b"id\n1\n", "sub/caf\u00e9.csv": b"id\n2\n", "sub/b\udcff.csv": b"id\n3\n"})
    assert FsspecSource(str(tmp_path)).names() == ["a.csv", "sub/caf\u00e9.csv"]
