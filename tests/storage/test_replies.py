"""Answers are permanent: which one holds never depends on who reads, when, or from how many files."""

from __future__ import annotations

import errno
import io
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.ask import Choose, Decoding, Embed, Fetch, Generate, Message, Model, Reply, key, render
from mllmsrec_core.errors import StoreError
from storage.files import Files
from storage.replies import ASKS, SCHEMA, Replies, encode, standing

MODEL = Model("m", "0" * 40)
OK, LASTING, PASSING = (
    Reply("yes"),
    Reply(error="context_too_long", detail="too long"),
    Reply(error="passing", passing=True),
)


def question(n: int = 0) -> Generate:
    return Generate(MODEL, (Message("user", (f"question {n}",)),), Decoding(9))


def given_answers(replies: Replies, *answers: Reply, ask: Generate | None = None) -> None:
    for answer in answers:
        replies.add(ask or question(), key(ask or question()), answer)


def read_back(files: Files, ask=None, retry: Iterable[str] = ()) -> Reply | None:
    """What a new process sees."""
    return Replies(files).get(ask or question(), key(ask or question()), frozenset(retry))


def parts(files: Files, folder: str = "replies") -> list[str]:
    return files.names(folder, ".parquet")


VALUES = [
    (question(), "Grüße «»\n\x00 🙂"),
    (Choose(MODEL, (), (("yes", ("yes",)),)), {"logprobs": {"yes": -0.1, "no": -math.inf}, "mass": 0.1 + 0.2}),
    (Embed(MODEL, "x"), [0.6, -0.8, 1e-30]),
    (Fetch("u", "v"), {"sha256": "ab", "width": 1, "height": 2}),
]


@pytest.mark.parametrize(("ask", "value"), VALUES, ids=lambda value: type(value).__name__)
def test_an_answer_reads_the_same_before_and_after_it_is_on_disk(files, ask, value):
    replies = Replies(files)
    reply = Reply(value, tokens_in=5, tokens_out=2, seconds=0.25, engine="e", detail="d")
    returned = replies.add(ask, key(ask), reply)
    fresh = replies.get(ask, key(ask))
    replies.flush()
    assert returned == fresh == read_back(files, ask)
    assert replace(returned, value=None) == replace(reply, value=None)
    assert returned.value == (value if not isinstance(ask, Embed) else pytest.approx(value))


def test_half_a_surrogate_pair_does_not_end_a_run(files):
    replies = Replies(files)
    assert replies.add(question(), key(question()), Reply("a\ud800b")).value == "a?b"


def test_what_was_never_answered_is_open(files):
    assert read_back(files) is None
    assert Replies(files).find(key(question())) is None
    assert Replies(files).question(key(question())) is None


def test_the_earliest_success_holds(files):
    replies = Replies(files)
    given_answers(replies, Reply("first"), Reply("second"), LASTING, PASSING)
    assert replies.get(question(), key(question())) == Reply("first")
    replies.flush()
    assert read_back(files) == Reply("first")


def test_a_success_holds_over_the_failures_before_it_and_the_latest_failure_over_others(files):
    replies = Replies(files)
    given_answers(replies, LASTING, Reply(error="empty_reply"))
    assert replies.get(question(), key(question())) == Reply(error="empty_reply")
    replies.flush()
    assert read_back(files) == Reply(error="empty_reply")
    given_answers(replies, OK)
    replies.flush()
    assert read_back(files) == OK


def test_of_two_writers_every_reader_takes_the_earlier(files):
    one, two = Replies(files), Replies(files)
    given_answers(one, Reply("one"))
    given_answers(two, Reply("two"))
    two.flush()
    one.flush()
    assert read_back(files) == Reply("one")


def test_the_newest_generation_holds(files):
    replies = Replies(files)
    for generation, text in ((0, "old"), (1, "new"), (0, "older writer")):
        replies.add(question(), key(question()), Reply(text), generation)
        replies.flush()
    assert replies.get(question(), key(question())) == Reply("new")
    assert read_back(files) == Reply("new")


def test_trouble_that_passes_is_never_an_answer_but_can_be_looked_up(files):
    replies = Replies(files)
    given_answers(replies, PASSING)
    assert replies.get(question(), key(question())) is None
    assert replies.find(key(question())) == ("generate", PASSING)
    replies.flush()
    assert read_back(files) is None


def test_lasting_trouble_is_an_answer_until_a_retry_names_its_class(files):
    replies = Replies(files)
    given_answers(replies, LASTING)
    replies.flush()
    assert read_back(files) == read_back(files, retry=["empty_reply"]) == LASTING
    assert read_back(files, retry=["context_too_long"]) is None
    assert read_back(files, retry=["all"]) is None


def test_a_retry_leaves_successes_alone(files):
    replies = Replies(files)
    given_answers(replies, OK)
    assert replies.get(question(), key(question()), frozenset({"all"})) == OK


answers = st.sampled_from([Reply("a"), Reply("b"), LASTING, Reply(error="empty_reply"), PASSING])
rounds = st.lists(st.tuples(st.integers(0, 2), answers, st.integers(0, 1), st.booleans()), max_size=12)


@settings(max_examples=30, deadline=None)
@given(rounds)
def test_the_process_that_asked_and_any_later_one_agree(steps):
    """Whatever is added, flushed and compacted in whatever order."""
    files = Files("memory://test-replies-agree")
    files.remove("")
    replies = Replies(files)
    for n, answer, generation, flush in steps:
        replies.add(question(n), key(question(n)), answer, generation)
        if flush:
            replies.flush()
    mine = [replies.get(question(n), key(question(n))) for n in range(3)]
    replies.flush()
    assert [read_back(files, question(n)) for n in range(3)] == mine
    replies.compact(most_parts=0)
    assert [read_back(files, question(n)) for n in range(3)] == mine
    assert [replies.get(question(n), key(question(n))) for n in range(3)] == mine


@given(
    st.permutations(range(6)),
    st.lists(st.tuples(answers, st.integers(0, 1), st.integers(0, 3)), min_size=6, max_size=6),
)
def test_the_answer_that_holds_does_not_depend_on_the_order_of_rows(order, drawn):
    rows = [
        {
            **{name: getattr(reply, name) for name in ("error", "detail", "passing", "tokens_in", "tokens_out")},
            "key": b"k",
            "value": encode("generate", reply.value),
            "generation": generation,
            "at": datetime(2024, 1, 1, tzinfo=UTC) + timedelta(microseconds=at),
        }
        for reply, generation, at in drawn
    ]
    frames = [pl.DataFrame([rows[n] for n in some], schema=SCHEMA) for some in (range(6), order)]
    assert standing(frames[0]).equals(standing(frames[1]))


def test_answers_become_durable_by_count(files):
    replies = Replies(files, flush_rows=3)
    for n in range(7):
        given_answers(replies, OK, ask=question(n))
    assert [read_back(files, question(n)) for n in range(7)] == [OK] * 6 + [None]
    replies.flush()
    assert read_back(files, question(6)) == OK


def test_answers_become_durable_by_age_of_the_oldest(files):
    patient, hasty = Replies(files, flush_seconds=3_600), Replies(files, flush_seconds=1e-9)
    for replies in (patient, hasty):
        replies.flush_if_old()
        given_answers(replies, OK, ask=question(replies is hasty))
        replies.flush_if_old()
    assert read_back(files, question(False)) is None
    assert read_back(files, question(True)) == OK


def test_nothing_is_written_when_nothing_waits(files):
    replies = Replies(files)
    replies.flush()
    replies.flush_if_old()
    replies.compact()
    assert parts(files) == []


def test_the_literal_question_is_kept_beside_its_answer(files):
    replies = Replies(files)
    given_answers(replies, OK)
    replies.flush()
    kept = Replies(files).question(key(question()))
    assert kept["messages"][0]["parts"] == ["question 0"]
    assert Replies(files).find(key(question())) == ("generate", OK)


def test_an_answer_is_found_by_its_key_in_the_process_that_looked_before_it_came(files):
    replies = Replies(files)
    assert replies.get(question(), key(question())) is None
    given_answers(replies, OK)
    replies.flush()
    assert replies.find(key(question())) == ("generate", OK)


def test_a_full_disk_loses_nothing_that_waits(tmp_path, monkeypatch):
    files = Files(str(tmp_path))
    replies = Replies(files, flush_rows=2)
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:  # the first file fits: its bytes, then its name in the folder
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        given_answers(replies, OK, ask=question(0))
        with pytest.raises(StoreError, match="no space left"):
            given_answers(replies, OK, ask=question(1))
        with pytest.raises(StoreError, match="no space left"):
            replies.flush()
    replies.flush()
    assert [read_back(files, question(n)) for n in range(2)] == [OK, OK]
    assert all(Replies(files).question(key(question(n))) for n in range(2))


def test_what_a_kill_left_half_written_is_ignored(tmp_path):
    files = Files(str(tmp_path))
    replies = Replies(files)
    given_answers(replies, OK)
    replies.flush()
    (whole,) = parts(files)
    torn = tmp_path / f"{whole}.0123.tmp"
    torn.write_bytes(files.read(whole)[:20])
    assert read_back(files) == OK
    replies.compact(most_parts=0)
    assert read_back(files) == OK


@pytest.mark.parametrize("damage", [lambda content: content[:40], lambda content: b"", lambda content: b"PAR1"])
def test_a_damaged_part_is_named_with_what_to_do(files, damage):
    replies = Replies(files)
    given_answers(replies, OK)
    replies.flush()
    (part,) = parts(files)
    files.write(part, damage(files.read(part)))
    with pytest.raises(StoreError, match=f"{part} cannot be read.*move it away"):
        read_back(files)


def test_a_part_without_our_columns_is_named(files):
    buffer = io.BytesIO()
    pl.DataFrame({"x": [1]}).write_parquet(buffer)
    files.write(f"replies/generate/{MODEL.slug}/part-x.parquet", buffer.getvalue())
    with pytest.raises(StoreError, match=r"part-x\.parquet cannot be read"):
        read_back(files)


def filled(files: Files, n: int) -> None:
    replies = Replies(files, flush_rows=1)
    for number in range(n):
        given_answers(replies, LASTING if number % 3 == 0 else Reply(f"answer {number}"), ask=question(number))


def test_compaction_merges_parts_and_changes_no_answer(files):
    filled(files, 12)
    before = [read_back(files, question(n)) for n in range(12)]
    assert Replies(files).compact() == 22
    assert len(parts(files)) == len(parts(files, "asks")) == 1
    assert [read_back(files, question(n)) for n in range(12)] == before
    assert all(Replies(files).question(key(question(n))) for n in range(12))
    assert Replies(files).compact() == 0


@pytest.mark.parametrize("removals", [0, 1, 5])
def test_a_compaction_killed_in_between_changes_no_answer(files, monkeypatch, removals):
    filled(files, 12)
    before = [read_back(files, question(n)) for n in range(12)]
    left = [removals]

    def killed(name: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        Files.remove(files, name)

    with monkeypatch.context() as killer:
        killer.setattr(files, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            Replies(files).compact()
    assert [read_back(files, question(n)) for n in range(12)] == before
    Replies(files).compact(most_parts=1)
    assert [read_back(files, question(n)) for n in range(12)] == before
    assert len(parts(files)) == 1


def test_reading_while_another_process_compacts_misses_nothing(tmp_path):
    url = str(tmp_path)
    filled(Files(url), 12)
    before = [read_back(Files(url), question(n)) for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(lambda: [read_back(Files(url), question(n)) for n in range(12)]) for _ in range(3)]
        merges = [pool.submit(Replies(Files(url)).compact) for _ in range(3)]
        assert [read.result() for read in reads] == [before] * 3
        assert all(merge.result() >= 0 for merge in merges)
    assert [read_back(Files(url), question(n)) for n in range(12)] == before


def test_questions_and_answers_have_the_schemas_other_tools_read(files):
    replies = Replies(files)
    given_answers(replies, OK)
    replies.flush()
    (part,), (asked,) = parts(files), parts(files, "asks")
    assert pl.read_parquet(io.BytesIO(files.read(part))).schema == SCHEMA
    rows = pl.read_parquet(io.BytesIO(files.read(asked)))
    assert rows.schema == ASKS
    assert rows["ask"].to_list() == [render(question())]
