"""Why: every chain, read back from an environment made by running the real stages with the scripted engine."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pytest

from mllmsrec_core.errors import UsageError
from tasks.config import Config, Pipeline, Settings
from tasks.overrule import correct
from tasks.report.shown import Shown
from tasks.why import Link, trace, why
from tasks.work import Work, open_work


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, run_all: Callable[..., Any]) -> Work:
    """Every stage on a shop of 40 items and 12 users, summaries with visual questions, published as `dev`."""
    settings = Settings(store=str(tmp_path_factory.mktemp("why") / "store"))
    params: dict[str, Any] = {"ingest": {"demo": {"items": 40, "users": 12}}, "summary": {"picture": "both"}}
    config = Config(settings, Pipeline(model="scripted", **params))
    run_all(config)
    return open_work(config.to_json())


def table(work: Work, name: str) -> pl.DataFrame:
    frame = Shown(work.store, "dev").table(name)
    assert frame is not None
    return frame


def links(tree: list[Link] | tuple[Link, ...]) -> list[Link]:
    """Every link of the tree, depth first."""
    return [found for link in tree for found in (link, *links(link.below))]


def swapped(work: Work, env: str, name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """`dev` again under another name, with one table changed."""
    stages = work.store.envs.current("dev")["stages"]
    for record in stages.values():
        if name in record["tables"]:
            p = work.store.tables.publish(name, change(table(work, name)), {})
            record["tables"][name] = {"write_id": p.write_id, "digest": p.digest, "rows": p.rows}
    work.store.envs.move(env, stages)


# --- an item ---


def test_an_item_is_traced_to_its_picture_and_the_literal_text_of_every_question(work: Work) -> None:
    told = "\n".join(why(work, "dev", item="I0003"))
    item = table(work, "items").row(by_predicate=pl.col("item_id") == "I0003", named=True)
    image = table(work, "images").row(by_predicate=pl.col("item_id") == "I0003", named=True)
    summary = table(work, "item_summaries").row(by_predicate=pl.col("item_id") == "I0003", named=True)
    caption = table(work, "captions").row(by_predicate=pl.col("sha256") == image["sha256"], named=True)
    assert item["image_uri"] in told and image["sha256"] in told and item["title"] in told
    assert f"user | {work.params['caption'].prompt}" in told
    assert f"user | Title: «{item['title']}»" in told
    assert all(f"user | {question}" in told for question in work.params["summary"].questions)
    assert f"user | Text: «{summary['text_summary']}»" in told
    assert caption["caption"] in told and summary["summary"] in told
    assert "claim 1:" in told and "of other pictures" in told


def test_every_question_of_an_item_is_one_the_store_holds_with_its_answer(work: Work) -> None:
    for link in links(trace(work.store, "dev", item="I0003")):
        for name in link.asked:
            assert work.store.replies.question(name) and work.store.replies.find(name)
    assert not any("not in the store" in line for line in why(work, "dev", item="I0003"))


def test_the_summary_names_its_three_kinds_of_questions_in_order(work: Work) -> None:
    (summary,) = (link for link in links(trace(work.store, "dev", item="I0003")) if link.heading.startswith("summary"))
    asked = [work.store.replies.question(name) for name in summary.asked]
    said = [ask["messages"][0]["parts"][0] for ask in asked if ask]
    assert said[0].startswith("Summarise") and said[-1].startswith("Write one sentence")
    assert tuple(said[1:-1]) == work.params["summary"].questions


def test_a_summary_whose_inputs_changed_shows_its_last_question_and_says_so(work: Work) -> None:
    swapped(work, "changed", "captions", lambda frame: frame.with_columns(caption=pl.lit("something else")))
    told = "\n".join(why(work, "changed", item="I0003"))
    assert "only its last question is shown" in told and "Write one sentence" in told


def test_an_item_without_a_picture_is_told_as_such(work: Work) -> None:
    swapped(work, "bare", "items", lambda frame: frame.with_columns(image_uri=pl.lit(None, pl.String)))
    assert any("the dataset names none" in line for line in why(work, "bare", item="I0003"))


# --- a user ---


def test_each_step_lists_the_items_whose_summaries_its_prompt_read(work: Work) -> None:
    summaries = dict(table(work, "item_summaries").select("item_id", "summary").iter_rows())
    users = table(work, "preferences")["user_id"].unique().sort()
    assert len(users) == 12
    for user in users:
        for step in trace(work.store, "dev", user=user)[0].below[:-1]:
            ask = work.store.replies.question(step.asked[0])
            assert ask is not None
            prompt = ask["messages"][0]["parts"][0]
            read = [link.heading.removeprefix("item ").split(":")[0] for link in step.below]
            lines = [f"{number}. «{summaries[item]}»" for number, item in enumerate(read, 1)]
            assert "\n".join(lines) in prompt


def test_a_user_is_told_by_steps_and_recommendations_best_first(work: Work) -> None:
    preferences = table(work, "preferences").filter(pl.col("user_id") == "U0001").sort("step")
    best = table(work, "recommendations").filter(pl.col("user_id") == "U0001").sort("rank")["item_id"]
    (user,) = trace(work.store, "dev", user="U0001")
    assert [link.heading for link in user.below[:-1]] == [
        f"preference step {step}: {text}" for step, text in preferences.select("step", "preference").iter_rows()
    ]
    assert [link.heading.split("item ")[1].split(":")[0] for link in user.below[-1].below] == best.to_list()


# --- a score ---


def test_a_score_is_traced_to_its_prompt_its_steps_its_items_and_their_pictures(work: Work) -> None:
    scores, examples = table(work, "scores"), table(work, "examples")
    row = scores.filter(pl.col("split") == "test").row(5, named=True)
    example = examples.row(
        by_predicate=(pl.col("user_id") == row["user_id"])
        & (pl.col("split") == "test")
        & (pl.col("item_id") == row["item_id"]),
        named=True,
    )
    tree = trace(work.store, "dev", item=row["item_id"], user=row["user_id"])
    assert tree[0].asked == (row["ask"],)
    told = "\n".join(why(work, "dev", item=row["item_id"], user=row["user_id"]))
    ask = work.store.replies.question(row["ask"])
    assert ask is not None
    text, picture = ask["messages"][0]["parts"]
    assert all(f"user | {line}" in told for line in text.split("\n")) and picture["sha256"] in told
    steps = [link for link in links([tree[0]]) if link.heading.startswith("preference step")]
    assert len(steps) == example["step"]
    assert all(item.heading.startswith("item ") for step in steps for item in step.below)


def test_a_question_and_an_item_are_written_out_once(work: Work) -> None:
    row = table(work, "scores").row(0, named=True)
    told = why(work, "dev", item=row["item_id"], user=row["user_id"])
    openings = [line.strip() for line in told if line.strip().startswith("question ") and "written out" not in line]
    assert len(openings) == len(set(openings))


def test_an_item_that_was_never_a_candidate_says_what_was(work: Work) -> None:
    mine = table(work, "scores").filter(pl.col("user_id") == "U0001")["item_id"]
    other = next(item for item in table(work, "items")["item_id"] if item not in mine.to_list())
    told = why(work, "dev", item=other, user="U0001")
    assert told[0] == f"item {other} was never scored for user U0001" and mine[0] in told[1]


# --- what is missing, wrong or hostile ---


@pytest.mark.parametrize(("wanted", "hint"), [({"item": "I003"}, "I003"), ({"user": "u0001"}, "`U0001`")])
def test_an_unknown_id_is_a_usage_error_that_names_the_nearest(work: Work, wanted: dict[str, str], hint: str) -> None:
    with pytest.raises(UsageError, match=f"the nearest is .*{hint}"):
        why(work, "dev", **wanted)


def test_nothing_named_is_a_usage_error_with_the_commands(work: Work) -> None:
    with pytest.raises(UsageError, match="mllmsrec why item"):
        why(work, "dev")


def test_stages_that_have_not_run_are_said(work: Work) -> None:
    stages = work.store.envs.current("dev")["stages"]
    work.store.envs.move("young", {name: stages[name] for name in ("ingest", "images")})
    item, user = ("\n".join(why(work, "young", **name)) for name in ({"item": "I0003"}, {"user": "U0001"}))
    assert "stage caption has not seen" in item and "stage summary has not seen" in item
    assert "no step was asked" in user and "stage score has not run" in user


def test_control_characters_never_reach_the_terminal(work: Work) -> None:
    swapped(work, "escape", "items", lambda frame: frame.with_columns(title=pl.lit("\x1b[2J\x07wiped\u202e")))
    told = why(work, "escape", item="I0003")
    assert any("wiped" in line for line in told)
    assert all(line.isprintable() for line in told)


# --- what was overruled ---


def test_a_correction_is_shown_with_who_when_and_why_beside_the_answer_it_overruled(work: Work) -> None:
    image = table(work, "images").row(by_predicate=pl.col("item_id") == "I0007", named=True)
    row = table(work, "captions").row(by_predicate=pl.col("sha256") == image["sha256"], named=True)
    assert not any("replaced on" in line for line in why(work, "dev", item="I0007"))
    correct(work, "dev", "I0007", text="A mug of glass.", why="it is see-through", by="Ada")
    correct(work, "dev", "I0007", ban=True, why="of another shop", by="")
    told = why(work, "dev", item="I0007")
    made = [line.strip() for line in told if " UTC by " in line]
    at = f"{datetime.now(UTC):%Y-%m-%d}"
    assert made[0].startswith(f"replaced on {at}") and made[0].endswith("by Ada: it is see-through")
    assert made[1].startswith(f"banned on {at}") and made[1].endswith("by nobody named: of another shop")
    assert any(f"the model's own answer: {row['caption']}" in line for line in told)
    assert any("failed, banned: of another shop" in line for line in told)
