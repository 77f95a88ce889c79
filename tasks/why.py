"""From a score, a user or an item to every question behind it, with the literal text of each and its answer.

`trace` builds a tree of what was read from what; `text` writes it out, with questions and answers as stored.
Only the last question of a summary is named in its table; the ones before are found by walking the stage's own chain
over stored answers. Asks nothing. Shows what untrusted titles and models said with control characters taken out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import polars as pl

from mllmsrec_core.ask import Model, Reply, key
from mllmsrec_core.errors import UsageError
from mllmsrec_core.stage import Inputs
from mllmsrec_core.stages import summary
from storage.store import Store
from tasks.report.shown import Shown, first, of, read_by

if TYPE_CHECKING:
    from tasks.work import Work

SHORT = 12  # hex digits of a key or digest in running text
INDENT = "  "
_CORRECTED = {"replace": "replaced", "ban": "banned", "reask": "opened again"}


@dataclass(frozen=True)
class Link:
    """Something read or written: what it is, facts about it, the questions asked for it, what it was made of."""

    heading: str
    facts: tuple[str, ...] = ()
    asked: tuple[bytes, ...] = ()
    below: tuple[Link, ...] = ()


def why(work: Work, env: str, item: str | None = None, user: str | None = None) -> list[str]:
    """Lines of text, from the top of the chain down. Raises UsageError for ids the environment does not know.

    `item` alone gives the item's chain, `user` alone the preference steps and top recommendations, both the scores of
    the one for the other and everything they rest on.
    """
    return text(work.store, trace(work.store, env, item, user))


def trace(store: Store, env: str, item: str | None = None, user: str | None = None) -> list[Link]:
    """The chain as a tree."""
    if item is None and user is None:
        raise UsageError(
            "name an item, a user or both: mllmsrec why item I, mllmsrec why user U, mllmsrec why user U item I"
        )
    chain = Chains(Shown(store, env))
    if item is not None:
        chain.must_know("items", "item_id", item)
    if user is not None:
        chain.must_know("interactions", "user_id", user)
    if user is None:
        return [chain.item(str(item))]
    return [chain.user(user)] if item is None else chain.score(user, item)


@dataclass
class Chains:
    """Builds links from one environment's tables; an item is told in full once."""

    shown: Shown
    told: set[str] = field(default_factory=set)

    def must_know(self, table: str, column: str, name: str) -> None:
        frame = self.shown.table(table)
        what = column.removesuffix("_id")
        if frame is None:
            raise UsageError(f"environment `{self.shown.env}` has no table `{table}`; run: mllmsrec run --stage ingest")
        known = frame[column].unique().to_list()
        if name not in known:
            close = get_close_matches(name, known, n=1, cutoff=0.0)
            raise UsageError(
                f"there is no {what} `{name}` in environment `{self.shown.env}`; the nearest is `{close[0]}`"
            )

    def rows(self, table: str, column: str, value: Any) -> pl.DataFrame:
        """The rows of a table about one thing; none where the table is not there."""
        frame = self.shown.table(table)
        return pl.DataFrame() if frame is None else of(value, column, frame)

    # --- an item ---

    def item(self, item: str) -> Link:
        """Title and words, picture, caption, summary, and the audit's verdicts on both."""
        row = first(self.rows("items", "item_id", item))
        heading = f"item {item}: {row.get('title') or 'without a title'}"
        if item in self.told:
            return Link(f"{heading} (told above)")
        self.told.add(item)
        facts = tuple(f"{name}: {row[name]}" for name in ("category", "description", "attributes") if row.get(name))
        image = first(self.rows("images", "item_id", item))
        below = [self.picture(row, image)]
        if image.get("status") == "ok":
            below.append(self.caption(image["sha256"]))
        return Link(heading, facts, (), (*below, self.summary(row, image)))

    def picture(self, item: dict[str, Any], image: dict[str, Any]) -> Link:
        if not item.get("image_uri"):
            return Link("picture: the dataset names none")
        facts = [f"uri: {item['image_uri']}"]
        if not image:
            return Link("picture: stage images has not run", tuple(facts))
        if image["status"] != "ok":
            facts.append(f"why: {image['reason']}: {image['detail'] or 'no detail'}")
            return Link(f"picture: {image['status']}", tuple(facts), _keys(image))
        size = f", {image['width']} x {image['height']} pixels" if image["width"] else ""
        if (original := image.get("original_sha256")) and original != image["sha256"]:
            facts.append(f"scaled down from: {original}")
        return Link(f"picture {image['sha256']}{size}", tuple(facts), _keys(image))

    def caption(self, sha256: str) -> Link:
        row = first(self.rows("captions", "sha256", sha256))
        if not row:
            return Link("caption: none; stage caption has not seen this picture")
        return Link(f"caption: {row['caption'] or row['error']}", (), _keys(row), self.verdicts("caption", sha256))

    def summary(self, item: dict[str, Any], image: dict[str, Any]) -> Link:
        row = first(self.rows("item_summaries", "item_id", item["item_id"]))
        if not row:
            return Link("summary: none; stage summary has not seen this item")
        facts = (f"made of: {row['modality']}", f"text summary: {row['text_summary']}", f"picture: {row['caption']}")
        asked = self.summary_questions(item, image)
        if _keys(row) != asked[-1:]:
            facts = (*facts, "only its last question is shown: what it was made of has changed since")
            asked = _keys(row)
        below = self.verdicts("summary", item["item_id"])
        return Link(f"summary: {row['summary'] or row['error']}", facts, asked, below)

    def summary_questions(self, item: dict[str, Any], image: dict[str, Any]) -> tuple[bytes, ...]:
        """Every question of the item's chain, as far as stored answers lead."""
        made = self.shown.stages["summary"]["parts"]
        params = {"summary": summary.Params.model_validate(made["params"]["summary"])}
        sha256 = image.get("sha256") if image.get("status") == "ok" else None
        caption = first(self.rows("captions", "sha256", sha256)).get("caption") if sha256 else None
        chain = summary.ask(Inputs({}, params, Model(**made["model"])), {**item, "sha256": sha256, "caption": caption})
        asked: list[bytes] = []
        reply: Reply | None = None
        try:
            while True:
                ask = next(chain) if reply is None else chain.send(reply)
                asked.append(name := key(ask))
                reply = self.shown.store.replies.get(ask, name)
                if reply is None:
                    return tuple(asked)
        except StopIteration:
            return tuple(asked)

    def verdicts(self, subject: str, subject_id: str) -> tuple[Link, ...]:
        claims = self.rows("audit", "subject_id", subject_id)
        claims = claims.filter(pl.col("subject") == subject).sort("n") if len(claims) else claims
        return tuple(Link(_verdict(row), (), _keys(row)) for row in claims.iter_rows(named=True))

    # --- a user ---

    def user(self, user: str) -> Link:
        """Every preference step, with the items it read in one line each, and the top recommendations."""
        history = self.rows("interactions", "user_id", user)
        facts = (f"{len(history)} interactions, {history['liked'].sum()} liked",)
        return Link(f"user {user}", facts, (), (*self.steps(user), self.recommended(user)))

    def steps(self, user: str, upto: int | None = None, only: bool = False, whole: bool = False) -> list[Link]:
        """The user's steps, up to one or only that one; `whole` tells their items in full."""
        rows = self.rows("preferences", "user_id", user)
        if rows.is_empty():
            return [Link("preference: no step was asked for this user")]
        rows = rows.sort("step").filter(pl.lit(upto is None) | (pl.col("step") <= (upto or 0)))
        liked = self.rows("interactions", "user_id", user).filter("liked")
        return [self.step(row, liked, whole) for row in (rows.tail(1) if only else rows).iter_rows(named=True)]

    def step(self, row: dict[str, Any], liked: pl.DataFrame, whole: bool) -> Link:
        facts = [f"reads {row['n_items']} liked items, the newest at seq {row['upto_seq']}"]
        if row["error"]:
            facts.append(f"failed ({row['error']}): the preference before it stands")
        items = tuple(self.item(item) if whole else self.brief(item) for item in read_by(row, liked))
        return Link(f"preference step {row['step']}: {row['preference']}", tuple(facts), _keys(row), items)

    def brief(self, item: str) -> Link:
        title = first(self.rows("items", "item_id", item)).get("title") or "without a title"
        words = first(self.rows("item_summaries", "item_id", item)).get("summary")
        return Link(f"item {item}: {title}" + (f"; summary: {words}" if words else ""))

    def recommended(self, user: str) -> Link:
        rows = self.rows("recommendations", "user_id", user)
        if rows.is_empty():
            return Link("recommendations: none; stage score has not run, or nothing of this user could be scored")
        rows = rows.sort("rank")
        below = [
            Link(f"{row['rank']}. {self.brief(row['item_id']).heading}; logit {row['score']:+.4f}")
            for row in rows.iter_rows(named=True)
        ]
        return Link("recommendations, best first", (), (), tuple(below))

    # --- a score ---

    def score(self, user: str, item: str) -> list[Link]:
        """The scores of the item for the user, and all they read; where there is none, both chains by themselves."""
        mine = self.rows("scores", "user_id", user)
        rows = (
            mine.filter(pl.col("item_id") == item).sort("split", "target_seq", descending=True) if len(mine) else mine
        )
        if rows.is_empty():
            asked = mine["item_id"].unique().sort().to_list() if len(mine) else []
            fact = f"scored for this user: {', '.join(asked)}" if asked else "nothing was scored for this user"
            return [Link(f"item {item} was never scored for user {user}", (fact,)), self.item(item), self.user(user)]
        return [self.one_score(row, mine) for row in rows.iter_rows(named=True)]

    def one_score(self, row: dict[str, Any], mine: pl.DataFrame) -> Link:
        same = (pl.col("split") == row["split"]) & (pl.col("target_seq") == row["target_seq"])
        n = len(mine.filter(same))
        examples = self.rows("examples", "user_id", row["user_id"])
        example = first(examples.filter(same, pl.col("item_id") == row["item_id"]) if len(examples) else examples)
        step = example.get("step")
        facts = [
            f"{row['split']} list of the choice at seq {row['target_seq']}: rank {row['rank']:g} of {n}",
            "it is the held-out choice" if row["label"] else "it is a negative, not the user's choice",
            _probabilities(row),
        ]
        if example:
            facts.append(
                f"candidate set {example['candidate_set']}; of the user it reads up to seq {example['history_seq']}"
            )
        below = [*self.adapter(), self.item(row["item_id"])]
        if step is None:
            below.append(Link("preference: the prompt had none, for no step ends before the choice"))
        else:
            alone = self.shown.params("preference").get("mode") != "recurrent"  # other modes read no step before
            below += self.steps(row["user_id"], step, only=alone, whole=True)
        heading = f"score of item {row['item_id']} for user {row['user_id']}: "
        heading += f"logit {row['logit']:+.4f}" if row["logit"] is not None else f"none ({row['error']})"
        return Link(heading, tuple(facts), _keys(row), tuple(below))

    def adapter(self) -> list[Link]:
        """The adapters of the environment; a score's question names the one it used."""
        table = self.shown.table("adapters")
        rows = [] if table is None else table.iter_rows(named=True)
        return [
            Link(
                f"adapter {row['name']}: {row['sha256'] or row['error']}",
                (f"{row['n_examples']} examples",),
                _keys(row),
            )
            for row in rows
        ]


def _keys(row: dict[str, Any]) -> tuple[bytes, ...]:
    return (row["ask"],) if row.get("ask") else ()


def _verdict(row: dict[str, Any]) -> str:
    line = f"claim {row['n']}: {row['claim']}: {row['verdict'] or row['error'] or 'not judged'}"
    if row["quantile"] is not None:
        line += (
            f", similarity {row['similarity']:.3f}, fits better than {100 * row['quantile']:.0f} % of other pictures"
        )
    return line


def _probabilities(row: dict[str, Any]) -> str:
    named = (("p(yes)", "p_yes"), ("calibrated", "p_calibrated"), ("mass of both answers", "mass"))
    return ", ".join(f"{label} {row[name]:.4f}" for label, name in named if row[name] is not None) or "no probability"


# --- writing it out -------------------------------------------------------------------------------------------------


def text(store: Store, links: Iterable[Link]) -> list[str]:
    """The tree as indented lines; questions are looked up in one pass, and written in full where they first stand."""
    links = list(links)
    questions = store.replies.questions({name for link in links for name in _asked(link)})
    written: set[bytes] = set()
    return [line for link in links for line in _lines(link, "", store, questions, written)]


def _asked(link: Link) -> list[bytes]:
    return [*link.asked, *(name for child in link.below for name in _asked(child))]


def _lines(
    link: Link, indent: str, store: Store, questions: dict[bytes, dict[str, Any]], written: set[bytes]
) -> list[str]:
    lines = [indent + plain(link.heading), *(indent + INDENT + plain(fact) for fact in link.facts)]
    for name in link.asked:
        if name in written:
            lines.append(f"{indent}{INDENT}question {name.hex()[:SHORT]}: written out above")
            continue
        written.add(name)
        exchange = _exchange(name, questions.get(name), store.replies.find(name))
        lines += (indent + INDENT + line for line in [*exchange, *_corrections(store, name)])
    for child in link.below:
        lines += _lines(child, indent + INDENT, store, questions, written)
    return lines


def plain(value: object) -> str:
    """One line without control characters: what a terminal shows, and nothing it would obey."""
    return "".join(character if character.isprintable() else "�" for character in str(value))


def _exchange(name: bytes, ask: dict[str, Any] | None, found: tuple[str, Reply] | None) -> list[str]:
    """A question and its answer."""
    lines = [f"question {name.hex()[:SHORT]}" + (f", {_to(ask)}" if ask else ": its text is not in the store")]
    lines += [INDENT + line for line in (_wording(ask) if ask else [])]
    if found is None:
        return [*lines, "answer: not in the store"]
    kind, reply = found
    cost = [f"{n:,} {what}" for n, what in ((reply.tokens_in, "tokens in"), (reply.tokens_out, "tokens out")) if n]
    about = ", ".join([reply.engine, *cost, f"{reply.seconds:.2f} s"]).lstrip(", ")
    return [*lines, plain(f"answer ({about}): {_answer(kind, reply)}")]


def _corrections(store: Store, name: bytes) -> list[str]:
    """Every correction of a question, oldest first, behind the answer that the model gave."""
    made = store.corrections.history(name)
    given = store.replies.given(name) if made else None
    lines = [plain(f"{INDENT}the model's own answer: {_answer(*given)}")] if given else []
    for one in made:
        at, by = f"{one.at:%Y-%m-%d %H:%M} UTC", one.by or "nobody named"
        lines.append(plain(f"{INDENT}{_CORRECTED[one.action]} on {at} by {by}: {one.reason}"))
    return lines


def _to(ask: dict[str, Any]) -> str:
    """Kind, exact model and decoding."""
    parts = [ask["kind"]]
    if model := ask.get("model"):
        parts += [f"{model['name']}@{model['revision'][:SHORT]}", model["dtype"]]
        parts += [model["quantisation"]] if model["quantisation"] != "none" else []
        parts += [f"adapter {model['adapter'][:SHORT]}"] if model["adapter"] else []
        parts += [f"pictures up to {model['max_pixels']:,} pixels"] if model["max_pixels"] else []
    parts += [f"at most {ask['max_pixels']:,} pixels"] if ask.get("max_pixels") else []
    if decoding := ask.get("decoding"):
        drawn = "greedy" if not decoding["temperature"] else f"temperature {decoding['temperature']}"
        parts += [f"at most {decoding['max_tokens']} tokens", drawn]
    return plain(", ".join(parts))


def _wording(ask: dict[str, Any]) -> list[str]:
    """What was asked, word for word; pictures by their sha256."""
    lines = [
        f"{message['role']} | {plain(line)}"
        for message in ask.get("messages", ())
        for part in message["parts"]
        for line in _part(part)
    ]
    lines += [f"choice {label}: {', '.join(map(repr, forms))}" for label, forms in ask.get("choices", ())]
    if "content" in ask:
        lines += [plain(line) for line in _part(ask["content"])]
    return lines + [
        f"{name}: {plain(ask[name])}" for name in ("uri", "version", "recipe", "digest") if _shown(ask, name)
    ]


def _shown(ask: dict[str, Any], name: str) -> bool:
    """`version` is that of the picture for a Fetch, and that of the key's form for the other kinds."""
    return name in ask and (name != "version" or ask["kind"] == "fetch")


def _part(part: str | dict[str, Any]) -> list[str]:
    return part.split("\n") if isinstance(part, str) else [f"[picture {part['sha256']}]"]


def _answer(kind: str, reply: Reply) -> str:
    if reply.error:
        return f"failed, {reply.error}: {reply.detail}"
    match kind:
        case "choose":
            logs = ", ".join(f"log p({name}) {value:.4f}" for name, value in reply.value["logprobs"].items())
            return f"{logs}, mass {reply.value['mass']:.4f}"
        case "embed":
            return f"a unit vector of {len(reply.value)} numbers"
        case "train":
            return f"adapter {reply.value['sha256']}"
        case "fetch":
            return f"{reply.value['sha256']}, {reply.value['width']} x {reply.value['height']} pixels"
    return str(reply.value)
