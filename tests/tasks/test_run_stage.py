"""Nothing is asked twice, nothing is lost, and the order in which answers come changes nothing."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.ask import Embed, Fetch, Generate, Reply, key
from mllmsrec_core.errors import EngineError, StoreError, TooManyErrors
from storage.store import Store
from tasks import runner
from tasks.engines.scripted import ScriptedEngine
from tasks.run_stage import fingerprint, run_stage
from tasks.runner import How, run_rows

sys.path.append(str(Path(__file__).parent))  # other processes import it by name
import toy


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def again(store: Store) -> Store:
    """The same store as a new process opens it."""
    return Store(store.url)


def run(store: Store, rows: list[tuple[str, int]], engine: Any = None, **how: Any) -> tuple[list[dict], Any, Any]:
    """Finished rows, counts and the engine."""
    engine = engine or toy.Watched(store)
    stage = toy.stage(how.pop("ask", toy.ask), how.pop("longest_first", None))
    given = toy.inputs(toy.frame(rows), how.pop("max_error_rate", 1.0))
    units, counts = run_rows(stage, given, given["rows"], store, lambda _: engine, How(**how))
    return [row for unit in units for row in unit.rows], counts, engine


def texts(asks: list[Any]) -> list[str]:
    return [ask.messages[0].parts[0] for ask in asks if isinstance(ask, Generate)]


ROWS = [(f"user {n}", n % 4) for n in range(30)]


@pytest.mark.parametrize("window", [1, 2, 7, 1000])
def test_no_more_rows_are_in_flight_than_the_window_holds(store, window):
    _, counts, engine = run(store, ROWS, window=window)
    assert engine.peak == min(window, len(ROWS))
    assert counts.done == counts.rows == len(ROWS)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_rows_that_ask_the_same_ask_it_once(store, window):
    done, counts, engine = run(store, [("same", 2)] * 40, window=window)
    assert len(engine.started) == counts.asked == 3
    assert counts.known == 40 * 3 - 3
    assert all(row == done[0] for row in done)


def test_a_second_run_asks_nothing_and_finishes_the_same_rows(store):
    first, counts, _ = run(store, ROWS)
    second, repeated, engine = run(again(store), ROWS)
    assert second == first
    assert (engine.started, repeated.asked, repeated.known) == ([], 0, counts.asked + counts.known)


class Waiting(toy.Watched):
    """Answers "slow" only once "quick" has asked everything."""

    def __init__(self, store: Store, quick: int) -> None:
        super().__init__(store)
        self.quick, self.over = quick, asyncio.Event()

    async def answer(self, ask: Any) -> Reply:
        if texts([ask]) == ["slow"]:
            await asyncio.wait_for(self.over.wait(), 60)  # a barrier would wait for ever
        reply = await super().answer(ask)
        self.quick -= 1
        if not self.quick:
            self.over.set()
        return reply


def test_no_row_waits_for_the_step_of_another(store):
    done, _, _ = run(store, [("slow", 1), ("quick", 9)], Waiting(store, quick=10))
    assert [row["name"] for row in done] == ["slow", "quick"]


def test_the_longest_chains_start_first_and_rows_come_out_in_their_own_order(store):
    rows = [("a", 1), ("b", 3), ("c", 2), ("d", 3)]
    done, _, engine = run(store, rows, window=1, longest_first="n")
    starts = [text for text in texts(engine.started) if text in "abcd"]
    assert starts == ["b", "d", "c", "a"]
    assert [row["name"] for row in done] == ["a", "b", "c", "d"]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.randoms(use_true_random=False))
def test_the_order_in_which_answers_come_changes_nothing(turns, window, shuffle):
    expected, _, _ = run(Store(f"memory://{os.urandom(8).hex()}"), ROWS)
    store = Store(f"memory://{os.urandom(8).hex()}")
    known = ROWS[: shuffle.randrange(len(ROWS))]
    run(store, known, toy.Watched(store, turns), window=window)
    done, _, _ = run(again(store), ROWS, toy.Watched(store, turns), window=window)
    assert done == expected


def test_a_failed_question_is_a_row_of_its_own_and_is_counted(store):
    done, counts, _ = run(store, [("fine", 1), ("too long", 1), ("silent", 1), ("busy", 1)])
    assert [row["error"] for row in done] == [None, "context_too_long", "empty_reply", "passing"]
    assert (counts.failed, counts.passing, counts.done) == (3, 1, 4)
    assert counts.errors == {"context_too_long": 1, "empty_reply": 1, "passing": 1}


def test_only_trouble_that_passes_is_asked_again_unless_a_retry_says_so(store):
    rows = [("fine", 1), ("too long", 1), ("too long", 1), ("busy", 1)]
    run(store, rows)
    assert texts(run(again(store), rows)[2].started) == ["busy"]
    retried = run(again(store), rows, retry=frozenset({"context_too_long"}))[2]
    assert sorted(texts(retried.started)) == ["busy", "too long"]
    assert sorted(texts(run(again(store), rows, retry=frozenset({"all"}))[2].started)) == ["busy", "too long"]


def test_too_many_failed_rows_stop_the_stage_early_and_keep_every_answer(store):
    rows = [(f"user {n}", 1) for n in range(30)] + [(f"too long {n}", 1) for n in range(300)]
    engine = toy.Watched(store)
    with pytest.raises(TooManyErrors, match=r"toy: \d+ of \d+ rows failed \(context_too_long \d+\).*retry --stage toy"):
        run(store, rows, engine, window=4, max_error_rate=0.2)
    assert len(texts(engine.started)) < 150
    reopened = again(store)
    assert all(reopened.replies.get(ask, key(ask)) for ask in engine.answered)


def test_a_share_just_at_the_limit_is_allowed(store):
    rows = [("fine", 1), ("too long", 1)]
    assert run(store, rows, max_error_rate=0.5)[1].failed == 1
    with pytest.raises(TooManyErrors, match="1 of 2"):
        run(again(store), rows, max_error_rate=0.49)


class Dying(toy.Watched):
    async def answer(self, ask: Any) -> Reply:
        if len(self.answered) >= 20:
            raise EngineError("CUDA is out of memory")
        return await super().answer(ask)


def test_an_engine_that_dies_ends_the_run_as_itself_and_keeps_every_answer(store):
    engine = Dying(store)
    with pytest.raises(EngineError, match="out of memory"):
        run(store, ROWS, engine)
    reopened = again(store)
    assert all(reopened.replies.get(ask, key(ask)) for ask in engine.answered)
    _, counts, _ = run(reopened, ROWS)
    assert counts.done == len(ROWS)


@pytest.mark.parametrize("after", [0, 1])
def test_a_bug_in_a_stage_surfaces_as_itself_and_keeps_every_answer(store, after):
    def broken(inputs, row):
        for n in range(after):
            yield toy.say(row["name"], n)
        raise ZeroDivisionError("in the stage")

    engine = toy.Watched(store)
    with pytest.raises(ZeroDivisionError, match="in the stage"):
        run(store, ROWS, engine, ask=broken)
    reopened = again(store)
    assert all(reopened.replies.get(ask, key(ask)) for ask in engine.answered)


def test_a_disk_that_fills_while_engines_are_busy_ends_the_run(tmp_path, monkeypatch):
    store = Store(str(tmp_path / "store"), flush_seconds=0.01)

    class Endless(toy.Watched):
        async def answer(self, ask: Any) -> Reply:
            if texts([ask]) == ["endless"]:
                await asyncio.sleep(60)
            return await super().answer(ask)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="no space left"):
            run(store, [("endless", 1), ("fine", 1)], Endless(store))
    store.replies.flush()
    assert again(store).replies.get(toy.say("fine"), key(toy.say("fine")))


def test_rows_that_are_known_leave_the_loop_room_for_others(store):
    run(store, [(f"user {n}", 1) for n in range(2_000)])
    engine = toy.Watched(again(store))
    rows = [("new", 2), *((f"user {n}", 1) for n in range(2_000))]
    finished: list[int] = []

    def ask(inputs, row):
        done = yield from toy.ask(inputs, row)
        finished.append(row["n"])
        return done

    run(engine_store := again(store), rows, engine, ask=ask)
    assert finished.index(2) < 1_000, "the new row was starved until every known one was done"
    assert engine_store.replies


def test_vectors_are_the_same_whether_they_come_from_the_engine_or_from_the_store(store):
    seen = []

    def ask(inputs, row):
        reply = yield Embed(toy.MODEL, row["name"])
        seen.append(reply.value)
        return []

    run(store, [("a", 0)], ask=ask)
    run(again(store), [("a", 0)], ask=ask)
    assert seen[0] == seen[1]


class Fetching(ScriptedEngine):
    async def answer(self, ask: Any) -> Reply:
        return Reply({"sha256": self.blobs.put(b"picture"), "width": 1, "height": 1})


def test_a_retry_fetches_a_picture_whose_bytes_are_gone(store):
    def ask(inputs, row):
        reply = yield Fetch("u", "v")
        return [{**row, "error": reply.error}]

    fetch = {"engine": Fetching(store.blobs), "ask": ask}
    run(store, [("a", 0)], **fetch)
    (name,) = store.files.names("blobs")
    store.files.remove(name)
    assert run(again(store), [("a", 0)], **fetch)[1].asked == 0
    assert run(again(store), [("a", 0)], **fetch, retry=frozenset({"all"}))[1].asked == 1
    assert store.files.names("blobs") == [name]


def published(store: Store, rows: list[tuple[str, int]]) -> dict[str, Any]:
    engine = toy.Watched(store)
    return run_stage(
        store, toy.stage(), toy.inputs(toy.frame(rows)), {"rows": [list(row) for row in rows]}, lambda _: engine, How()
    )


def test_a_published_stage_leaves_a_record_that_points_at_whole_tables(store):
    record = published(store, ROWS)
    assert store.envs.record("toy", fingerprint({"rows": [list(row) for row in ROWS]})) == record
    pointer = record["tables"]["toys"]
    assert store.tables.whole("toys", pointer["write_id"])
    table = store.tables.read("toys", pointer["write_id"])
    assert len(table) == pointer["rows"] == len(ROWS)
    assert table["name"].is_sorted()


def test_lasting_failures_are_published_and_passing_ones_leave_the_stage_due(store):
    published(store, lasting := [("fine", 1), ("too long", 1)])
    assert store.envs.record("toy", fingerprint({"rows": [list(row) for row in lasting]}))
    published(store, passing := [("fine", 1), ("too long busy", 1), ("busy", 1)])
    assert store.envs.record("toy", fingerprint({"rows": [list(row) for row in passing]})) is None


def test_whoever_takes_finished_units_gets_each_once_in_lots_and_the_run_keeps_none(store, monkeypatch):
    monkeypatch.setattr(runner, "LOT", 7)
    lots: list[list[runner.Unit]] = []
    given = toy.inputs(toy.frame(ROWS))
    engine = toy.Watched(store)
    units, counts = run_rows(toy.stage(), given, given["rows"], store, lambda _: engine, How(), take=lots.append)
    assert (units, counts.done) == ([], len(ROWS))
    assert [len(lot) for lot in lots] == [7, 7, 7, 7, 2]
    taken = sorted((unit for lot in lots for unit in lot), key=lambda unit: unit.number)
    assert [row for unit in taken for row in unit.rows] == run(again(store), ROWS)[0]


def test_tables_are_the_same_in_however_many_lots_their_rows_were_finished(tmp_path, monkeypatch):
    digests = set()
    for lot in (1, 7, 2_000):
        monkeypatch.setattr(runner, "LOT", lot)
        record = published(Store(str(tmp_path / str(lot))), ROWS)
        digests.add(record["tables"]["toys"]["digest"])
    assert len(digests) == 1


def test_a_stage_with_no_rows_publishes_an_empty_table(store):
    record = published(store, [])
    assert store.tables.read("toys", record["tables"]["toys"]["write_id"]).is_empty()


def test_progress_is_told_to_whoever_listens(store):
    told = []
    run(store, ROWS, progress=lambda stage, counts: told.append((stage, counts.done, counts.rows)))
    assert told[-1] == ("toy", len(ROWS), len(ROWS))


def test_whoever_handled_sigterm_before_handles_it_after(store):
    def mine(*_: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        run(store, ROWS)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


# Processes of their own, forked from a server that has everything imported.


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return context


FLUSH_ROWS, CHAINS = 10, 40


def asked(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def started(processes: Any, tmp_path: Path, seconds: float) -> tuple[Any, Path]:
    log = tmp_path / "log"
    arguments = (str(tmp_path / "store"), str(log), seconds, FLUSH_ROWS, CHAINS)
    process = processes.Process(target=toy.work, args=arguments)
    process.start()
    return process, log


def finished(processes: Any, tmp_path: Path) -> str:
    process, log = started(processes, tmp_path, 0)
    process.join(60)
    assert process.exitcode == 0
    return Path(f"{log}.digest").read_text()


@pytest.fixture(scope="module")
def undisturbed(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, set[str]]:
    """The digest of a run that nothing disturbs, and the questions it asks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    digest = finished(processes, folder)
    assert len(asked(folder / "log")) == len(set(asked(folder / "log")))
    return digest, set(asked(folder / "log"))


def wait_for(condition: Any, process: Any) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.002)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_that_is_interrupted_keeps_every_answer_and_the_next_asks_the_rest(
    processes, tmp_path, undisturbed, name
):
    process, log = started(processes, tmp_path, 0.02)
    wait_for(lambda: len(asked(log)) >= 25, process)
    os.kill(process.pid, getattr(signal, name))
    process.join(60)
    assert process.exitcode == toy.INTERRUPTED
    assert 25 <= len(asked(log)) < len(undisturbed[1])
    assert finished(processes, tmp_path) == undisturbed[0]
    assert Counter(asked(log)) == Counter(undisturbed[1])


def test_a_run_killed_again_and_again_publishes_the_same_table(processes, tmp_path, undisturbed):
    chance, kills = random.Random(7), 0
    while kills < 12:
        process, log = started(processes, tmp_path, 0.005)
        enough = len(asked(log)) + chance.randrange(1, 16)
        wait_for(lambda log=log, enough=enough: len(asked(log)) >= enough, process)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join(60)
        if process.exitcode == 0:
            break
    assert kills >= 10
    assert finished(processes, tmp_path) == undisturbed[0]
    assert set(asked(log)) == undisturbed[1]
    assert len(asked(log)) - len(undisturbed[1]) <= kills * FLUSH_ROWS


def test_a_run_is_interrupted_even_where_everything_is_known(processes, tmp_path):
    log = tmp_path / "started"
    process = processes.Process(target=toy.work_on_what_is_known, args=(str(tmp_path / "store"), str(log), 20_000))
    process.start()
    wait_for(log.exists, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == toy.INTERRUPTED
