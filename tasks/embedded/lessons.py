"""What the embedded vision-language model is taught: prompts as the stages write them, and the right answers.

Lessons are drawn from the demo shop's generator, on its training side: other seeds, brands and ids than the shop's own,
and no held-out look, neither drawn nor described. Comparisons of a preference with a candidate are taught word by word,
in the layout of the scoring prompt. Whether a user would choose a candidate is never answered here: that is learnt by
fine-tuning alone. So that the words yes and no do not stand for a match beforehand, the yes/no lesson asks in that same
layout for something unrelated to the preference. Knows nothing of tokens or tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from mllmsrec_core.ask import Message, Picture
from mllmsrec_core.datasets import demo
from mllmsrec_core.stages import caption, preference, score, summary
from mllmsrec_core.text import fence

SEED = 20_000  # of the training side's products
UNSEEN = Picture("")  # stands where the picture goes; a lesson's `picture` says which

WORDS = score.Params(picture=False, prompt="{user}\nCandidate: {item}\nWhich of the candidate's words match?")
COUNT = score.Params(picture=False, prompt="{user}\nCandidate: {item}\nHow many of the candidate's words match?")
# The same count behind the words of the scoring question: what a choice hangs on is then at hand when it is asked.
WEIGH = score.Params(picture=False, prompt=score.PROMPT.replace("Answer yes or no.", "Say how many words match."))
FACT = score.Params(picture=False, prompt="{user}\nCandidate: {item}\nIs the candidate {{word}}? Answer yes or no.")
FACTS = score.Params(picture=False, prompt="{user}\nCandidate: {item}\nIs the candidate {{word}}?")
KINDS = preference.Params(window_prompt="Items a user chose, oldest first:\n{items}\nList colours, patterns and kinds.")
Judged = list[tuple[str, bool]]  # words, and whether each is right
NUMBERS = ("none", "one", "two", "three")


@dataclass(frozen=True, slots=True)
class Lesson:
    """One prompt and the answer to learn; `picture` is the number of the training product it shows."""

    messages: tuple[Message, ...]
    answer: str
    picture: int | None = None


class Teacher:
    """Draws lessons from a seed. `products` are the training products, whose pictures `Lesson.picture` counts."""

    def __init__(self, products: Sequence[demo.Item], seed: int) -> None:
        self.products = products
        self.rng = random.Random(f"lessons {seed}")
        self.kinds: dict[str, Callable[[], Lesson]] = {
            "caption": self.caption,
            "question": self.question,
            "title": self.title,
            "fuse": self.fuse,
            "recurrent": self.recurrent,
            "window": self.window,
            "list": self.list,
            "words": self.words,
            "each": self.each,
            "count": self.count,
            "weigh": self.weigh,
            "fact": self.fact,
            "facts": self.facts,
            "words_seen": lambda: self.words(seen=True),
            "count_seen": lambda: self.count(seen=True),
        }

    def draw(self, kind: str) -> Lesson:
        return self.kinds[kind]()

    # --- a single product

    def product(self) -> tuple[int, demo.Item]:
        number = self.rng.randrange(len(self.products))
        return number, self.products[number]

    def caption(self) -> Lesson:
        number, shown = self.product()
        return Lesson(caption.prompt(caption.Params(), UNSEEN.sha256), demo.caption_text(shown.look), number)

    def question(self) -> Lesson:
        number, shown = self.product()
        question, answer = self.rng.choice(list(zip(summary.QUESTIONS, demo.answers(shown.look), strict=True)))
        return Lesson(summary.question_prompt(question, UNSEEN.sha256), answer, number)

    def title(self) -> Lesson:
        named = demo.item(self.rng, "", 0, training=True)
        prompt = summary.text_prompt(summary.Params(), {"title": named.title})
        return Lesson(prompt, demo.text_summary_text(named.title))

    def fuse(self) -> Lesson:
        """Caption alone seven times in ten, else the visual questions' answers, alone or beside it."""
        named = demo.item(self.rng, "", 0, training=True)
        said, asked = demo.caption_text(named.look), summary.vqa_text(summary.QUESTIONS, list(demo.answers(named.look)))
        seen = self.rng.choices((said, asked, f"{said} {asked}"), (7, 2, 1))[0]
        prompt = summary.fuse_prompt(summary.Params(), demo.text_summary_text(named.title), seen)
        return Lesson(prompt, demo.summary_text(named.title, named.look))

    # --- several products

    def near(self, wanted: demo.Preference, share: float) -> demo.Look:
        """A look that has each wanted value with chance `share`, and is not held out."""
        while True:
            look = demo.taste(self.rng)
            look |= {name: value for name, value in wanted.items() if value and self.rng.random() < share}
            if not demo.held_out(look):
                return look

    def text(self, look: demo.Look) -> str:
        """The fused summary of a new product with this look."""
        name = f"{demo.brand(self.rng, True)} {self.rng.choice(demo.STYLES)}"
        if self.rng.random() < demo.NAMED:
            name += f" {look['category'].capitalize()}"
        return demo.summary_text(name, look)

    def chosen(self, looks: Sequence[demo.Look]) -> tuple[list[dict[str, Any]], list[demo.Preference]]:
        """Items as the preference stage lists them. One in twenty has no picture: its look is then unknown."""
        items, known, at = [], [], demo.OPENING
        for look in looks:
            seen = self.rng.random() >= 0.05
            name = f"{demo.brand(self.rng, True)} {self.rng.choice(demo.STYLES)}"
            items.append({"at": at, "text": self.text(look) if seen else demo.text_summary_text(name)})
            known.append(look if seen else demo.NOTHING)
            at += timedelta(days=self.rng.choice((0.5, 1, 2, 3, 4, 6, 8, 15, 40, 100)) * self.rng.uniform(1, 1.9))
        return items, known

    def state(self, unknown: float = 0.12) -> demo.Preference:
        return {name: None if self.rng.random() < unknown else value for name, value in demo.taste(self.rng).items()}

    def recurrent(self) -> Lesson:
        """Blocks that confirm, contradict or ignore the preference before them, so that copying it is often wrong."""
        first = self.rng.random() < 0.2
        before = demo.NOTHING if first else self.state()
        now = {name: before[name] if self.rng.random() < 0.4 else value for name, value in demo.taste(self.rng).items()}
        share = self.rng.uniform(0.3, 0.8)
        items, known = self.chosen([self.near(now, share) for _ in range(demo.BLOCK)])
        said = None if first else demo.preference_text(before)
        prompt = preference.recurrent_prompt(preference.Params(), said, items)
        return Lesson(prompt, demo.preference_text(demo.update(before, known)))

    def window(self) -> Lesson:
        count, now = self.rng.randint(1, 6), demo.taste(self.rng)
        items, known = self.chosen([self.near(now, 0.55) for _ in range(count)])
        params = preference.Params(mode=self.rng.choice(("window", "direct")))
        answer = demo.preference_text(demo.update(demo.NOTHING, known))
        return Lesson(preference.window_prompt(params, items), answer)

    def list(self) -> Lesson:
        """Nothing but reading: every colour, every pattern, every kind, in order."""
        items, known = self.chosen([self.near(demo.taste(self.rng), 0.5) for _ in range(self.rng.randint(2, 4))])
        columns = (", ".join(look[name] or "unknown" for look in known) for name in demo.ATTRIBUTES)
        return Lesson(preference.window_prompt(KINDS, items), "; ".join(columns))

    # --- a preference and a candidate

    def pair(self, share: float = 0.45) -> tuple[demo.Preference, demo.Look, score.Row]:
        liked = self.state()
        look = self.near(liked, share)
        row = {"preference": demo.preference_text(liked), "profile": self.profile(), "last_titles": None}
        if self.rng.random() < 0.1:
            chosen = (demo.item(self.rng, "", 0, training=True) for _ in range(self.rng.randint(1, 3)))
            row["last_titles"] = [named.title for named in chosen]
        return liked, look, row | {"item_text": self.text(look), "sha256": None}

    def profile(self) -> str | None:
        """One time in four a line that says nothing of looks, as the deterministic profile may."""
        if self.rng.random() < 0.75:
            return None
        choices, days = self.rng.randint(3, 40), self.rng.randint(1, 30)
        return self.rng.choice((f"{choices} choices, about every {days} days", f"{choices} items over {days} weeks."))

    def _compared(self, params: score.Params, answer: Callable[[Judged], str], seen: bool) -> Lesson:
        if seen:
            number, shown = self.product()
            liked = {n: shown.look[n] if self.rng.random() < 0.45 else value for n, value in self.state().items()}
            row = {"preference": demo.preference_text(liked), "profile": self.profile(), "last_titles": None}
            look, row = shown.look, row | {"item_text": demo.summary_text(shown.title, shown.look), "sha256": "seen"}
            params = params.model_copy(update={"picture": True})
        else:
            number, (liked, look, row) = None, self.pair()
        return Lesson(score.prompt(params, row), answer(matches(liked, look)), number)

    def words(self, seen: bool = False) -> Lesson:
        return self._compared(WORDS, told, seen)

    def each(self) -> Lesson:
        """`words` for three candidates at once: three times the judgements for one and a half the length."""
        liked, _, row = self.pair()
        compared = [self.near(liked, 0.45) for _ in range(3)]
        listed = "\n".join(fence(self.text(look)) for look in compared)
        prompt = "\n".join((score.user_text(row), "Candidates:", listed, "Which of each candidate's words match?"))
        return Lesson((Message("user", (prompt,)),), "; ".join(told(matches(liked, look)) for look in compared))

    def count(self, seen: bool = False) -> Lesson:
        return self._compared(COUNT, lambda found: NUMBERS[sum(same for _, same in found)], seen)

    def weigh(self) -> Lesson:
        return self._compared(WEIGH, lambda found: NUMBERS[sum(same for _, same in found)], seen=False)

    def word(self, look: demo.Look) -> tuple[str, bool]:
        """A word that describes the look half the time, drawn without regard to any preference. Kinds are hardest."""
        name = self.rng.choice((*demo.ATTRIBUTES, "category"))
        word = look[name] if self.rng.random() < 0.5 else self.rng.choice(demo.ATTRIBUTES[name])
        return word, word == look[name]

    def fact(self) -> Lesson:
        _, look, row = self.pair()
        word, true = self.word(look)
        params = FACT.model_copy(update={"prompt": FACT.prompt.replace("{{word}}", word)})
        return Lesson(score.prompt(params, row), "yes" if true else "no")

    def facts(self) -> Lesson:
        """Several words judged at once: one dense answer teaches what many bare ones do not."""
        _, look, row = self.pair()
        judged = list(dict(self.word(look) for _ in range(self.rng.randint(3, 6))).items())
        asked = ", ".join(word for word, _ in judged)
        params = FACTS.model_copy(update={"prompt": FACTS.prompt.replace("{{word}}", asked)})
        return Lesson(score.prompt(params, row), told(judged))


def matches(liked: demo.Preference, look: demo.Look) -> Judged:
    """The words of a look in the order of its caption, and whether each is what is liked."""
    return [(look[name], liked[name] == look[name]) for name in ("pattern", "colour", "category")]


def told(judged: Judged) -> str:
    return ", ".join(f"{word} {'yes' if true else 'no'}" for word, true in judged)
