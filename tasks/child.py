"""One stage in a process of its own, for stages that hold a GPU or have a time limit.

A limit then ends even code that is stuck in C or CUDA, and the memory is free for the next stage. The parent sends one
line of JSON; the child answers with lines of counts and, at the end, the record or the error. What else it prints goes
to the parent's log. Whoever ends the parent ends the child too. Knows nothing of Prefect.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from queue import Empty, Queue
from typing import IO, Any

from mllmsrec_core import errors
from mllmsrec_core.errors import EngineError, MllmsrecError, UsageError
from mllmsrec_core.plan import cause
from tasks.active import active_first
from tasks.config import Options
from tasks.engines.scripted import MODEL as SCRIPTED
from tasks.runner import Counts, Elsewhere, How
from tasks.stage_task import STAGE_BY_NAME, draw_sample, gather, perform, standing
from tasks.work import Work, open_work

Outcome = tuple[dict[str, Any], bool]
"""A stage's record, and whether it was reused."""

GRACE_S = 20.0  # from SIGTERM, on which answers are flushed and engines closed, to SIGKILL
LAST_LINES = 15  # of what a dead child had printed, shown in the error
DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, CUDA under WSL: told without loading torch
NO_ENDPOINT = ("sft", "audit")  # training and CLIP run here whatever engine answers the others
INTERRUPTED = 130  # the exit code of a child that was asked to stop
# Stays in the child's process group and waits for the end of the parent; a thread could not, where C code holds the
# interpreter. Not `kill -TERM 0`: only the child itself knows how to stop its engines.
WATCH = 'cat >/dev/null; kill -TERM "$1"; sleep "$2"; kill -KILL "-$1"'


class StageTimeout(EngineError):
    """A stage was at work for longer than its limit. Everything answered is kept."""


@dataclass(frozen=True)
class Told:
    """What the task of one stage is told: the same in this process and in another."""

    config_json: str
    name: str
    stages: Mapping[str, Any]  # the records to read from
    before: Mapping[str, Any]  # those that the environment shows
    options: Options
    deadline: float | None = None  # seconds since the epoch after which no row is started
    elsewhere: Elsewhere | None = None  # what shards have asked just before

    def to_json(self) -> str:
        elsewhere = asdict(self.elsewhere) if self.elsewhere else None
        return json.dumps({**self.__dict__, "options": self.options.model_dump(mode="json"), "elsewhere": elsewhere})

    @classmethod
    def from_json(cls, text: str) -> Told:
        values = json.loads(text)
        values["options"] = Options.model_validate(values["options"])
        if elsewhere := values["elsewhere"]:
            values["elsewhere"] = Elsewhere(**{**elsewhere, "counts": Counts(**elsewhere["counts"])})
        return cls(**values)


def at_hand(told: Told) -> tuple[Work, How]:
    """What a stage, or a shard of it, works with in this process: for a sample narrowed to it."""
    work, options = open_work(told.config_json), told.options
    if options.sample and told.name != "ingest":
        work = draw_sample(work, told.stages, options.sample)
    rank = active_first(work, told.stages) if options.order == "active" else None
    return work, How(work.config.settings.window, frozenset(options.retry), deadline=told.deadline, rank=rank)


def carry_out(told: Told, progress: Callable[[str, Counts], None]) -> Outcome:
    """Run or reuse the stage in this process."""
    work, how = at_hand(told)
    how = replace(how, progress=progress, elsewhere=told.elsewhere)
    try:
        return perform(work, told.name, told.stages, how, told.before, told.options.retrain)
    except EngineError:
        work.engine_for.drop()  # whoever tries again opens a fresh one
        raise


def why_due(told: Told) -> str | None:
    """Why the stage is due, in words; empty where its record will be reused. Asks nothing and reads no table.

    None where only the stage itself can tell: what it reads lies outside the store and has to be listed, or a table is
    missing.
    """
    work, stage, last = open_work(told.config_json), STAGE_BY_NAME[told.name], told.before.get(told.name)
    if stage.outside or told.options.sample:
        return None
    with suppress(UsageError):
        _, now = gather(work, stage, told.stages, told.before)
        retry = bool(told.options.retry)
        if not retry and standing(work, stage, now, last, told.options.retrain):
            return ""
        return cause(now, last and last["parts"], retry=retry, coverage=(last or {}).get("coverage", 1.0))
    return None


def loads_model(work: Work, name: str) -> bool:
    """Whether the process that asks the stage's questions loads a model for them."""
    model = work.models.get(name)
    served = work.config.settings.engine == "openai" and name not in NO_ENDPOINT
    return model is not None and model.name != SCRIPTED.name and not served


def holds_gpu(work: Work, name: str) -> bool:
    """Whether the stage's engine would hold a GPU of this machine."""
    if not loads_model(work, name):
        return False
    settings = work.config.settings
    chosen = "auto" if settings.engine == "vllm" and name not in NO_ENDPOINT else settings.device
    return chosen.startswith("cuda") or (chosen == "auto" and _gpu_here())


def _gpu_here() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(os.path.exists(device) for device in DEVICES)


# --- the parent -----------------------------------------------------------------------------------------------------


def carry_out_apart(
    told: Told, minutes: float | None, progress: Callable[[str, Counts], None], log: Callable[[str], None]
) -> Outcome:
    """`carry_out` in a child, which is ended after so many `minutes`; `log` gets each line that it prints.

    Raises what the child raised, StageTimeout at the limit, and EngineError where it died.
    """
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    last: deque[str] = deque(maxlen=LAST_LINES)
    with _child(told, lambda line: (last.append(line), log(f"{told.name}: {line}"))) as (process, messages):
        answer = _answer(messages, ends, lambda counts: progress(told.name, Counts(**counts)))
        if answer is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            raise EngineError(_died(told.name, process.returncode, last))
        if answer.get("late"):
            raise StageTimeout(
                f"{told.name}: stopped after {minutes:g} minutes, the limit of `settings.stage_timeout_minutes`. "
                "Everything answered is kept: repeat the command to go on. If the stage was not stuck but has much to "
                f"do, add --set settings.stage_timeout_minutes={2 * (minutes or 0):g}"
            )
    open_work(told.config_json).store.replies.refresh()  # later stages may ask what the child has asked
    if "record" in answer:
        return answer["record"], answer["reused"]
    kind = getattr(errors, answer["error"] or "", None)
    raise kind(answer["message"]) if kind else RuntimeError(f"{told.name}: {answer['message']}")


def _answer(
    messages: Queue[dict[str, Any] | None], ends: float | None, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any] | None:
    """The child's last message; `late` once the time is over; None where the child ended without one."""
    while True:
        try:
            message = messages.get(timeout=None if ends is None else max(0.0, ends - time.monotonic()))
        except Empty:
            return {"late": True}
        if message is None or "counts" not in message:
            return message
        progress(message["counts"])


@contextmanager
def _child(
    told: Told, log: Callable[[str], Any]
) -> Iterator[tuple[subprocess.Popen[str], Queue[dict[str, Any] | None]]]:
    """A child at work and its messages, None after the last. At the end nothing of its process group is left."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tasks.child"],  # -P: a folder `tasks` where the user works is not ours
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on; and the group can be ended
    )
    assert process.stdin and process.stdout and process.stderr
    messages: Queue[dict[str, Any] | None] = Queue()
    readers = [
        threading.Thread(target=_read_messages, args=(process.stdout, messages), daemon=True),
        threading.Thread(target=_read_lines, args=(process.stderr, log), daemon=True),
    ]
    try:
        for reader in readers:
            reader.start()
        with suppress(BrokenPipeError):  # it died at once, and its messages end
            process.stdin.write(told.to_json() + "\n")
            process.stdin.flush()
        yield process, messages
    except BaseException:
        process.terminate()
        raise
    finally:
        _end(process)
        for reader in readers:
            reader.join(GRACE_S)


def _end(process: subprocess.Popen[str]) -> None:
    """Leave it the time to close its engines, then end whatever of its group is left."""
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()  # type: ignore[union-attr]


def _read_messages(pipe: IO[str], messages: Queue[dict[str, Any] | None]) -> None:
    with pipe:
        for line in pipe:
            if line.endswith("\n"):  # else it died as it wrote
                messages.put(json.loads(line))
    messages.put(None)


def _read_lines(pipe: IO[str], log: Callable[[str], Any]) -> None:
    with pipe:
        for line in pipe:
            if shown := line.rpartition("\r")[2].strip() or line.strip():  # of a bar drawn over itself, the last state
                log(shown)


def _died(name: str, code: int | None, last: deque[str]) -> str:
    how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    memory = " (mostly the system, out of memory: lower `settings.batch_size` or `settings.window`)"
    said = "\n".join(["", "It said last:", *last]) if last else ""
    return (
        f"{name}: its process ended {how}{memory if code == -signal.SIGKILL else ''} before the stage was done. "
        f"Everything answered is kept: repeat the command to go on.{said}"
    )


# --- the child ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Carry out what the first line of the standard input tells, and answer on the standard output."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)  # one line is one write
    os.dup2(2, 1)  # what libraries print is no message

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")

    told = Told.from_json(sys.stdin.readline())
    _end_with_parent()
    try:
        record, reused = carry_out(told, lambda _, counts: send(counts=asdict(counts)))
        send(record=record, reused=reused)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except MllmsrecError as error:
        send(error=type(error).__name__, message=str(error))
    except Exception:
        send(error=None, message=traceback.format_exc())
    finally:
        with suppress(MllmsrecError):
            open_work(told.config_json).engine_for.drop()


def _end_with_parent() -> None:
    """The parent keeps our standard input open for as long as it lives, however it dies."""
    subprocess.Popen(  # noqa: S603 - nothing in the words comes from outside
        ["/bin/sh", "-c", WATCH, "sh", str(os.getpid()), f"{GRACE_S:g}"],
        stdin=0,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main()
