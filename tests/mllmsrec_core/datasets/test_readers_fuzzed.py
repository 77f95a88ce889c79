"""Whatever stands in a dataset's files, a reader reads it, rejects it line by line, or says what to do about the file.

`demo` reads no files. The files of each dataset are sound ones, broken in every way that downloads and exports break.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mllmsrec_core.datasets import INTERACTIONS, ITEMS, REJECTS, Catalogue, amazon, generic, microlens, movielens
from mllmsrec_core.errors import SourceError
from tests.mllmsrec_core.datasets.amazon_files import FORMS, Product, Review, Shop, folder, json_lines, parquet

AMAZON = Shop(
    tuple(Product(f"B{n}", f"Mug {n}", ("Red.",), ("Home", "Mugs"), "Bo", 3.5, "https://a/b.jpg") for n in range(4)),
    tuple(Review(f"A{n % 3}", f"B{n}", 1.0 + n, 1_400_000_000 + n) for n in range(4)),
)
OWN_ITEMS = [{"item_id": str(n), "title": f"Mug {n}", "words": ["a"], "image": [f"{n}.jpg"]} for n in range(4)]
OWN_CLICKS = [{"user_id": f"u{n}", "item_id": str(n), "at": 1_700_000_000 + n, "stars": 4.5} for n in range(4)]
OWN = {
    "item_columns": {"description": "words", "image": "image", "attributes": ["title"]},
    "interaction_columns": {"rating": "stars"},
    "liked_from": 4.0,
}
MICROLENS = {
    "M_titles.csv": b'item,title\n7,"Duck, fried"\n8,Plain\n9,"a ""b"""\n',
    "M_likes_and_views.txt": b"7\t1\t2\n8\t3\t4\n9\t0\t0\n",
    "M_covers/7.jpg": b"",
}


def written(rows: list[dict[str, Any]], end: str) -> bytes:
    if end == ".jsonl":
        return json_lines(rows)
    frame = pl.DataFrame(rows)
    if end == ".parquet":
        return parquet(frame)
    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
    flat = frame.with_columns(pl.col(nested).list.join(" "))
    return flat.write_csv(separator="\t" if end == ".tsv" else ",").encode()


@dataclass(frozen=True)
class Dataset:
    """A reader, its parameters, and sound files for it."""

    read: Callable[[Any, Any], Catalogue]
    params: Any
    files: Mapping[str, bytes]

    def __call__(self, changed: Mapping[str, bytes]) -> Catalogue:
        return self.read(folder({**self.files, **changed}), self.params)


def own(end: str) -> Dataset:
    names = {"items_file": f"items{end}", "interactions_file": f"clicks{end}"}
    files = {f"items{end}": written(OWN_ITEMS, end), f"clicks{end}": written(OWN_CLICKS, end)}
    return Dataset(generic.read, generic.Params.model_validate(OWN | names), files)


DATASETS = {
    "movielens": Dataset(
        movielens.read,
        movielens.Params(),
        {
            "movies.csv": b'movieId,title,genres\n1,Up (2009),Adventure|Children\n2,"Odd, The",(no genres listed)\n',
            "ratings.csv": b"userId,movieId,rating,timestamp\n1,1,4.0,1260759108\n1,2,3.5,1260759113\n",
            "posters/1.jpg": b"",
        },
    ),
    **{f"generic {end}": own(end) for end in (".csv", ".tsv", ".jsonl", ".parquet")},
    **{f"amazon {form}": Dataset(amazon.read, amazon.Params(), files(AMAZON)) for form, files in FORMS.items()},
    "microlens csv": Dataset(
        microlens.read,
        microlens.Params(),
        MICROLENS | {"M_pairs.csv": b"user,item,timestamp\n1,7,1672628645678\n1,8,1672628645679\n2,9,1672628645678\n"},
    ),
    "microlens tsv": Dataset(
        microlens.read, microlens.Params(), MICROLENS | {"M_pairs.tsv": b"1\t7 8\r\n2\t9\r\n3\t7 9 8\r\n"}
    ),
}
NAMES = [(name, file) for name, dataset in DATASETS.items() for file in dataset.files if not file.endswith(".jpg")]
TEXT_NAMES = [(name, file) for name, file in NAMES if not file.endswith(".parquet")]
JSON_NAMES = [(name, file) for name, file in NAMES if ".json" in file]


def plain(name: str, content: bytes) -> bytes:
    return gzip.decompress(content) if name.endswith(".gz") else content


def packed(name: str, content: bytes) -> bytes:
    return gzip.compress(content) if name.endswith(".gz") else content


def lines_of(content: bytes) -> set[int]:
    """The numbers of the lines on which something stands."""
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    return {number for number, line in enumerate(text.split("\n"), 1) if line.strip()}


def check(name: str, changed: Mapping[str, bytes]) -> Catalogue | None:
    """What the reader makes of the dataset with these files changed; None where it refuses the file in good words."""
    try:
        catalogue = DATASETS[name](changed)
    except SourceError as error:
        said = str(error)
        assert "/readers" in said, f"does not say where: {said}"
        hints = ("export", "download", "check", "name ", "did you mean", "known:", "write `", "set ingest")
        assert any(hint in said.lower() for hint in hints), f"does not say what to do: {said}"
        return None
    assert [name for name in catalogue.items.columns if name != "image_version"] == [*ITEMS, "source", "line"]
    assert catalogue.items.select(*ITEMS).schema == ITEMS
    assert catalogue.interactions.schema == INTERACTIONS
    assert catalogue.rejects.schema == REJECTS
    assert catalogue.rejects["reason"].null_count() == 0
    assert catalogue.rejects["source"].null_count() == catalogue.rejects["line"].null_count() == 0
    return catalogue


def places(catalogue: Catalogue, file: str) -> tuple[set[int], set[int]]:
    """The lines of one file that are used, and those that are rejects."""
    used = {
        line
        for frame in (catalogue.items, catalogue.interactions)
        for line in frame.filter(pl.col("source") == file)["line"]
    }
    return used, set(catalogue.rejects.filter(pl.col("source") == file)["line"])


def broken_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` cut short, with some bytes changed, taken out or put in, or other bytes altogether."""
    at = st.integers(0, len(content))
    some = st.binary(max_size=8) | st.sampled_from([b"\x00", *(bytes([c]) for c in b"\"\n\r,\t{}'"), b"\xff\xfe"])
    cut = at.map(lambda end: content[:end])
    put = st.builds(lambda start, put: content[:start] + put + content[start:], at, some)
    replaced = st.builds(lambda start, put: content[:start] + put + content[start + len(put) :], at, some)
    taken = st.builds(lambda start, n: content[:start] + content[start + n :], at, st.integers(1, 9))
    twice = st.builds(lambda start: content[:start] + content, at)
    return st.one_of(cut, put, replaced, taken, twice, st.binary(max_size=200))


FUZZ = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", DATASETS)
def test_sound_files_are_read_whole(name):
    catalogue = check(name, {})
    assert catalogue is not None
    assert catalogue.rejects.is_empty()
    assert catalogue.items.height >= 2
    assert catalogue.interactions.height >= 2


@pytest.mark.parametrize(("name", "file"), NAMES)
@FUZZ
@given(st.data())
def test_broken_bytes_are_read_rejected_or_refused(name, file, data):
    check(name, {file: data.draw(broken_bytes(DATASETS[name].files[file]))})


@pytest.mark.parametrize(("name", "file"), TEXT_NAMES)
@FUZZ
@given(st.data())
def test_of_broken_text_every_line_is_used_or_a_reject(name, file, data):
    content = data.draw(broken_bytes(plain(file, DATASETS[name].files[file])))
    catalogue = check(name, {file: packed(file, content)})
    if catalogue is None:
        return
    used, rejected = places(catalogue, file)
    there = lines_of(content)
    assert used | rejected <= set(range(1, content.count(b"\n") + 2))
    if "likes" in file:
        assert catalogue.items["attributes"].count() + len(rejected) >= len(there)
    elif b'"' not in content or ".json" in file:  # a quoted field goes on over lines
        unseen = there - used - rejected
        assert unseen <= ({min(there)} if ".json" not in file else set()), "only a header is neither"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**15, 10**40)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["None", "", "\x00", "a\ud800", "1e400", "<b>", "NaN", "5", "2020-01-01", "$3", "&#xD800;"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(("name", "file"), JSON_NAMES)
@settings(FUZZ, max_examples=25)
@given(st.data())
def test_a_record_of_any_values_is_used_or_a_reject_and_costs_no_other(name, file, data):
    content = plain(file, DATASETS[name].files[file])
    *before, last = content.splitlines(keepends=True)
    record = eval(last) if last.startswith(b"{'") else json.loads(last)
    keys = st.sampled_from([*record, "images", "details", "categories"]) | st.text(max_size=3)
    changed = record | data.draw(st.dictionaries(keys, values, max_size=4))
    for key in data.draw(st.lists(st.sampled_from(list(record)), max_size=3)):
        changed.pop(key, None)
    sound = check(name, {})
    catalogue = check(name, {file: packed(file, b"".join([*before, json.dumps(changed).encode()]))})
    assert sound is not None
    assert catalogue is not None
    used, rejected = places(catalogue, file)
    assert used | rejected == lines_of(content)
    for was, now in ((sound.items, catalogue.items), (sound.interactions, catalogue.interactions)):
        others = pl.col("line") < len(before) + 1
        assert now.filter(others, source=file).equals(was.filter(others, source=file))


@pytest.mark.parametrize(("name", "file"), NAMES)
def test_a_file_without_one_of_its_columns_is_read_or_names_it(name, file):
    content = plain(file, DATASETS[name].files[file])
    if file.endswith(".parquet"):
        frame = pl.DataFrame(pl.read_parquet(io.BytesIO(content)))
        for column in frame.columns:
            check(name, {file: parquet(frame.drop(column))})
    elif ".json" in file:
        records = [eval(line) if line.startswith(b"{'") else json.loads(line) for line in content.splitlines()]
        for column in records[0]:
            fewer = [{key: value for key, value in record.items() if key != column} for record in records]
            check(name, {file: packed(file, json_lines(fewer))})
    else:
        header, _, rest = content.partition(b"\n")
        check(name, {file: header[:4] + b"\n" + rest})
        check(name, {file: rest})


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, file in NAMES if file.endswith(".parquet")])
@FUZZ
@given(st.data())
def test_parquet_with_a_column_of_another_type_is_read_rejected_or_refused(name, file, data):
    frame = pl.DataFrame(pl.read_parquet(io.BytesIO(DATASETS[name].files[file])))
    column = data.draw(st.sampled_from(frame.columns))
    other = data.draw(
        st.sampled_from(
            [
                pl.Series([None] * frame.height, dtype=pl.Null),
                pl.Series([b"\xff\x00"] * frame.height, dtype=pl.Binary),
                pl.Series([2**62] * frame.height),
                pl.Series([float("nan")] * frame.height),
                pl.Series([True] * frame.height),
                pl.Series([[{"a": 1}]] * frame.height),
                pl.Series([{"a": [1]}] * frame.height),
                pl.Series(["x"] * frame.height, dtype=pl.Categorical),
                pl.Series([0] * frame.height).cast(pl.Duration("us")),
                pl.Series([0] * frame.height).cast(pl.Date),
                pl.Series([0] * frame.height).cast(pl.Time),
                pl.Series([1] * frame.height).cast(pl.Decimal(10, 2)),
            ]
        )
    )
    check(name, {file: parquet(frame.with_columns(other.alias(column)))})
