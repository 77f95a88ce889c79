"""Shards ask and the stage publishes: the same tables, nothing asked again, and a lost shard costs its own rows alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmsrec_core.ask import Ask, Generate, Reply
from mllmsrec_core.errors import EngineError, TooManyErrors, UsageError
from storage.presence import live, present
from tasks.runner import Counts, Elsewhere, How
from tasks.shards import ROWS_A_SHARD, Share, answer, divided_by, divisible, number_of_shards, refuse_unshared, together
from tasks.stage_task import STAGE_BY_NAME, gather, perform
from tasks.work import Work, open_work

sys.path.append(str(Path(__file__).parent))
import toy

SHARDS = 3
DIVIDED = ("images", "caption", "summary", "preference", "score", "audit")
Runs = Callable[..., dict[str, Any]]


def process(config: Any) -> Work:
    """The work as a new process opens it: it knows what the store holds and nothing else."""
    open_work.cache_clear()
    return open_work(config.to_json())


def asked(config: Any, name: str, stages: dict[str, Any], numbers: Any = range(SHARDS)) -> Elsewhere:
    """What these shards of the stage asked, each in a process of its own."""
    made = [answer(process(config), name, Share(n, SHARDS), stages, How()) for n in numbers]
    return together(made, 0.0)


def up_to(config: Any, last: str) -> dict[str, Any]:
    """The records of every stage before `last`, made without shards."""
    work, stages = process(config), {}
    for name in list(STAGE_BY_NAME)[: list(STAGE_BY_NAME).index(last)]:
        stages[name], _ = perform(work, name, stages, How())
    return stages


def digests(records: dict[str, Any]) -> dict[str, str]:
    return {table: made["digest"] for record in records.values() for table, made in record["tables"].items()}


def answering(work: Work, engine: Any) -> Work:
    """The same work, whose every question goes to `engine`."""
    return replace(work, engine_for=lambda ask: engine)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=60), st.integers(1, 20))
def test_every_row_falls_to_one_share_and_equal_rows_to_the_same(values, of):
    rows = pl.DataFrame({"user_id": values, "place": range(len(values))}, {"user_id": pl.String, "place": pl.Int64})
    shares = [Share(number, of).keep(rows, "user_id") for number in range(of)]
    assert sorted(place for share in shares for place in share["place"]) == list(range(len(values)))
    assert all(share["place"].is_sorted() for share in shares)
    held = [set(share["user_id"]) for share in shares]
    assert sum(map(len, held)) == len(set(values))


def test_shares_are_of_about_equal_size():
    rows = pl.DataFrame({"user_id": [f"user {n}" for n in range(8_000)]})
    sizes = [len(Share(number, 8).keep(rows, "user_id")) for number in range(8)]
    assert min(sizes) > 850 and max(sizes) < 1_150  # 5 standard deviations of a binomial around 1,000


def test_a_stage_asks_nothing_that_its_shards_asked_and_publishes_the_same_tables(small, ran, tmp_path):
    config, stages = small(tmp_path / "divided"), {}
    for name, stage in STAGE_BY_NAME.items():
        elsewhere = asked(config, name, stages) if divisible(process(config), stage) else None
        stages[name], _ = perform(process(config), name, stages, How(elsewhere=elsewhere))
    assert digests(stages) == digests(ran)
    for name in DIVIDED:
        counts, alone = stages[name]["counts"], ran[name]["counts"]
        assert counts["asked"] == counts["asked_by_shards"] >= alone["asked"] > 0
        assert counts["known"] + counts["asked"] == alone["known"] + alone["asked"]
    for name in ("caption", "preference", "score"):  # no question of theirs belongs to rows of two shards
        assert told(stages[name]) == told(ran[name])


def test_a_lost_shard_costs_the_questions_of_its_own_rows_alone(small, ran, tmp_path):
    config = small(tmp_path / "divided")
    stages = up_to(config, "caption")
    elsewhere = asked(config, "caption", stages, [0, 2])
    record, _ = perform(process(config), "caption", stages, How(elsewhere=elsewhere))
    lost = ran["caption"]["counts"]["asked"] - elsewhere.counts.asked
    assert 0 < lost < ran["caption"]["counts"]["asked"]
    assert record["counts"]["asked"] - record["counts"]["asked_by_shards"] == lost
    assert record["tables"]["captions"]["digest"] == ran["caption"]["tables"]["captions"]["digest"]


def told(record: dict[str, Any]) -> dict[str, int]:
    """What a record says of questions and answers, wherever they were asked."""
    names = ("rows", "done", "failed", "known", "asked", "unreached", "passing", "tokens_in", "tokens_out", "images")
    return {name: record["counts"][name] for name in names}


class Dying(toy.Watched):
    async def answer(self, ask: Ask) -> Reply:
        if len(self.answered) >= 3:
            raise EngineError("the node is gone")
        return await super().answer(ask)


def test_what_a_shard_had_asked_when_its_engine_died_is_kept(small, ran, tmp_path):
    config = small(tmp_path / "divided")
    stages = up_to(config, "caption")
    work = process(config)
    with pytest.raises(EngineError, match="the node is gone"):
        answer(answering(work, Dying(work.store)), "caption", Share(0, 2), stages, How(window=1))
    record, _ = perform(process(config), "caption", stages, How())
    assert record["counts"]["known"] == 3
    assert record["tables"]["captions"]["digest"] == ran["caption"]["tables"]["captions"]["digest"]


class Refusing(toy.Watched):
    async def answer(self, ask: Ask) -> Reply:
        self.answered.append(ask)
        return Reply(error="context_too_long") if isinstance(ask, Generate) else await super().answer(ask)


def test_too_many_failed_rows_end_a_shard_quietly_and_the_stage_as_ever(small, tmp_path):
    config = small(tmp_path / "divided")
    stages = up_to(config, "caption")
    work = process(config)
    counts = answer(answering(work, Refusing(work.store)), "caption", Share(0, 2), stages, How())
    assert counts.failed == counts.asked > 0
    work = process(config)
    with pytest.raises(TooManyErrors, match=r"caption: .*\(context_too_long"):
        perform(answering(work, Refusing(work.store)), "caption", stages, How(elsewhere=together([counts], 0)))


@pytest.mark.parametrize("lost", [[], [1]])
def test_what_shards_asked_is_published_although_the_time_is_over(small, tmp_path, lost):
    config = small(tmp_path / "divided")
    stages = up_to(config, "caption")
    elsewhere = asked(config, "caption", stages, [n for n in range(SHARDS) if n not in lost])
    how = How(deadline=time.time() - 1, elsewhere=elsewhere)
    record, _ = perform(process(config), "caption", stages, how)
    counts = record["counts"]
    assert counts["done"] == elsewhere.counts.done == counts["rows"] - counts["unreached"]
    assert bool(counts["unreached"]) == bool(lost)
    assert counts["asked"] == counts["asked_by_shards"]


def order_asked(config: Any, stages: dict[str, Any], rival: str) -> list[Any]:
    """The pictures one shard asks about, in order, while a process of the name `rival` is at work."""
    work = process(config)
    engine = toy.Watched(work.store)
    with present(work.store.files, rival):
        answer(answering(work, engine), "caption", Share(0, 2), stages, How(window=1))
    return [ask.messages for ask in engine.started if isinstance(ask, Generate)]


def test_other_shards_are_no_rivals_and_the_same_shard_of_another_run_is_one(small, tmp_path):
    configs = [small(tmp_path / str(n)) for n in range(3)]
    rivals = ("elsewhere", "caption.1of2", "caption.0of2")
    alone, beside, against = (order_asked(c, up_to(c, "caption"), r) for c, r in zip(configs, rivals, strict=True))
    assert len(alone) > 1
    assert beside == alone
    assert against == alone[::-1]


def test_whoever_removes_something_from_the_store_sees_a_shard_at_work(small, tmp_path):
    config, seen = small(tmp_path / "divided"), list[str]()

    class Looking(toy.Watched):
        async def answer(self, ask: Ask) -> Reply:
            seen.extend(live(work.store.files))
            return await super().answer(ask)

    stages, work = up_to(config, "caption"), process(config)
    answer(answering(work, Looking(work.store)), "caption", Share(0, 2), stages, How())
    assert seen and live(work.store.files) == []


def test_the_time_of_the_shards_counts_as_the_stages_own(small, tmp_path):
    config = small(tmp_path / "divided")
    stages = up_to(config, "caption")
    elsewhere = replace(asked(config, "caption", stages), seconds=1_000.0)
    work = process(config)
    record, _ = perform(work, "caption", stages, How(elsewhere=elsewhere))
    assert 1_000 <= record["seconds"] < 1_100
    assert work.store.envs.rate("caption", "scripted@1") == pytest.approx(24 / 1_000, rel=0.1)


def test_passing_failures_of_a_shard_are_asked_again_and_counted_once_known():
    shards = Elsewhere(Counts(asked=10, passing=3), 1.0, 2)
    counts = shards.added(Counts(known=9, asked=3))
    assert (counts.asked, counts.asked_by_shards, counts.known) == (13, 10, 2)


def test_rows_that_are_carried_over_are_no_shards_work(small, ran):
    work = process(small())
    counts = answer(work, "caption", Share(0, 1), ran, How(), before=ran)
    assert (counts.rows, counts.asked) == (0, 0)


def test_a_stage_is_divided_where_there_are_rows_enough_and_something_to_ask(small, tmp_path):
    config = small(tmp_path / "divided", settings__shards=2)
    stages = up_to(config, "audit")
    less = {name: record for name, record in stages.items() if name != "caption"}
    work = process(small(tmp_path / "divided", settings__shards=2, caption__prompt='"What is it?"'))
    assert number_of_shards(work, "caption", less, How()) == 2
    assert number_of_shards(work, "caption", less, How(retry=frozenset({"all"}))) == 0
    assert number_of_shards(process(config), "caption", less, How()) == 0, "its record stands"
    many = process(small(tmp_path / "divided", settings__shards=1_000, caption__prompt='"What is it?"'))
    assert number_of_shards(many, "caption", less, How()) == 24 // ROWS_A_SHARD
    few = process(small(tmp_path / "divided", preference__max_tokens=11))
    assert number_of_shards(few, "preference", stages, How()) == 0, "six users are too few"
    assert [name for name, stage in STAGE_BY_NAME.items() if divisible(work, stage)] == list(DIVIDED)


def test_pictures_in_a_folder_are_fetched_by_the_run_itself(small, tmp_path):
    def images_divided(path: str) -> bool:
        return divisible(process(small(ingest__path=f'"{path}"')), STAGE_BY_NAME["images"])

    assert not images_divided(str(tmp_path))
    assert images_divided("memory://shop")


def test_score_is_divided_by_what_its_prompts_begin_with(small, ran):
    for layout, column in (("user_first", "user_id"), ("image_first", "item_id")):
        work = process(small(score__layout=f'"{layout}"'))
        inputs, _ = gather(work, STAGE_BY_NAME["score"], ran)
        assert divided_by(STAGE_BY_NAME["score"], inputs) == column


def test_a_shard_of_another_version_of_the_package_asks_nothing(small, ran):
    work = process(small())
    with pytest.raises(UsageError, match="another version of the package"):
        answer(work, "caption", Share(0, 2), ran, How(), code="0" * 16)


def test_shards_refuse_what_other_processes_would_not_find(small, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refuse_unshared(small())
    refuse_unshared(small("s3://bucket/store", ingest__path=f'"{tmp_path}"', model=f'"{tmp_path}/models/mine"'))
    for store in ("memory://here", "./store", "store", "file://store"):
        with pytest.raises(UsageError, match="store"):
            refuse_unshared(small(store))
    with pytest.raises(UsageError, match=f"ingest.path = `models` .* write {tmp_path}/models"):
        refuse_unshared(small(ingest__path='"models"'))
    with pytest.raises(UsageError, match=f"model models/mine .* write {tmp_path}/models/mine"):
        refuse_unshared(small(caption__model='"models/mine"'))
