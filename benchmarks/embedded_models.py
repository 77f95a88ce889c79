"""What the embedded models can do on the demo shop, whose products, brands and users they were not trained on.

    python -m benchmarks.embedded_models                     every section
    python -m benchmarks.embedded_models score --seeds 0 1 2

Each section prints a table of measured figures beside chance (or the obvious baseline) and the ceiling. Preferences are
chained on the model's own answers: captions, then summaries of them, then each preference on the one before.
Fine-tuning settings were not searched for; the figures of the model card come from `--shop 7`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from tasks import torchvision_guard

torchvision_guard.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from mllmsrec_core.ask import Message  # noqa: E402
from mllmsrec_core.datasets import demo  # noqa: E402
from mllmsrec_core.stages import caption, preference, score, summary  # noqa: E402

EMBEDDED = Path(__file__).parents[1] / "tasks" / "embedded"
SCORE = score.Params(picture=False)
NEGATIVES = 10  # uniform random items beside each target


# --- the models -------------------------------------------------------------------------------------------------------


class Reader:
    """The embedded vision-language model, answering batches of prompts greedily; pictures are named by their URI."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def answers(self, prompts: Sequence[tuple[Message, ...]], size: int = 64) -> list[str]:
        """One answer per prompt, in order; prompts of like length are asked together."""
        order = sorted(range(len(prompts)), key=lambda number: len(str(prompts[number])))
        found = [""] * len(prompts)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = encode(self.processor, [prompts[row] for row in rows])
            with torch.inference_mode():
                made = self.model.generate(**batch, max_new_tokens=60, do_sample=False)
            texts = self.processor.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                found[row] = text.strip()
        return found


def encode(processor: Any, prompts: Sequence[tuple[Message, ...]]) -> dict[str, torch.Tensor]:
    chats = [[turn(message) for message in prompt] for prompt in prompts]
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )


def turn(message: Message) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": shown(part.sha256)}
        for part in message.parts
    ]
    return {"role": message.role, "content": parts}


def shown(uri: str) -> Image.Image:
    return Image.open(BytesIO(demo.picture(uri)))


# --- the shop as the model sees it ------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One shop, its users, and what the model made of both."""

    products: list[demo.Item]
    users: list[tuple[str, list[demo.Item], list[demo.Look]]]
    captions: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    summaries: dict[str, str] = field(default_factory=dict)
    steps: dict[str, list[str]] = field(default_factory=dict)  # user -> preference after each block


def look_at(reader: Reader, params: demo.Params) -> Seen:
    """Caption and summarise every product, then roll every user's preference forward."""
    seen = Seen(demo.assortment(params.items, params.seed), list(demo.shoppers(params)))
    ids = [product.item_id for product in seen.products]
    captions = reader.answers([caption.prompt(caption.Params(), product.uri) for product in seen.products])
    titles = reader.answers([summary.text_prompt(summary.Params(), {"title": p.title}) for p in seen.products])
    pairs = list(zip(titles, captions, strict=True))
    summaries = reader.answers([summary.fuse_prompt(summary.Params(), *pair) for pair in pairs])
    seen.captions, seen.titles, seen.summaries = (
        dict(zip(ids, texts, strict=True)) for texts in (captions, titles, summaries)
    )
    roll(reader, seen)
    return seen


def roll(reader: Reader, seen: Seen) -> None:
    """All users' first blocks together, then all second ones, as the steps of one user must wait for each other."""
    seen.steps = {user: [] for user, _, _ in seen.users}
    for step in range(max(len(blocks(chosen)) for _, chosen, _ in seen.users)):
        asked, prompts = [], []
        for user, chosen, _ in seen.users:
            if step < len(blocks(chosen)):
                items = [{"at": None, "text": seen.summaries[item.item_id]} for item in blocks(chosen)[step]]
                before = seen.steps[user][-1] if step else None
                prompts.append(preference.recurrent_prompt(preference.Params(), before, items))
                asked.append(user)
        for user, text in zip(asked, reader.answers(prompts), strict=True):
            seen.steps[user].append(text)


def blocks(chosen: Sequence[demo.Item]) -> list[Sequence[demo.Item]]:
    """The whole blocks of a history; its last two items are kept for validation and test."""
    whole = (len(chosen) - 2) // demo.BLOCK
    return [chosen[demo.BLOCK * number : demo.BLOCK * (number + 1)] for number in range(whole)]


def table(title: str, rows: Sequence[tuple[Any, ...]], head: tuple[str, ...]) -> None:
    print(f"\n{title}\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        cells = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)
        print(f"| {' | '.join(cells)} |", flush=True)


# --- captions and summaries -------------------------------------------------------------------------------------------


def share(values: Iterator[bool] | Sequence[bool]) -> float:
    return float(np.mean(list(values)))


def captions_table(reader: Reader, seen: Seen) -> None:
    rows: list[tuple[Any, ...]] = []
    strange = [product for product in seen.products if demo.held_out(product.look)]
    for name, values in demo.ATTRIBUTES.items():
        right = {p.item_id: demo.attributes(seen.captions[p.item_id])[name] == p.look[name] for p in seen.products}
        held = share([right[product.item_id] for product in strange])
        rows.append((f"caption: {name}", share(list(right.values())), held, 1 / len(values), 1.0))
    asked = [summary.question_prompt(question, p.uri) for p in seen.products for question in summary.QUESTIONS]
    answered = np.array(reader.answers(asked)).reshape(-1, len(summary.QUESTIONS))
    wanted = np.array([demo.answers(product.look) for product in seen.products])
    for column, question in enumerate(summary.QUESTIONS):
        rows.append((f"question: {question}", share(answered[:, column] == wanted[:, column]), "", "", 1.0))
    titled = [seen.titles[p.item_id] == demo.text_summary_text(p.title) for p in seen.products]
    rows.append(("text summary, exact", share(titled), "", 0.0, 1.0))
    fused = [
        seen.summaries[p.item_id]
        == f"{seen.titles[p.item_id].removesuffix('.')}: {seen.captions[p.item_id].replace('A ', 'a ', 1)}"
        for p in seen.products
    ]
    rows.append(("fused summary of its own two texts, exact", share(fused), "", 0.0, 1.0))
    head = (f"{len(seen.products)} products", "right", f"held-out looks ({len(strange)})", "chance", "ceiling")
    table("Captions and summaries", rows, head)


# --- preferences ------------------------------------------------------------------------------------------------------


def preference_table(seen: Seen) -> None:
    """Each step against the rule on true looks (errors of captions count), and against leaving it unchanged."""
    hits, kept, exact = Counter(), Counter(), Counter()
    count = 0
    for user, chosen, _ in seen.users:
        state = demo.NOTHING
        for block, text in zip(blocks(chosen), seen.steps[user], strict=True):
            before, state = state, demo.update(state, [product.look for product in block])
            told = demo.attributes(text)
            hits.update(name for name in demo.ATTRIBUTES if told[name] == state[name])
            kept.update(name for name in demo.ATTRIBUTES if before[name] == state[name])
            exact.update({"told": told == state, "kept": before == state})
            count += 1
    rows: list[tuple[Any, ...]] = [(name, hits[name] / count, kept[name] / count, 1.0) for name in demo.ATTRIBUTES]
    rows.append(("all three", exact["told"] / count, exact["kept"] / count, 1.0))
    head = (f"{count} steps of {len(seen.users)} users", "right", "left unchanged", "ceiling")
    table("Preferences, chained on the model's own words", rows, head)


# --- scoring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning settings. The loss starts to fall after half an epoch and still falls in the third."""

    pairs: int = 5000
    rank: int = 32
    rate: float = 1e-3
    epochs: float = 3.0
    size: int = 16


Pair = tuple[str, str, int]  # preference, item id, whether it was chosen


def training_pairs(seen: Seen, count: int, seed: int) -> list[Pair]:
    """From each block but the first: its items were chosen, as many random ones not; never the last two choices."""
    rng, found = random.Random(f"pairs {seed}"), []
    for user, chosen, _ in seen.users:
        for told, block in zip(seen.steps[user], blocks(chosen)[1:], strict=False):
            for product in block:
                found += [(told, product.item_id, 1), (told, rng.choice(seen.products).item_id, 0)]
    rng.shuffle(found)
    return found[:count]


def test_pairs(seen: Seen, place: int) -> list[Pair]:
    """The last choice (`place` -1) or the one before it (-2) of each user, and NEGATIVES random products."""
    rng, found = random.Random(f"test {place}"), []
    for user, chosen, _ in seen.users:
        told = seen.steps[user][-1]
        found.append((told, chosen[place].item_id, 1))
        found += [(told, product.item_id, 0) for product in rng.sample(seen.products, NEGATIVES)]
    return found


def prompt(seen: Seen, pair: Pair) -> tuple[Message, ...]:
    told, item_id, _ = pair
    row = {
        "profile": None,
        "preference": told,
        "last_titles": None,
        "item_text": seen.summaries[item_id],
        "sha256": None,
    }
    return score.prompt(SCORE, row)


def quantised(folder: Path) -> Any:
    """The model in 4 bits (NF4), ready to carry an adapter."""
    import bitsandbytes as bnb
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        # matched from the start of the full name
        llm_int8_skip_modules=[r".*vision_tower", r".*multi_modal_projector", "lm_head"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=bits, dtype=torch.bfloat16, device_map={"": "cpu"}, attn_implementation="eager"
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # one evaluation would repack the weight and end all gradients
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def finetune(model: Any, processor: Any, examples: list[dict[str, Any]], recipe: Recipe, seed: int) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    lora = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    )
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=recipe.size,
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            use_cpu=True,
            bf16=True,
            report_to="none",
            max_length=None,
            completion_only_loss=True,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=50,
            optim="adamw_torch",
            seed=seed,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(examples),
            processing_class=processor,
            peft_config=lora,
        )
        trainer.train()
    return trainer.model


def auc(model: Any, processor: Any, seen: Seen, pairs: Sequence[Pair]) -> float:
    """Of the logit of yes over no, each the sum over its surface forms."""
    forms = [
        sorted({processor.tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms})
        for _, forms in score.YES_NO
    ]
    model.eval()
    found: list[float] = []
    for start in range(0, len(pairs), 100):
        batch = encode(processor, [prompt(seen, pair) for pair in pairs[start : start + 100]])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        found += (logits[:, forms[0]].logsumexp(-1) - logits[:, forms[1]].logsumexp(-1)).tolist()
    return float(roc_auc_score([chosen for *_, chosen in pairs], found))


def score_table(folder: Path, seen: Seen, shop: demo.Params, recipe: Recipe, seeds: Sequence[int]) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    validation, test = test_pairs(seen, -2), test_pairs(seen, -1)
    rows: list[tuple[Any, ...]] = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = quantised(folder)
        before = [auc(model, processor, seen, pairs) for pairs in (validation, test)]
        examples = [
            {
                "prompt": [{"role": "user", "content": prompt(seen, pair)[0].parts[0]}],
                "completion": [{"role": "assistant", "content": "yes" if pair[2] else "no"}],
            }
            for pair in training_pairs(seen, recipe.pairs, seed)
        ]
        start = time.monotonic()
        tuned = finetune(model, processor, examples, recipe, seed)
        seconds = time.monotonic() - start
        after = [auc(tuned, processor, seen, pairs) for pairs in (validation, test)]
        rows.append((seed, before[0], after[0], before[1], after[1], f"{seconds:.0f} s"))
        print(rows[-1], flush=True)
    means = [float(np.mean([row[column] for row in rows])) for column in range(1, 5)]
    rows.append(("mean", *means, ""))
    head = ("seed", "validation, before", "validation, after", "test, before", "test, after", "fine-tuning")
    table(f"Yes or no, text only: AUC of the next choice against random products ({recipe})", rows, head)
    table("What there is to know", ceilings(shop), ("from", "AUC"))


# --- ceilings ---------------------------------------------------------------------------------------------------------


def facts(params: demo.Params) -> list[tuple[int, float, tuple[bool | None, ...], tuple[int, ...]]]:
    """For each target and NEGATIVES random products: chosen, the true pull, which words match, what titles say."""
    rng, found = random.Random(f"facts {params.seed}"), []
    products = demo.assortment(params.items, params.seed)
    for _, chosen, tastes in demo.shoppers(params):
        state = demo.NOTHING
        for block in blocks(chosen):
            state = demo.update(state, [product.look for product in block])
        for number, product in enumerate([chosen[-1], *rng.choices(products, k=NEGATIVES)]):
            matches = tuple(known and known == product.look[name] for name, known in state.items())
            found.append((int(number == 0), demo.pull(tastes[-1], product.look), matches, titles(chosen[:-1], product)))
    return found


def titles(chosen: Sequence[demo.Item], product: demo.Item) -> tuple[int, ...]:
    """What a reader of titles alone can use: repeats of the named category, the style word, the product itself."""
    named = demo.attributes(product.title)["category"]
    before = [demo.attributes(item.title)["category"] for item in chosen]
    same = before.count(named) if named else 0
    other = len([category for category in before if category]) - same
    style = sum(item.title.split()[1] == product.title.split()[1] for item in chosen)
    return same, int(same > 0), other if named else 0, int(bool(named)), style, int(product in chosen)


def ceilings(params: demo.Params) -> list[tuple[str, float]]:
    """AUC of the best guess from less and less knowledge, estimated on another shop with many users."""
    learnt = facts(params.model_copy(update={"seed": params.seed + 1000, "users": 4000}))
    held = facts(params.model_copy(update={"users": 2000}))
    seen, taken = Counter(match for _, _, match, _ in learnt), Counter(match for y, _, match, _ in learnt if y)
    chosen = [y for y, *_ in held]
    reader = LogisticRegression(max_iter=1000).fit([row for *_, row in learnt], [y for y, *_ in learnt])
    guesses = {
        "the true taste": [pull for _, pull, _, _ in held],
        "the right preference and the true look": [(taken[m] + 0.1) / (seen[m] + 1) for _, _, m, _ in held],
        "how many words match": [sum(map(bool, match)) for _, _, match, _ in held],
        "the same of colour and pattern only": [sum(map(bool, match[:2])) for _, _, match, _ in held],
        "titles alone": reader.predict_proba([row for *_, row in held])[:, 1],
    }
    return [(name, float(roc_auc_score(chosen, values))) for name, values in guesses.items()]


# --- CLIP -------------------------------------------------------------------------------------------------------------


def clip_table(folder: Path, products: Sequence[demo.Item]) -> None:
    """The right caption of a picture against the same caption with one attribute wrong."""
    import open_clip

    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    words, rng = open_clip.get_tokenizer(f"local-dir:{folder}"), random.Random("wrong captions")
    model.eval()
    with torch.inference_mode():
        seen = model.encode_image(torch.stack([prepare(shown(product.uri)) for product in products]), normalize=True)

        def fit(texts: list[str]) -> np.ndarray:
            return (seen * model.encode_text(words(texts), normalize=True)).sum(-1).numpy()

        right = fit([demo.caption_text(product.look) for product in products])
        held = np.array([demo.held_out(product.look) for product in products])
        rows: list[tuple[Any, ...]] = []
        for name, values in demo.ATTRIBUTES.items():
            looks = [p.look | {name: rng.choice([v for v in values if v != p.look[name]])} for p in products]
            wrong = fit([demo.caption_text(look) for look in looks])
            rows.append((name, pooled(right, wrong), pooled(right[held], wrong[held]), share(right > wrong), 0.5))
    head = (f"{len(products)} products", "AUC", f"held-out looks ({held.sum()})", "right one first", "chance")
    table("CLIP: the right caption against one with this attribute wrong", rows, head)


def pooled(right: np.ndarray, wrong: np.ndarray) -> float:
    return float(roc_auc_score([1] * len(right) + [0] * len(wrong), np.concatenate([right, wrong])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("captions", "preferences", "score", "clip")
    parser.add_argument("sections", nargs="*", default=sections, help=f"of {', '.join(sections)}")
    parser.add_argument("--models", type=Path, default=EMBEDDED, help="the folder with vlm/ and clip/")
    parser.add_argument("--shop", type=int, default=demo.Params().seed, help="the shop's seed")
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2), help="of fine-tuning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", type=json.loads, default={}, help='changes to the fine-tuning, e.g. {"rank": 16}')
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    shop = demo.Params(seed=chosen.shop)
    if set(chosen.sections) - {"clip"}:
        reader = Reader(chosen.models / "vlm")
        seen = look_at(reader, shop)
        if "captions" in chosen.sections:
            captions_table(reader, seen)
        if "preferences" in chosen.sections:
            preference_table(seen)
        if "score" in chosen.sections:
            score_table(chosen.models / "vlm", seen, shop, Recipe(**chosen.recipe), chosen.seeds)
    if "clip" in chosen.sections:
        clip_table(chosen.models / "clip", demo.assortment(shop.items, shop.seed))


if __name__ == "__main__":
    main()
