"""The demo by each model engine in turn, stage by stage: what they say, where they part and why, and what each costs.

Run: python -m benchmarks.engines [--items N] [--users N] [--set key=value ...]. Each engine fills a store of its own, from
pictures to scores, reading only what it wrote itself; the adapter alone is one for all, trained by the transformers side
and handed on. vLLM runs in this environment, or in `.venv-vllm` where `make test-vllm` made it; `openai` asks vLLM's
server on loopback. Without vLLM the transformers engine is measured alone. Where texts differ, the transformers model
says how far apart the two tokens lay at which they part. Of scoring, in both layouts, the tokens computed are held
against the least an endless cache would leave: beginnings once for transformers, whole blocks of them once for vLLM.
CPU seconds are those of all processes of a side; OMP_NUM_THREADS is 1 unless it is set.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import psutil
import torch

from flows.settings import load
from mllmsrec_core.ask import Choose, Message, Picture, key, pictures_in
from mllmsrec_core.errors import AskError
from mllmsrec_core.prefixes import common
from mllmsrec_core.stages import sft
from storage.store import Store
from tasks.engines.chat import Chat
from tasks.engines.checkpoint import open_checkpoint
from tasks.loop import ENGINE_LOOP
from tasks.runner import How
from tasks.stage_task import STAGE_BY_NAME, gather, perform
from tasks.work import Work, open_work

ROOT = Path(__file__).parents[1]
ENGINES = ("transformers", "vllm", "openai")
FIRST, OTHER = "user_first", "image_first"  # layouts of score; the first is the profile's
STAGES = ("ingest", "images", "caption", "summary", "preference", "examples", "sft", "score")  # CLIP answers audit
TEXTS = {  # table -> what its rows are about, the text in it
    "captions": (("sha256",), "caption"),
    "item_summaries": (("item_id",), "summary"),
    "preferences": (("user_id", "step"), "preference"),
}
PAIR = ("user_id", "split", "target_seq", "item_id")
BLOCK = 32  # tokens: the smallest block of vLLM's CPU build, and prompts of the demo have some 60
KV_BYTES = 1 << 29  # the embedded model needs 4 kB a token in float32: all different blocks of the scoring
SERVER_S = 300  # to start
SHOWN = 5  # differing rows
# As in `make test-vllm`: compiling takes longer than it saves here, and cores may be shared.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


# --- one side -------------------------------------------------------------------------------------------------------


class Side:
    """One engine's run: its stages, the seconds each took, and the tokens that scoring read."""

    def __init__(self, engine: str, folder: Path, sets: Sequence[str]) -> None:
        self.engine, self.folder, self.sets = engine, folder, list(sets)
        self.seconds: dict[str, tuple[float, float]] = {}  # wall, CPU
        self.read: dict[str, tuple[int, int, int]] = {}  # layout -> tokens of its prompts, those computed, the least

    def work(self, layout: str = FIRST, **settings: Any) -> Work:
        """The demo in this side's store, scored in `layout`."""
        vllm = {"kv_cache_memory_bytes": KV_BYTES, "block_size": BLOCK}
        mine = {"store": str(self.folder / self.engine), "engine": self.engine, "vllm": vllm, "eager": True, **settings}
        config = load(["demo"], [*self.sets, f'score.layout="{layout}"'], {})
        return open_work(replace(config, settings=config.settings.model_copy(update=mine)).to_json())

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began, used = time.perf_counter(), cpu_seconds()
        yield
        wall, cpu = self.seconds.get(name, (0.0, 0.0))
        self.seconds[name] = (wall + time.perf_counter() - began, cpu + cpu_seconds() - used)

    def run(self) -> dict[str, Any]:
        """Every stage, then score in the other layout; what was measured, and the records, as JSON."""
        made: dict[str, Any] = {}
        with contextlib.ExitStack() as until_end:
            work = self.work()
            if self.engine == "openai":
                with self.timed("start"):
                    url = until_end.enter_context(served(self.folder, work))
                work = self.work(endpoints=(url,), adapter_folder=str(self.folder / "adapters"))
            for name in STAGES:
                made[name] = self.stage(work, name, made)
            # As many tokens without the adapter, which at rank 32 costs vLLM's CPU build some 30 times the rest.
            bare = {**made, "sft": published(work.store, made["sft"], sft.Adapters.create_empty())}
            self.stage(replace(self.work(OTHER), engine_for=work.engine_for), "score", bare)
            work.engine_for.drop()
        return {"seconds": self.seconds, "records": made, "read": self.read}

    def stage(self, work: Work, name: str, made: Mapping[str, Any]) -> dict[str, Any]:
        """The record of one stage. What it asks is opened before its clock starts."""
        if name == "sft" and self.engine != "transformers":
            return self.handed_on(work)
        layout = work.params["score"].layout
        if name in ("caption", "score"):
            with self.timed("start" if name == "caption" else "start of score"):
                warm(work, name, made)
        before = computed(work, made) if name == "score" else 0
        with self.timed(name if layout == FIRST else f"{name}, {layout}"):
            record, _ = perform(work, name, made, How(window=work.config.settings.window), {}, False)
        if name == "score":
            sequences, block = prompts(work, made), 1 if self.engine == "transformers" else BLOCK
            self.read[layout] = sum(map(len, sequences)), computed(work, made) - before, least(sequences, block)
        return record

    def handed_on(self, work: Work) -> dict[str, Any]:
        """The record of the transformers side's sft, with its table and adapter put into this store."""
        theirs = Store(str(self.folder / "transformers"))
        record = json.loads((self.folder / "transformers.json").read_text())["records"]["sft"]
        frame = theirs.tables.read("adapters", record["tables"]["adapters"]["write_id"])
        for adapter in frame["sha256"].drop_nulls():
            work.store.blobs.put(theirs.blobs.get(adapter))
        return published(work.store, record, frame)


def published(store: Store, record: dict[str, Any], adapters: pl.DataFrame) -> dict[str, Any]:
    """The record of sft, with `adapters` as its table in this store."""
    here = store.tables.publish("adapters", adapters, {})
    return {**record, "tables": {"adapters": {"write_id": here.write_id, "digest": here.digest, "rows": here.rows}}}


def cpu_seconds() -> float:
    """Of this process and all below it, those that have ended included."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # own user and system, and those of children waited for
    return total


def questions(work: Work, name: str, made: Mapping[str, Any]) -> Iterator[Any]:
    """The first question of each row of a stage, in order."""
    stage = STAGE_BY_NAME[name]
    inputs, _ = gather(work, stage, made)
    assert stage.ask is not None
    for row in stage.rows(inputs).iter_rows(named=True):
        yield next(stage.ask(inputs, row))


def warm(work: Work, name: str, made: Mapping[str, Any]) -> None:
    """Have the engine open what the stage asks, by a question that the stage does not ask."""
    ask = next(questions(work, name, made))
    shown = tuple(pictures_in(ask.messages))
    with contextlib.suppress(AskError):  # no word is an answer too
        question = replace(ask, messages=(Message("user", ("Are you ready?", *shown)),))
        ENGINE_LOOP.run(work.engine_for(question).answer(question))


def computed(work: Work, made: Mapping[str, Any]) -> int:
    """Tokens that the engine of score has computed so far; for a server, those of prompts that it does not call cached."""
    engine: Any = work.engine_for(next(questions(work, "score", made)))
    if hasattr(engine, "tokens_computed"):  # what a first batch reads twice, to compare, included
        return engine.tokens_computed
    counts = engine.counters()
    return counts["prompt_tokens"] - counts.get("reused_tokens", 0)


def prompts(work: Work, made: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The tokens of each different question of score, a picture's as often as the model reads them."""
    front, _ = open_checkpoint(work.models["score"], work.engine_for.locations, "cpu")
    chat, found = Chat(front, work.store.blobs, "score"), []
    asks = {key(ask): ask for ask in questions(work, "score", made) if isinstance(ask, Choose)}
    for name, ask in asks.items():
        reply, marks = work.store.replies.get(ask, name), chat.marks(ask.messages)
        assert reply is not None
        pieces = reply.tokens_in - len(marks) + 1  # of the one picture, if there is one
        found.append(tuple(mark for one in marks for mark in ((one,) * pieces if one < 0 else (one,))))
    return found


def least(sequences: Sequence[tuple[int, ...]], block: int) -> int:
    """Tokens that must be computed of different prompts, with an endless cache of whole blocks of `block` tokens.

    The block with a prompt's last token is computed in any case, and is there for others if it is whole.
    """
    total, kept, before = 0, 0, ()
    for sequence in sorted(sequences):
        held = (len(sequence) - 1) // block  # blocks that can be found in the cache
        total += len(sequence) - held * block
        shared = min(common(before, sequence) // block, held)
        kept += held - shared
        before = sequence
    return total + kept * block


@contextlib.contextmanager
def served(folder: Path, work: Work) -> Iterator[str]:
    """vLLM's server with the model of `work` on loopback: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = work.models["score"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
               "--model", work.engine_for.locations[model.slug], "--served-model-name", model.name,
               "--dtype", model.dtype, "--enforce-eager", "--block-size", str(BLOCK),
               "--kv-cache-memory-bytes", str(KV_BYTES), "--enable-lora", "--max-lora-rank", str(work.params["sft"].rank),
               "--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--disable-uvicorn-access-log",
               "--enable-prompt-tokens-details"]  # fmt: skip
    with (folder / "server.log").open("wb") as log:
        flags = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        server = subprocess.Popen(command, env=flags, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, folder / "server.log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # its children would outlive it
            server.wait(60)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SERVER_S
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.2)
    sys.exit(f"vLLM's server did not start:\n{log.read_text()[-4000:]}")


# --- side by side ---------------------------------------------------------------------------------------------------


class Told:
    """What one side published."""

    def __init__(self, engine: str, folder: Path) -> None:
        self.engine, self.store = engine, Store(str(folder / engine))
        told = json.loads((folder / f"{engine}.json").read_text())
        self.seconds, self.read, self.records = told["seconds"], told["read"], told["records"]

    def table(self, name: str) -> pl.DataFrame:
        pointer = next(record["tables"][name] for record in self.records.values() if name in record["tables"])
        return self.store.tables.read(name, pointer["write_id"])


def compare_texts(ours: Told, theirs: Told, judge: Judge) -> None:
    for table, (about, column) in TEXTS.items():
        columns = [*about, column, "ask", "error"]
        both = ours.table(table).select(columns).join(theirs.table(table).select(columns), on=about, suffix="_theirs")
        apart = both.filter(pl.col(column).ne_missing(pl.col(f"{column}_theirs")))
        same = apart.filter(pl.col("ask") == pl.col("ask_theirs"))
        failed = both["error"].count() + both["error_theirs"].count()
        print(f"  {table:<15} {1 - len(apart) / max(1, len(both)):8.2%} of {len(both):,} equal; {len(apart)} differ, "
              f"{len(same)} of them asked the same; {failed} failed")  # fmt: skip
        gaps = [judge.gap(ours.store, *row) for row in same.select("ask", column, f"{column}_theirs").iter_rows()]
        for gap, place, one, other in gaps[:SHOWN]:
            print(f"      part at token {place}: {one!r} or {other!r}, {gap:.2e} nats between them")
        if gaps:
            print(f"      at most {max(gap for gap, *_ in gaps):.2e} nats lay between the tokens at which texts part")


def compare_scores(ours: Told, theirs: Told) -> None:
    columns = [*PAIR, "p_yes", "mass", "ask"]
    both = ours.table("scores").select(columns).join(theirs.table("scores").select(columns), on=PAIR, suffix="_theirs")
    same = both.filter(pl.col("ask") == pl.col("ask_theirs"))
    for name, rows in (("all rows", both), ("asked the same", same)):
        far = (rows["p_yes"] - rows["p_yes_theirs"]).abs().drop_nulls()
        mass = (rows["mass"] - rows["mass_theirs"]).abs().max()
        if len(far):
            print(f"  p_yes, {name:<15} {len(far):>7,} of {len(rows):,}: apart by at most {far.max():.1e}, for 99 % at most "
                  f"{far.quantile(0.99):.1e}, {(far > 0.02).sum()} above 0.02; mass by at most {mass:.1e}")  # fmt: skip


class Judge:
    """The transformers network in float32, to say how near two texts were where they part."""

    def __init__(self, work: Work) -> None:
        model = replace(work.models["caption"], dtype="float32")
        self.front, self.network = open_checkpoint(model, work.engine_for.locations, "cpu")

    def gap(self, store: Store, name: bytes, text: str | None, other: str | None) -> tuple[float, int, str, str]:
        """Nats between the two tokens at which the answers to the Ask `name` part, their place from 0, and the tokens.

        Places are those of the texts as the tokenizer cuts them.
        """
        asked = store.replies.question(name) or {}
        chat = Chat(self.front, store.blobs, "judge")
        one, two = ([*chat.ids(words or ""), chat.tokenizer.eos_token_id] for words in (text, other))
        place = common(one, two)
        turns = [
            Message(turn["role"], tuple(part if isinstance(part, str) else Picture(**part) for part in turn["parts"]))
            for turn in asked["messages"]
        ]
        tensors = chat.encode([chat.prompt(turns, asked["model"]["max_pixels"])], None).tensors
        ids = torch.cat([tensors["input_ids"], torch.tensor([one[:place]], dtype=torch.long)], dim=1)
        with torch.inference_mode():
            read = self.network(**{**tensors, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
        logs = read.logits[0, -1].log_softmax(-1)
        words = [chat.tokenizer.convert_ids_to_tokens(tokens[place]) for tokens in (one, two)]
        return abs(float(logs[one[place]] - logs[two[place]])), place, words[0], words[1]


def show_costs(sides: Sequence[Told]) -> None:
    print("wall and CPU seconds; ratios are CPU seconds of transformers to those of the engine")
    print(f"  {'':<20}" + "".join(f"{side.engine:>30}" for side in sides))
    for name in dict.fromkeys(name for side in sides for name in side.seconds):
        cells = ""
        for side in sides:
            wall, cpu = side.seconds.get(name, (0.0, 0.0))
            ratio = sides[0].seconds.get(name, (0, 0))[1] / cpu if cpu else 0
            cells += f"{wall:11.1f} s {cpu:7.1f} s {ratio:5.2f} x" if name in side.seconds else f"{'-':>30}"
        print(f"  {name:<20}{cells}")


def show_reuse(sides: Sequence[Told]) -> None:
    print("tokens of scoring's prompts, those computed, and the least that an endless cache would leave")
    for side in sides:
        unit = "beginnings" if side.engine == "transformers" else f"blocks of {BLOCK}"
        for layout, (total, tokens, minimum) in side.read.items():
            print(f"  {side.engine:<13} {layout:<12} {total:>9,} asked {tokens:>9,} computed, at least {minimum:>9,} "
                  f"by {unit}: {tokens / minimum:.3f} x")  # fmt: skip


# --- all sides ------------------------------------------------------------------------------------------------------


def with_vllm() -> str | None:
    """A Python that has vLLM: this one, else that of `.venv-vllm`."""
    if importlib.util.find_spec("vllm"):
        return sys.executable
    made = ROOT / ".venv-vllm" / "bin" / "python"
    return str(made) if made.exists() else None


def run_side(engine: str, python: str, folder: Path, sets: Sequence[str]) -> Told:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {"OMP_NUM_THREADS": "1", **os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
    command = [python, "-m", "benchmarks.engines", "--side", engine, "--folder", str(folder)]
    command += [f"--set={text}" for text in sets]
    said = folder / f"{engine}.log"
    with said.open("wb") as log:
        ended = subprocess.run(command, env=environ, cwd=ROOT, stderr=log, check=False)
    if ended.returncode:
        sys.exit(f"{engine} failed:\n{said.read_text()[-4000:]}")
    return Told(engine, folder)


def main(options: argparse.Namespace) -> None:
    sets = [f"ingest.demo.items={options.items}", f"ingest.demo.users={options.users}", *options.set]
    python = with_vllm()
    others = [engine for engine in ENGINES[1:] if engine in options.engines]
    if python is None:
        print("vLLM is not installed here (`make test-vllm` installs it): the transformers engine alone")
    with tempfile.TemporaryDirectory(prefix="engines-") as scratch:
        folder = Path(options.folder or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        sides = [run_side("transformers", sys.executable, folder, sets)]
        sides += [run_side(engine, python, folder, sets) for engine in others if python]
        judge = Judge(Side("transformers", folder, sets).work())
        for side in sides[1:]:
            print(f"{side.engine} beside transformers")
            compare_texts(sides[0], side, judge)
            compare_scores(sides[0], side)
        show_reuse(sides)
        show_costs(sides)


def arguments() -> argparse.Namespace:
    words = argparse.ArgumentParser(prog="python -m benchmarks.engines")
    words.add_argument("--items", type=int, default=600)
    words.add_argument("--users", type=int, default=400)
    words.add_argument("--set", action="append", default=[], help="key=value of the profile")
    words.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="transformers is always asked")
    words.add_argument("--folder", help="keep the stores here")
    words.add_argument("--side", choices=ENGINES, help=argparse.SUPPRESS)
    return words.parse_args()


if __name__ == "__main__":
    told = arguments()
    if told.side:
        result = Side(told.side, Path(told.folder), told.set).run()
        Path(told.folder, f"{told.side}.json").write_text(json.dumps(result))
    else:
        main(told)
