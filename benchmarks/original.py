"""Our way beside MLLM-MSR's on one model: captions, preference steps and scored pairs, and what makes each ratio.

Run: python -m benchmarks.original [rows]. The built-in shop and its small model on one thread, in float32; scores with
MLLM-MSR's prompt, that is picture, title and preference, in the layout that `plan` finds the cheaper. Sides alternate in
one process, and the best round of each counts. What `mllmsrec bench --against original` does on a profile of one's own.

What scoring can gain depends on how often a candidate is scored and on how much of a prompt is its picture, so it is
measured at several of both: 36 pieces a picture as the small model has, and 576 as LLaVA-1.5 has (LLaVA-NeXT, which
MLLM-MSR uses, has more), by the same network with its table of places stretched. Its answers are then of no use; what
they cost is the same. MicroLens as MLLM-MSR cuts it has 14,323 users and 9,535 items: with 21 candidates each an item is
scored 32 times where all users are, and 3 times where a tenth of them are, as in its test.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flows.settings import load
from mllmsrec_core.prefixes import layouts
from mllmsrec_core.stages.score import PROMPT
from tasks import embedded, torchvision_guard
from tasks.bench import Figures, Passes, Ratio, bench, local
from tasks.bench.meter import Cost, in_turn
from tasks.bench.original import SCORE_TOKENS
from tasks.bench.rehearsal import Bout, rehearse
from tasks.work import open_work

BARS = {"caption": 1.5, "preference": 5.0, "score": 10.0}  # what we set out to reach
ROWS = 420
USERS = 40  # each with 21 candidates of valid and 21 of test
PROMPTS = ("score.picture=true", 'score.item="title"', 'score.layout="image_first"')
SIDE = 384  # pixels, 24 pieces each way
FEW = 196  # pairs where a prompt has some 630 tokens
# pieces of a picture, items of the shop (and so how often one is scored: 1,680 pairs among them), rows
SETTINGS = ((36, 240, ROWS), (36, 54, ROWS), (576, 240, FEW), (576, 54, FEW))


def main(rows: int) -> None:
    torch.set_num_threads(1)
    print(f"{USERS} users, 240 items, each scored some 7 times; {PROMPTS[-1]}")
    for finding in bench(load(["demo"], [*PROMPTS, *shop(240)], {}), rows, against_original=True):
        show(finding)
    with tempfile.TemporaryDirectory() as folder:
        for pieces, items, n in SETTINGS:
            model = [] if pieces == 36 else [f'score.model="{enlarged(Path(folder, "vlm"))}"']
            print(f"score, {pieces} pieces a picture, an item scored some {1680 / items:.0f} times")
            scored([*PROMPTS, *shop(items), *model], min(n, rows))


def shop(items: int) -> list[str]:
    return [f"ingest.demo.items={items}", f"ingest.demo.users={USERS}"]


def show(finding: Any) -> None:
    """One line for a stage, one or two for a ratio."""
    if isinstance(finding, Figures):
        memory, share = f"{finding.memory_mb:,.0f} MB", f"{finding.cores:.2f} cores"
        print(f"{finding.stage}: {finding.rows_s:,.1f} rows/s, {memory}, {share}, bound by {finding.bound_by}")
    elif isinstance(finding, Ratio):
        bar = BARS.get(finding.stage) if finding.what == local.ORIGINAL else None
        said = f", bar {bar}: {'met' if finding.cpu_ratio >= bar else 'missed'}" if bar else ""
        print(f"  {finding.what}: {finding.ours:,.1f} : {finding.theirs:,.1f} {finding.unit}/s", end="")
        print(f" = {finding.ratio:.2f}, by processor time {finding.cpu_ratio:.2f}{said}")
        if finding.because:
            print(f"    {finding.because}")


def scored(sets: Sequence[str], rows: int) -> None:
    """Processor time of a pair: ours, theirs with and without an end of their answers, and our network's own where
    nothing is decoded, cut, hashed or kept; its batches are of a fixed size, ours end where families of prompts do.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = open_work(load(["demo"], [*sets, f'settings.store="{folder}/store"'], {}).to_json())
        bout = next(one for one in rehearse(work, rows) if one.stage.name == "score")
        model, passes = local.opened(work, bout), Passes(work, Path(folder), bout)
        assert model
        passes.cool = model.cool
        costs = in_turn(
            {
                "ours": passes.run,
                "the network alone": alone(model),
                "MLLM-MSR's way": lambda: model.way.scores(model.asks),
                f"MLLM-MSR's way, all {SCORE_TOKENS} tokens written": lambda: model.way.scores(
                    model.asks, least=SCORE_TOKENS
                ),
            }
        )
        work.engine_for.drop()
    tell({name: cost for name, (cost, _) in costs.items()}, len(model.asks), bout)


def tell(costs: dict[str, Cost], n: int, bout: Bout) -> None:
    found = layouts(bout.rows, PROMPT, pictures=True)
    print(f"  by plan's arithmetic {', '.join(f'{name} leaves {one.unique:,} tokens' for name, one in found.items())}")
    for name, cost in costs.items():
        times = cost.cpu / costs["ours"].cpu
        said = f" (bar {BARS['score']}: {'met' if times >= BARS['score'] else 'missed'})" if "MSR" in name else ""
        beside = f"{times:5.2f} x ours, {cost.cpu / costs['the network alone'].cpu:5.2f} x the network"
        print(f"  {1e3 * cost.cpu / n:7.2f} ms a pair, {beside}: {name}{said}")


def alone(model: local.Local) -> Callable[[], None]:
    """Every prompt's next word from tensors that are there already, each beginning once in a batch."""
    loaded = model.engine._open(model.asks[0].model)
    asks = sorted(model.asks, key=lambda ask: loaded.chat.marks(ask.messages), reverse=True)
    read = []
    for start in range(0, len(asks), model.batch_size):
        some, decoded = asks[start : start + model.batch_size], {}
        prompts = [loaded.chat.prompt(ask.messages, ask.model.max_pixels, decoded=decoded) for ask in some]
        encoded = loaded.chat.encode(prompts, None, once=True)
        lengths = encoded.tensors["attention_mask"].sum(dim=1).tolist()
        read.append((encoded.tensors, loaded._marks(some, encoded, lengths), encoded.shown))

    def run() -> None:
        with torch.inference_mode():
            for one in read:
                loaded.reader.next_words(*one)

    return run


def enlarged(folder: Path) -> Path:
    """The small model for pictures of SIDE x SIDE pixels, in a folder of its own."""
    torchvision_guard.install()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if folder.exists():
        return folder
    source = Path(embedded.__file__).parent / "vlm"
    network: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    front: Any = AutoProcessor.from_pretrained(source)
    config, weights = network.config, dict(network.state_dict())
    [name] = [name for name in weights if name.endswith("position_embedding.weight")]
    old, new = config.vision_config.image_size // 16, SIDE // 16  # pixels of a piece, both ways
    plane = weights[name][1:].T.reshape(1, -1, old, old)  # the first is the class token's
    plane = torch.nn.functional.interpolate(plane, (new, new), mode="bicubic")[0]
    weights[name] = torch.cat([weights[name][:1], plane.flatten(1).T])
    config.vision_config.image_size, config.image_seq_length = SIDE, new * new
    large = type(network)(config)
    large.load_state_dict(weights)
    large.generation_config = network.generation_config
    large.save_pretrained(folder)
    front.image_processor.size = {"shortest_edge": SIDE}
    front.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    front.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS)
