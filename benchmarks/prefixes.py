"""Scoring with the beginnings of prompts computed once beside each prompt computed whole: tokens, seconds, answers.

Run: python -m benchmarks.prefixes [users]. A small built-in shop is described and its users summarised by the embedded
model; then its test and valid candidates are scored in each layout, in the order and the window of a run, by engines
that share and that do not. The minimum is each different beginning of the whole scoring once, as an engine with endless
memory would compute it; the bar is BAR times as many. Rounds alternate; seconds, of CPU where there is no GPU, are the
best of each side.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from flows.settings import load
from mllmsrec_core.ask import Choose, Reply, key
from mllmsrec_core.prefixes import common, layouts
from mllmsrec_core.stages import score
from tasks.engines.chat import Chat
from tasks.engines.checkpoint import open_checkpoint
from tasks.engines.transformers import TransformersEngine
from tasks.runner import How
from tasks.stage_task import STAGE_BY_NAME, inputs_of, perform
from tasks.work import Work, open_work

clock = time.perf_counter if torch.cuda.is_available() else time.process_time
BEFORE = ("ingest", "images", "caption", "summary", "preference", "examples", "sft")
ROUNDS = 2
BAR = 1.05  # times the minimum, with beginnings computed once: what we set out to reach


def shop(store: str, users: int) -> tuple[Work, Any]:
    """A demo shop with five items per user, run up to scoring; the Work and the inputs of score."""
    sets = [f"ingest.demo.items={5 * users}", f"ingest.demo.users={users}", "ingest.demo.seed=11"]
    config = load(["demo"], [*sets, 'sft.strategy="none"', f'settings.store="{store}"'], {})
    work = open_work(config.to_json())
    made: dict[str, Any] = {}
    for name in BEFORE:
        made[name], _ = perform(work, name, made, How(), {}, False)
    pointers = {table: pointer for record in made.values() for table, pointer in record["tables"].items()}
    tables = {name: work.store.tables.read(name, pointers[name]["write_id"]) for name in score.STAGE.reads}
    return work, inputs_of(work, STAGE_BY_NAME["score"], tables)


def questions(inputs: Any) -> list[Choose]:
    """Each different question once, in the order of the stage's rows."""
    assert score.STAGE.ask is not None
    asks = [next(score.STAGE.ask(inputs, row)) for row in score.rows(inputs).iter_rows(named=True)]
    return list({key(ask): ask for ask in asks if isinstance(ask, Choose)}.values())


def timed(work: Work, asks: list[Choose], share: bool) -> tuple[list[Reply], int, float]:
    """Replies, tokens computed and seconds, with as many questions in flight as a run has."""
    locations, window = work.engine_for.locations, asyncio.Semaphore(work.config.settings.window)
    engine = TransformersEngine(work.store.blobs, locations, device=work.config.settings.device, share=share)

    async def one(ask: Choose) -> Reply:
        async with window:
            return await engine.answer(ask)

    async def all_of_them() -> tuple[list[Reply], int, float]:
        await engine.answer(asks[-1])  # opens the model
        before, began = engine.tokens_computed, clock()
        replies = await asyncio.gather(*map(one, asks))
        seconds = clock() - began
        await engine.close()
        return replies, engine.tokens_computed - before, seconds

    return asyncio.run(all_of_them())


def minimum(chat: Chat, asks: list[Choose], replies: list[Reply]) -> int:
    """Tokens of all different beginnings."""
    prompts = []
    for ask, reply in zip(asks, replies, strict=True):
        marks = chat.marks(ask.messages)
        spread = [(m,) * (reply.tokens_in - len(marks) + 1) if m < 0 else (m,) for m in marks]  # one picture at most
        prompts.append(tuple(mark for run in spread for mark in run))
    prompts.sort()
    return sum(map(len, prompts)) - sum(common(a, b) for a, b in pairwise(prompts))


def compare(work: Work, inputs: Any, chat: Chat) -> None:
    asks = questions(inputs)
    best: dict[bool, tuple[list[Reply], int, float]] = {}
    for _ in range(ROUNDS):
        for share in (False, True):
            made = timed(work, asks, share)
            best[share] = min(best.get(share, made), made, key=lambda one: one[2])
    least = minimum(chat, asks, best[True][0])
    logits = {share: [r.value["logprobs"]["yes"] - r.value["logprobs"]["no"] for r in best[share][0]] for share in best}
    apart = max(abs(a - b) for a, b in zip(logits[True], logits[False], strict=True))
    for share, name in ((False, "each prompt whole"), (True, "beginnings once")):
        _, tokens, seconds = best[share]
        print(f"  {name:<18} {tokens:>9,} tokens {tokens / least:6.3f} x the minimum   {seconds:6.2f} s", end="")
        met = f"bar {BAR}: {'met' if tokens <= BAR * least else 'missed'}"
        print(f"   {best[False][2] / seconds:5.2f} x as fast, {met}" if share else "")
    print(f"  {'minimum':<18} {least:>9,} tokens; logits differ by at most {apart:.1e}")


def main(users: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="prefixes-") as folder:
        work, inputs = shop(f"{folder}/store", users)
        front, _ = open_checkpoint(work.models["score"], work.engine_for.locations, "cpu")
        chat = Chat(front, work.store.blobs, "embedded")
        for picture in (False, True):
            for layout in ("user_first", "image_first"):
                changed = inputs.params["score"].model_copy(update={"picture": picture, "layout": layout})
                now = replace(inputs, params={**inputs.params, "score": changed})
                said = layouts(score.rows(now), changed.prompt, picture)[layout].ratio
                print(f"{layout}, {'with' if picture else 'without'} pictures; plan says {said:.0%} is shared")
                compare(work, now, chat)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
