"""A stage in a process of its own does what it does here, and ends when it has to, however stuck it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mllmsrec_core.ask import Model
from mllmsrec_core.errors import EngineError, UsageError
from storage.store import Store
from tasks import child
from tasks.child import StageTimeout, Told, carry_out, carry_out_apart, holds_gpu, why_due
from tasks.config import Options
from tasks.runner import Counts, Elsewhere
from tasks.work import open_work

NEVER = 1e6  # seconds that an answer takes which is not waited for
PATIENCE_S = 120.0  # the machine may be busy with other things


def told(config: Any, records: dict[str, Any], name: str = "caption", **options: Any) -> Told:
    open_work.cache_clear()
    return Told(config.to_json(), name, records, records, Options(**options))


def apart(what: Told, minutes: float | None = None, progress: Any = lambda *_: None) -> Any:
    return carry_out_apart(what, minutes, progress, lambda line: None)


def child_of(parent: int) -> int | None:
    """The process that a parent has started for a stage."""
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in path.read_text().split():
            with suppress(OSError):
                if b"tasks.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
    return None


def until(what: Any) -> Any:
    """What `what` returns once it is true."""
    ends = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < ends
        time.sleep(0.02)
    return found


def gone(pid: int) -> bool:
    """Whether nothing of a process group is at work any more; the dead may not have been collected yet."""
    living = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            living += [stat] if int(group) == pid and state not in "ZX" else []
    return not living


def kept(config: Any) -> int:
    """Captions that a new process would find answered."""
    store = Store(config.settings.store)
    return sum(len(frame) for folder, frame in store.replies.scan() if "generate" in folder)


@pytest.fixture
def edited(small: Any) -> Any:
    """A configuration under which captions are due; answers become durable only when asked to."""
    slow = {"settings__flush_rows": 1_000_000, "settings__flush_seconds": 1e6, "settings__window": 1}
    return lambda **others: small(caption__prompt='"What is it?"', **slow, **others)


def test_a_stage_in_a_child_publishes_what_it_publishes_here_and_tells_its_progress(small, edited, ran):
    counts: list[Counts] = []
    record, reused = apart(told(edited(), ran), progress=lambda stage, count: counts.append(count))
    assert not reused
    assert counts[-1].asked == record["counts"]["asked"] == 24
    here, reused = carry_out(told(edited(), ran), lambda *_: None)
    assert reused and here == record
    assert apart(told(edited(), ran)) == (record, True)


def test_an_error_of_a_child_is_raised_as_what_it_is(small, edited, ran):
    with pytest.raises(UsageError, match="run what is upstream first"):
        apart(told(edited(), {}))
    broken = small(audit__model='"no/such-model"')
    with pytest.raises((EngineError, UsageError), match="no/such-model"):
        apart(told(broken, ran, "audit"))


def test_a_bug_in_a_child_shows_its_traceback(edited, ran):
    records = {**ran, "images": {**ran["images"], "tables": None}}
    with pytest.raises(RuntimeError, match="Traceback"):
        apart(told(edited(), records))


def test_a_stage_that_is_over_its_limit_is_ended_and_says_how_to_go_on(edited, ran):
    config = edited(settings__scripted_seconds=NEVER)
    with pytest.raises(StageTimeout, match=r"caption: stopped after 0.001 minutes.*stage_timeout_minutes=0.002"):
        apart(told(config, ran), minutes=0.001)
    assert child_of(os.getpid()) is None


def test_a_child_that_takes_no_signal_is_killed_after_the_grace(edited, ran, monkeypatch):
    monkeypatch.setattr(child, "GRACE_S", 0.5)
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(until(lambda: child_of(os.getpid())))
        os.kill(stopped[0], signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(StageTimeout):
        apart(told(edited(settings__scripted_seconds=NEVER), ran), minutes=0.02)
    thread.join()
    assert until(lambda: gone(stopped[0]))


def test_an_interrupted_parent_ends_its_child_which_keeps_what_was_answered(edited, ran):
    config, before = edited(settings__scripted_seconds=0.05), kept(edited())

    def interrupt(stage: str, counts: Counts) -> None:
        if counts.asked >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apart(told(config, ran), progress=interrupt)
    assert kept(config) - before >= 3
    assert child_of(os.getpid()) is None


def test_a_child_that_is_killed_is_an_engine_error_with_a_remedy(edited, ran):
    def kill(stage: str, counts: Counts) -> None:
        if pid := child_of(os.getpid()):
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(EngineError, match=r"(?s)ended by SIGKILL .*out of memory.*lower `settings.batch_size`"):
        apart(told(edited(settings__scripted_seconds=0.2), ran), progress=kill)


PARENT = """
import sys
from tasks.child import Told, carry_out_apart
def progress(stage, counts):
    if counts.asked >= 3:
        print(counts.asked, flush=True)
carry_out_apart(Told.from_json(sys.stdin.readline()), None, progress, lambda line: None)
"""


def test_a_parent_that_is_killed_leaves_no_child_and_no_answer_behind(edited, ran):
    config, before = edited(settings__scripted_seconds=0.05), kept(edited())
    words = [sys.executable, "-c", PARENT]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        parent.stdin.write(told(config, ran).to_json() + "\n")  # type: ignore[union-attr]
        parent.stdin.flush()  # type: ignore[union-attr]
        assert int(parent.stdout.readline()) >= 3  # type: ignore[union-attr]
        pid = child_of(parent.pid)
        parent.kill()
    assert pid
    assert until(lambda: not Path(f"/proc/{pid}").exists() or gone(pid))
    assert kept(config) - before >= 3


def test_what_a_child_is_told_arrives_as_it_was_sent(edited, ran):
    sent = replace(
        told(edited(), ran, sample=2, retry=("all",)),
        deadline=12.5,
        elsewhere=Elsewhere(Counts(asked=3, errors={"a": 1}), 1.5, 2),
    )
    assert Told.from_json(sent.to_json()) == sent


# --- who needs a child ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "holds"),
    [
        ("caption", {"device": "cuda"}, True),
        ("caption", {"device": "cuda:1"}, True),
        ("caption", {"device": "cpu"}, False),
        ("caption", {"device": "auto"}, True),
        ("caption", {"engine": "vllm", "device": "cpu"}, True),
        ("caption", {"engine": "openai", "device": "cuda"}, False),
        ("audit", {"engine": "openai", "device": "cuda"}, True),
        ("audit", {"engine": "vllm", "device": "cpu"}, False),
        ("images", {"device": "cuda"}, False),
    ],
)
def test_a_stage_holds_a_gpu_where_its_own_engine_would_run_on_one(small, monkeypatch, name, settings, holds):
    monkeypatch.setattr(child, "DEVICES", ("/dev/null",))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    work = open_work(small(**{f"settings__{key}": f'"{value}"' for key, value in settings.items()}).to_json())
    real = {stage: Model("org/model", "1") for stage in work.models}
    assert holds_gpu(replace(work, models=real), name) is holds
    assert holds_gpu(work, name) is False, "the scripted engine holds nothing"


def test_without_a_device_auto_is_no_gpu(small, monkeypatch):
    monkeypatch.setattr(child, "DEVICES", ())
    work = open_work(small().to_json())
    assert not holds_gpu(replace(work, models={"caption": Model("org/model", "1")}), "caption")


def test_a_stage_says_why_it_is_due_before_it_runs(small, edited, ran):
    assert why_due(told(small(), ran)) == ""
    assert why_due(told(edited(), ran)) == "prompt caption.prompt"
    assert why_due(told(small(), ran, retry=("all",))) is not None
    assert why_due(told(edited(), {name: ran[name] for name in ("ingest", "images")})) == "never run"
    assert why_due(told(edited(), ran, "images")) is None
    assert why_due(told(edited(), {})) is None
