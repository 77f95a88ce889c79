"""Trains the embedded models from nothing: `python -m tasks.embedded.make`, under an hour on two cores.

Phases run in order and leave their result in the scratch folder; a phase whose result is there is not run again, and
`--again PHASE` runs one anew. The last phase of each model writes it to this folder (`vlm/`, `clip/`).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tasks import torchvision_guard

torchvision_guard.install()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast  # noqa: E402

from mllmsrec_core.datasets import demo  # noqa: E402
from tasks.embedded import architecture, contrast, learn  # noqa: E402
from tasks.embedded.lessons import SEED, Teacher  # noqa: E402

HERE = Path(__file__).parent
PRODUCTS = 16_000
TEXT = (
    *("recurrent", "each", "facts", "recurrent", "count", "each"),
    *("words", "recurrent", "fuse", "list", "fact", "window", "title"),
)
ALL = (
    *("caption", "recurrent", "each", "caption", "question", "words", "caption", "fuse", "each", "caption"),
    *("fact", "question", "words_seen", "caption", "recurrent", "count", "each", "caption", "window", "title"),
)

# Counting matches is what a yes or no can later be read off, and is learnt last.
COUNTING = (
    *("weigh", "caption", "count", "recurrent", "weigh", "each", "fact", "caption", "weigh", "words", "weigh"),
    *("count", "question", "weigh", "recurrent", "weigh", "fuse", "fact", "caption", "weigh", "window", "title"),
)


class Making:
    """One method per phase; each reads what the ones before left in `scratch`."""

    def __init__(self, scratch: Path, out: Path, scale: float) -> None:
        self.scratch, self.out, self.scale = scratch, out, scale
        self.products = demo.assortment(PRODUCTS, SEED, training=True)

    def steps(self, count: int) -> int:
        return max(1, round(count * self.scale))

    def words(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(self.scratch / "words")

    def images(self) -> torch.Tensor:
        return torch.load(self.scratch / "pictures", mmap=True)

    def pictures_phase(self) -> None:
        torch.save(learn.pixels(self.products), self.scratch / "pictures")

    def words_phase(self) -> None:
        teacher = Teacher(self.products, seed=0)
        drawn = (teacher.draw(kind) for _ in range(600) for kind in ALL + TEXT)
        corpus = (text for lesson in drawn for text in (*lesson.messages[0].parts, lesson.answer))
        architecture.tokenizer(text for text in corpus if isinstance(text, str)).save_pretrained(self.scratch / "words")

    def tower_phase(self) -> None:
        vision = architecture.model(self.words()).model.vision_tower
        learn.tower(Pooled(vision), 128, self.products, self.images(), steps=self.steps(2000), size=64)
        # The decoder found no category in the mean of 36 tokens; once every token tells it, it does.
        learn.tower(Patches(vision), 128, self.products, self.images(), steps=self.steps(250), size=64)
        torch.save(vision.state_dict(), self.scratch / "tower")

    def text_phase(self) -> None:
        words, teacher = self.words(), Teacher(self.products, seed=1)
        model = architecture.model(words)
        learn.study(model, words, teacher, images=None, kinds=TEXT, steps=self.steps(4000), muon=0.02, adam=2e-3)
        torch.save(model.state_dict(), self.scratch / "text")

    def joint_phase(self) -> None:
        words, teacher = self.words(), Teacher(self.products, seed=2)
        model: LlavaForConditionalGeneration = architecture.model(words)
        model.load_state_dict(torch.load(self.scratch / "text"))
        model.model.vision_tower.load_state_dict(torch.load(self.scratch / "tower"))
        learn.study(
            model, words, teacher, images=self.images(), kinds=ALL, steps=self.steps(3000), muon=0.012, adam=1.5e-3
        )
        torch.save(model.state_dict(), self.scratch / "joint")

    def counting_phase(self) -> None:
        words, teacher = self.words(), Teacher(self.products, seed=3)
        model: LlavaForConditionalGeneration = architecture.model(words)
        model.load_state_dict(torch.load(self.scratch / "joint"))
        learn.study(
            model, words, teacher, images=self.images(), kinds=COUNTING, steps=self.steps(1200), muon=0.01, adam=1.2e-3
        )
        torch.save(model.state_dict(), self.scratch / "counting")
        architecture.save(model.eval(), words, self.out / "vlm")

    def clip_phase(self) -> None:
        contrast.train(self.products, self.images(), self.scratch, self.out / "clip", self.steps)
        (self.scratch / "clip").touch()


class Patches(nn.Module):
    """A CLIP vision tower as one vector per patch, which is what the decoder reads."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision(images).last_hidden_state[:, 1:]


class Pooled(Patches):
    """A CLIP vision tower as one vector per picture: the mean over its patches."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).mean(1)


PHASES = ("pictures", "words", "tower", "text", "joint", "counting", "clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "mllmsrec-embedded")
    parser.add_argument("--out", type=Path, default=HERE, help="where vlm/ and clip/ are written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of all step counts; small to try the script out")
    parser.add_argument("--only", choices=PHASES, nargs="*", default=PHASES)
    parser.add_argument("--again", choices=PHASES, nargs="*", default=())
    chosen = parser.parse_args()
    chosen.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(chosen.threads)
    making = Making(chosen.scratch, chosen.out, chosen.scale)
    for phase in PHASES:
        if phase in chosen.only and (phase in chosen.again or not (chosen.scratch / phase).exists()):
            print(f"phase {phase}", flush=True)
            torch.manual_seed(chosen.seed)
            getattr(making, f"{phase}_phase")()


if __name__ == "__main__":
    main()
