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
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.ask import Choose, Decoding, Embed, Fetch, Generate, Message, Model, Reply, key, render
from mllmsrec_core.errors import StoreError
from storage import replies as replies_module
from storage.corrections import Correction, Corrections
from storage.files import Files
from storage.replies import ASKS, SCHEMA, SUBJECTS, Replies, Row, encode, holding, standing
from storage.shelf import Shelf

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


def decide(corrections: Corrections, action: Any, text: str | None = None, ask: Generate | None = None) -> None:
    made = Correction(action, text, "somebody", datetime.now(UTC), "because")
    corrections.write([(key(ask or question()), "caption", made)])


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


def test_an_answer_asked_again_holds_over_the_old_one_whoever_writes_later(files):
    corrections = Corrections(files)
    old, new = Replies(files), Replies(files, corrections=corrections)
    given_answers(old, Reply("old"))
    old.flush()
    decide(corrections, "reask")
    given_answers(new, Reply("new"))
    new.flush()
    given_answers(old, Reply("by a writer that has not heard of it"))
    old.flush()
    for replies in (old, new, Replies(files)):
        replies.refresh()
        assert replies.get(question(), key(question())) == Reply("new")


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
actions = st.sampled_from(["", "", "", "flush", "compact", "refresh", "reask"])
rounds = st.lists(st.tuples(st.integers(0, 2), answers, actions), max_size=12)


@settings(max_examples=30, deadline=None)
@given(rounds)
def test_the_process_that_asked_and_any_later_one_agree(steps):
    """Whatever is added, flushed, compacted and asked again in whatever order, point by point or in columns."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Shelf, "spill_rows", 3)
        files = Files("memory://test-replies-agree")
        files.remove("")
        corrections = Corrections(files)
        replies, keys = Replies(files, corrections=corrections), [key(question(n)) for n in range(3)]
        for n, answer, action in steps:
            replies.add(question(n), keys[n], answer)
            if action == "reask":
                decide(corrections, "reask", ask=question(n))
            elif action:
                getattr(replies, action)()
        mine = [replies.get(question(n), keys[n]) for n in range(3)]
        for finish in ("", "flush", "compact"):
            if finish:
                getattr(replies, finish)(*([0] * (finish == "compact")))
            later = [Replies(files, corrections=Corrections(files))] if finish else []
            for reader in (replies, *later):
                assert [reader.get(question(n), keys[n]) for n in range(3)] == mine
                closed = reader.known("generate", MODEL.slug, pl.Series(keys))
                assert closed.to_list() == [reply is not None for reply in mine]
                assert reader.replies(keys) == {name: found for name in keys if (found := reader.find(name))}


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
    held = holding([Row._make(row) for row in frames[1].iter_rows()])
    assert [held] * (held is not None) == [Row._make(row) for row in standing(frames[0]).iter_rows()]


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
    kept = Replies(files).question(key(question())) or {}
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
    assert Replies(files).compact() == 24
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


def test_long_rows_leave_level_0_before_short_ones(files, monkeypatch):
    monkeypatch.setattr(Shelf, "spill_rows", 64)
    replies, asks = Replies(files), [Embed(MODEL, str(n)) for n in range(12)]
    for n, ask in enumerate(asks):
        replies.add(ask, key(ask), Reply([1.0, 0.0]))
        given_answers(replies, OK, ask=question(n))
    replies.compact()
    spread = {
        folder: all(name.count("/") == 4 for name in parts(files, f"replies/{folder}"))
        for folder in ("embed", "generate")
    }
    assert spread == {"embed": True, "generate": False}
    assert all(replies.get(ask, key(ask)) for ask in asks)


def test_two_writers_on_one_store_see_each_others_answers_after_a_refresh(files, monkeypatch):
    monkeypatch.setattr(Shelf, "spill_rows", 10)
    one, two = Replies(files), Replies(files)
    for start in (0, 8, 16):
        for n in range(start, start + 8):
            assert one.get(question(n), key(question(n))) is None
            given_answers(two, Reply(f"answer {n}"), ask=question(n))
        two.compact() if start else two.flush()
        assert not any(one.get(question(n), key(question(n))) for n in range(start, start + 8))
        one.refresh()
        found = [one.get(question(n), key(question(n))) for n in range(start + 8)]
        assert found == [Reply(f"answer {n}") for n in range(start + 8)]


def test_a_question_that_passed_can_be_looked_up_by_a_later_process_and_stays_open(files):
    replies = Replies(files)
    given_answers(replies, PASSING)
    replies.flush()
    assert Replies(files).find(key(question())) == ("generate", PASSING)
    assert not Replies(files).known("generate", MODEL.slug, pl.Series([key(question())])).any()


def test_a_long_run_compacts_what_it_writes_and_changes_no_answer(files, monkeypatch):
    monkeypatch.setattr(Shelf, "spill_rows", 10)
    replies = Replies(files, flush_rows=1)
    for n in range(25):
        given_answers(replies, Reply(f"answer {n}"), ask=question(n))
    loose = [part for part in parts(files, f"replies/generate/{MODEL.slug}") if part.count("/") == 3]
    assert len(loose) < 12
    for reader in (replies, Replies(files)):
        assert [reader.get(question(n), key(question(n))) for n in range(25)] == [
            Reply(f"answer {n}") for n in range(25)
        ]


def test_questions_and_answers_are_found_for_many_keys_at_once(files):
    replies = Replies(files)
    for ask, value in VALUES:
        replies.add(ask, key(ask), Reply(value))
    replies.flush()
    given_answers(replies, LASTING, ask=question(1))  # not durable yet
    keys = [*(key(ask) for ask, _ in VALUES), key(question(1))]
    for reader in (replies, Replies(files)):
        assert reader.replies([*keys, b"?" * 32]) == {name: found for name in keys if (found := reader.find(name))}
        assert reader.questions(keys) == {name: asked for name in keys if (asked := reader.question(name))}
    assert replies.replies(keys).keys() == set(keys)
    assert replies.questions(keys).keys() == set(keys[:-1])
    assert replies.replies([]) == replies.questions([]) == {}


def test_what_is_closed_is_told_in_the_order_of_the_keys_for_one_model_alone(files):
    replies = Replies(files)
    for n, answer in enumerate((OK, LASTING, PASSING)):
        given_answers(replies, answer, ask=question(n))
    keys = pl.Series([key(question(n)) for n in (2, 1, 7, 0, 1)])
    for closed in (replies, replies.flush() or Replies(files)):
        assert closed.known("generate", MODEL.slug, keys).to_list() == [False, True, False, True, True]
        assert not closed.known("generate", "another@0", keys).any()
        assert not closed.known("choose", MODEL.slug, keys).any()
        assert closed.known("generate", MODEL.slug, keys.clear()).is_empty()


OVERRULED = [("replace", Reply("better", engine="correction")), ("ban", Reply(error="banned", detail="because"))]


@pytest.mark.parametrize("stored", [None, OK, LASTING, PASSING], ids=["open", "ok", "lasting", "passing"])
@pytest.mark.parametrize(("action", "answer"), OVERRULED, ids=["replace", "ban"])
def test_a_correction_is_read_before_the_reply_and_opened_by_no_retry(files, action, answer, stored):
    corrections = Corrections(files)
    replies, name = Replies(files, corrections=corrections), key(question())
    given_answers(replies, *([stored] if stored else []))
    decide(corrections, "reask")
    decide(corrections, action, "better")
    assert replies.get(question(), name, frozenset({"all"})) == answer
    assert replies.known("generate", MODEL.slug, pl.Series([name])).all()
    assert replies.find(name) == (("generate", answer) if stored else None)
    assert replies.replies([name]) == ({name: ("generate", answer)} if stored else {})
    assert replies.given(name) == (("generate", stored) if stored else None)


def test_a_question_asked_again_is_open_until_it_is_answered_anew(files):
    corrections = Corrections(files)
    replies, name = Replies(files, corrections=corrections), key(question())

    def closed() -> list[bool]:
        return replies.known("generate", MODEL.slug, pl.Series([name])).to_list()

    given_answers(replies, Reply("first"))
    replies.flush()
    decide(corrections, "replace", "better")
    for text in ("second", "third"):
        held = replies.given(name)
        decide(corrections, "reask")
        assert replies.get(question(), name) is None and closed() == [False]
        assert replies.find(name) == held
        given_answers(replies, Reply(text))
        assert replies.get(question(), name) == Reply(text) and closed() == [True]
        replies.flush()
        assert replies.get(question(), name) == Reply(text) and closed() == [True]


USER, ITEM, OTHER = b"u" * 16, b"i" * 16, b"o" * 16


def test_subjects_are_written_at_every_use_and_once_per_process(files):
    replies = Replies(files, flush_seconds=1e-9)
    for _ in range(2):
        replies.used(key(question()), [USER, ITEM])
        replies.flush_if_old()
    (part,) = parts(files, "subjects")
    rows = pl.read_parquet(io.BytesIO(files.read(part)))
    assert rows.schema == SUBJECTS
    assert set(rows.iter_rows()) == {(key(question()), USER), (key(question()), ITEM)}
    assert parts(files) == parts(files, "asks") == []


def test_subjects_of_many_questions_are_not_kept_waiting(files, monkeypatch):
    monkeypatch.setattr(replies_module, "SUBJECT_ROWS", 10)
    monkeypatch.setattr(replies_module, "PAIRS_REMEMBERED", 20)
    replies = Replies(files)
    for n in range(100):
        replies.used(key(question(n)), [USER])
    assert Replies(files).keys_of(USER) == sorted(key(question(n)) for n in range(100))


def test_nothing_is_written_of_an_answer_before_whom_it_is_about(files, monkeypatch):
    written = []
    monkeypatch.setattr(files, "write", lambda name, content: written.append(name) or Files.write(files, name, content))
    replies = Replies(files)
    replies.used(key(question()), [USER])
    given_answers(replies, OK)
    replies.flush()
    assert [name.split("/")[0] for name in written] == ["subjects", "asks", "replies"]


def test_a_failed_write_keeps_the_subjects_that_wait(files, monkeypatch):
    replies = Replies(files)
    replies.used(key(question()), [USER])

    def full(name: str, content: bytes) -> None:
        raise StoreError("no space left")

    with monkeypatch.context() as disk:
        disk.setattr(files, "write", full)
        with pytest.raises(StoreError):
            replies.flush()
    replies.flush()
    assert Replies(files).keys_of(USER) == [key(question())]


def about(replies: Replies) -> list[bytes]:
    """Question 0 is about a user, 1 about that user and another, 2 about the other; every one about an item."""
    keys = [key(question(n)) for n in range(3)]
    for n, subjects in enumerate(([USER], [USER, OTHER], [OTHER])):
        given_answers(replies, Reply(f"answer {n}"), ask=question(n))
        replies.used(keys[n], [*subjects, ITEM])
    return keys


def test_the_questions_of_a_subject_are_found_and_which_of_them_others_share(files):
    replies = Replies(files)
    keys = about(replies)
    assert replies.keys_of(USER) == sorted(keys[:2])
    assert replies.keys_of(b"?" * 16) == []
    assert replies.shared(keys, ITEM) == set(keys)
    assert replies.remove_subjects([ITEM]) == 3
    assert Replies(files).shared(keys[:2], USER) == {keys[1]}
    assert Replies(files).shared(keys[:1], USER) == set()


@pytest.mark.parametrize("spill", [10**6, 0])
def test_what_is_removed_is_nowhere_in_the_store_and_the_rest_stays(files, monkeypatch, spill):
    monkeypatch.setattr(Shelf, "spill_rows", spill)
    replies = Replies(files)
    keys = about(replies)
    replies.compact()
    given_answers(replies, Reply("a later answer"), ask=question(1))
    assert replies.remove(keys[:2]) == {"replies": 3, "asks": 3, "subjects": 5}
    for reader in (replies, Replies(files)):
        assert reader.questions(keys).keys() == reader.replies(keys).keys() == {keys[2]}
        assert reader.get(question(1), keys[1]) is None
        assert reader.keys_of(ITEM) == [keys[2]]
    left = {folder: set(piece["key"]) for folder, piece in Replies(files).scan()}
    assert left == {"asks/generate": {keys[2]}, f"replies/generate/{MODEL.slug}": {keys[2]}, "subjects": {keys[2]}}
    content = b"".join(piece.write_ipc(None).getvalue() for _, piece in Replies(files).scan())
    assert keys[2] in content and keys[0] not in content
    assert files.names("replies") == parts(files)
