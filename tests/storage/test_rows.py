"""Text is read by columns where that is sure, and record by record everywhere else, with the same result."""

import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import rows as module
from storage.rows import at_once, delimited, json_lines, one_by_one, quoted, unquoted


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text("ab1 .\t|é", max_size=4), min_size=1, max_size=4), max_size=12))
def test_both_ways_of_reading_a_csv_agree_where_there_is_no_quote(rows):
    text = "\n".join(["x,y", *(",".join(row) for row in rows)])
    (fast, fast_broken), (slow, slow_broken) = (read(text, ["x", "y"], ",") for read in (unquoted, quoted))
    assert fast.rows() == slow.rows()
    assert fast_broken == slow_broken
    filled = sum(1 for row in rows if ",".join(row))
    assert fast.height + len(fast_broken) == filled


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text('ab,"\n', max_size=8), max_size=12))
def test_no_line_of_any_csv_is_lost(lines):
    text = "\n".join(["x,y", *lines])
    read = delimited(text.encode(), ",", "a.csv")
    rows, broken = read.frame, read.broken
    kept = rows.select(n=1 + pl.sum_horizontal(pl.col("x", "y").str.count_matches("\n").fill_null(0)))["n"].sum()
    assert kept + len(broken) == sum(1 for line in text.split("\n")[1:] if line) + blank_lines_inside(rows)


def blank_lines_inside(rows):
    """Blank lines that stand inside a kept record; those between records count as nothing."""
    return (
        sum(
            sum(1 for line in f'{x or ""},"{y or ""}'.split("\n")[1:-1] if not line)
            for x, y in rows.select("x", "y").rows()
        )
        if rows.height
        else 0
    )


ODD = [
    b"", b" ", b"\r", b"null", b"[1]", b'"x"', b"broken", b'{"a": 1} x', b'{"a": 1}{"a": 2}', b'{"a": 1,}', b"{}", b'{"b": 1}',
    b'{"a": 1, "a": 2}', b'{"a": "x", "a": null}', b'{"\\u0061": "x", "a": 1}', b'{"a": NaN}', b'{"a": -Infinity}',
    b'{"a": 1e400}', b'{"a": 1e22}', b'{"a": 1E-7, "b": -0.0}', b'{"a": 4.0, "b": 0.10}', b'{"a": 5e-324}', b'{"a": "\\ud800x"}',
    b'{"a": "x\\udc00"}', b'{"a": "\\ud83d\\ude00"}', b'{"a": "\\ud800\\\\udc00"}', b'{"a": "caf\xff"}', b'{"a": "\\u0000"}',
    b'{"a": [1, "x"]}', b'{"a": {"b": [true, null]}}', b'{"a": "[New] mug"}', b'{"a": "tab\there"}', b'{"a": 01}', b"{'a': 1}",
    b'{"a": ' + b"[" * 100_000, b'{"c": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", b'{"a": 12345678901234567890123456789}',
    b'{"a": 1234567890123456789012345678901234567890}', b'{"a": ' + b"9" * 5_000 + b"}", b'{"a": true, "b": false}',
    b'{"a": "", "b": " "}', b'{"a": 1}\r', b'{"a": "x\\ny"}', b'{"line": 7, "a": 1}',
]  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.integers(10**17, 10**50) | st.floats() | st.text(max_size=6)
values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=2), scalars, max_size=2)
objects = st.dictionaries(st.sampled_from("abc") | st.text(max_size=2), values, max_size=4)
escaped, plain = objects.map(json.dumps), objects.map(lambda made: json.dumps(made, ensure_ascii=False))
lines = escaped.map(str.encode) | plain.map(lambda text: text.encode("utf-8", "surrogatepass"))


def read_once(content, wanted=("a", "b")):
    """One by one, whatever the content."""
    frame, broken, _ = one_by_one(content, 1, wanted)
    return frame.select(*wanted, "line").rows(), broken


def same(content):
    """Both ways agree, whether in one piece or in pieces of a few lines; the rows and the broken lines."""
    wanted, (rows, broken) = ("a", "b"), read_once(content)
    sure = at_once(content, 1, wanted)
    assert sure is None or (sure.select(*wanted, "line").rows(), []) == (rows, broken)
    for pieces in ([content], content.splitlines(keepends=True) if b"\r" not in content else [content]):
        read = json_lines([piece for piece in pieces if piece], wanted)
        assert (read.frame.rows(), read.broken) == (rows, broken)
        assert read.n_lines == module.n_lines(content)
    return rows, broken


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_json_line_is_read_alike_both_ways_and_costs_no_other(odd, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 30)
    good = b'{"a": "x", "b": 1}\n'
    rows, broken = same(good * 9 + odd + b"\n" + good * 9)
    assert [row for row in rows if row[-1] != 10] == [("x", "1", n) for n in range(1, 20) if n != 10]
    assert {line for line, _ in broken} <= {10}


@settings(max_examples=300, deadline=None)
@given(st.lists(lines | st.sampled_from(ODD[:-10]), max_size=8), st.sampled_from([0, 40, 1 << 16]))
def test_both_ways_of_reading_json_lines_agree(texts, small):
    before, module.SMALL = module.SMALL, small
    try:
        same(b"\n".join(texts))
    finally:
        module.SMALL = before


def test_sound_json_lines_are_read_at_once_and_only_the_odd_ones_one_by_one(monkeypatch):
    slow = []
    monkeypatch.setattr(
        module, "one_by_one", lambda piece, *others: slow.append(len(piece)) or one_by_one(piece, *others)
    )
    good = b"".join(b'{"a": "%d", "b": %d, "c": [1]}\n' % (n, n) for n in range(50_000))
    assert json_lines([good], {"a", "b"}).frame.height == 50_000 and not slow
    half = good.find(b"\n", len(good) // 2) + 1
    read = json_lines([good[:half] + b"broken\n" + good[half:]], {"a", "b"})
    assert 0 < sum(slow) <= module.SMALL
    assert read.frame.height == 50_000 and len(read.broken) == 1


def test_of_a_column_without_a_value_nothing_is_known():
    content = b'{"a": "x", "b": null}\n'
    assert json_lines([content], {"a", "b"}).known == {"a"}, "whoever asks has to look again"
    assert json_lines([content]).known == {"a", "b"}


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_the_same_number_as_text(value):
    [(said, _)] = json_lines([json.dumps({"a": value}).encode()], {"a"}).frame.rows()
    assert float(said) == value and "e" not in said and not said.endswith(".0")


@pytest.mark.parametrize("text", ['item,line\n"x",2\n', "item,line\nx,2\n"])
def test_a_column_that_is_called_line_gives_way_to_the_number_of_the_line(text):
    assert delimited(text.encode(), ",", "a.csv").frame.select("item", "line").rows() == [("x", 2)]


def test_a_lone_carriage_return_is_read_alike_with_and_without_a_quote_beside_it():
    plain, beside = (delimited(text.encode(), ",", "a.csv") for text in ("a,b\nx\ry,2\n", 'a,b\nx\ry,2\n"c",3\n'))
    assert [line for line, _ in plain.broken] == [line for line, _ in beside.broken]
    assert plain.frame.rows() == beside.frame.rows()[: plain.frame.height]
