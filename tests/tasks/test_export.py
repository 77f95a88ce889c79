"""Tables leave in the format of the file's ending, whole or not at all."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mllmsrec_core.errors import UsageError
from tasks.export import export

FRAME = pl.DataFrame(
    {
        "id": ["a", "b"],
        "text": ['say "hi",\nü', None],
        "x": [0.1, float("nan")],
        "at": pl.Series([datetime(2024, 1, 2, tzinfo=UTC), None], dtype=pl.Datetime("us", "UTC")),
        "tags": [["ü", 'a"b'], None],
        "pair": [{"k": 1}, None],
        "ask": [b"\x00\xff", None],
    }
)


def test_parquet_holds_the_table_as_it_is(tmp_path):
    assert export(FRAME, tmp_path / "new" / "t.parquet") == 2
    assert_frame_equal(pl.read_parquet(tmp_path / "new" / "t.parquet"), FRAME)


def test_csv_shows_keys_as_hex_and_nested_values_as_json(tmp_path):
    export(FRAME, tmp_path / "t.CSV")
    row, empty = pl.read_csv(tmp_path / "t.CSV").to_dicts()
    assert (row["text"], row["ask"]) == ('say "hi",\nü', "00ff")
    assert (json.loads(row["tags"]), json.loads(row["pair"])) == (["ü", 'a"b'], {"k": 1})
    assert [empty[name] for name in ("text", "at", "tags", "pair", "ask")] == [None] * 5


def test_jsonl_holds_one_object_a_row(tmp_path):
    export(FRAME, tmp_path / "t.jsonl")
    first, second = map(json.loads, (tmp_path / "t.jsonl").read_text("utf-8").splitlines())
    assert (first["tags"], first["pair"], first["ask"]) == (["ü", 'a"b'], {"k": 1}, "00ff")
    assert second["id"] == "b"


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_an_empty_table_is_a_file_too(tmp_path, ending):
    assert export(FRAME.clear(), tmp_path / f"t{ending}") == 0
    assert (tmp_path / f"t{ending}").exists()


def test_another_ending_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UsageError, match=r"`.xlsx`.*\.parquet, \.csv, \.jsonl"):
        export(FRAME, tmp_path / "new" / "t.xlsx")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_the_file_of_before(tmp_path):
    export(FRAME, tmp_path / "t.csv")
    before = (tmp_path / "t.csv").read_bytes()
    with pytest.raises(pl.exceptions.PolarsError):
        export(FRAME.select(odd=pl.struct(pl.lit(1)).implode().cast(pl.Object, strict=False)), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
