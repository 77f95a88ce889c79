"""What is reused, what is pinned, and who goes first."""

from __future__ import annotations

import polars as pl
import pytest

from mllmsrec_core.errors import UsageError
from tasks.active import active_first
from tasks.measure import measure
from tasks.runner import How
from tasks.stage_task import STAGE_BY_NAME, Lazy, gather, perform
from tasks.work import open_work

MORE = {"ingest__demo__users": 8}


def adapter(records: dict) -> str:
    return records["sft"]["tables"]["adapters"]["digest"]


def test_new_data_leave_the_adapter_that_the_environment_pins(small, ran, run_all, planned):
    plan = planned(small(**MORE))
    after = run_all(small(**MORE))
    assert after["examples"]["tables"] != ran["examples"]["tables"], "there are new train examples"
    assert (adapter(after), plan["sft"].due.high) == (adapter(ran), 0)
    assert "--retrain" in plan["sft"].note and not planned(small())["sft"].note
    assert 0 < after["score"]["counts"]["asked"] < after["score"]["counts"]["rows"]


def test_training_anew_is_a_decision_and_pins_its_adapter_in_turn(small, ran, run_all):
    trained = run_all(small(**MORE), retrain=True)
    assert adapter(trained) != adapter(ran)
    assert trained["sft"]["counts"]["asked"] == 1
    assert adapter(run_all(small(ingest__demo__users=9))) == adapter(trained)


def test_another_recipe_or_environment_trains_an_adapter_of_its_own(small, ran, run_all):
    assert adapter(run_all(small(sft__rank=4))) != adapter(ran)
    elsewhere = run_all(small(**MORE, settings__env='"other"'))
    assert elsewhere["sft"]["counts"]["asked"] == 1


def test_a_stage_that_is_reused_reads_no_table(small, ran, tmp_path):
    for part in (tmp_path / "store" / "tables").rglob("*.parquet"):
        part.write_bytes(b"x" * part.stat().st_size)  # as large as the manifest says, but nothing that can be read
    open_work.cache_clear()
    work = open_work(small().to_json())
    for name in ("caption", "summary", "preference", "score"):
        record, reused = perform(work, name, ran, How(), ran)
        assert reused and record == ran[name]


def test_a_table_is_read_once_and_only_when_it_is_asked_for():
    reads = []
    tables = Lazy({"a": lambda: reads.append("a") or pl.DataFrame(), "b": lambda: reads.append("b") or pl.DataFrame()})
    assert (list(tables), len(tables), reads) == (["a", "b"], 2, [])
    assert tables["a"] is tables["a"]
    assert reads == ["a"]


def test_a_stage_whose_tables_are_missing_says_which_command_makes_them(small):
    open_work.cache_clear()
    work = open_work(small().to_json())
    with pytest.raises(UsageError, match="mllmsrec run --stage images"):
        gather(work, STAGE_BY_NAME["caption"], {})


# --- who goes first ---


def test_the_users_who_clicked_last_and_the_items_used_most_go_first(small, ran):
    open_work.cache_clear()
    work = open_work(small().to_json())
    order = active_first(work, ran)
    assert order is not None
    clicks = work.store.tables.read("interactions", ran["ingest"]["tables"]["interactions"]["write_id"])
    users = clicks.group_by("user_id").agg(pl.col("at").max()).sort("user_id")
    newest = users.sort("at", descending=True)["at"].to_list()
    assert order(users.select("user_id")).join(users, on="user_id", maintain_order="left")["at"].to_list() == newest
    items = clicks.group_by("item_id").len().sort("item_id")
    unused = pl.DataFrame({"item_id": ["nobody clicked"]})
    ordered = order(pl.concat([unused, items.select("item_id")]))
    assert ordered["item_id"][-1] == "nobody clicked"
    counts = ordered[:-1].join(items, on="item_id", maintain_order="left")["len"].to_list()
    assert counts == sorted(counts, reverse=True)
    pictures = pl.DataFrame({"sha256": ["b", "a"]})
    assert order(pictures).equals(pictures)


def test_before_ingest_there_is_no_order(small):
    open_work.cache_clear()
    assert active_first(open_work(small().to_json()), {}) is None


# --- measuring ---


def test_a_few_real_questions_give_a_plan_its_rate_and_are_not_asked_again(small, ran, run_all, planned):
    edited = small(caption__prompt='"Name it."', settings__window=2)
    assert planned(small(caption__model='"scripted@2"'))["caption"].seconds is None
    open_work.cache_clear()
    rates = measure(open_work(edited.to_json()), "dev", 5)
    assert set(rates) == {"caption"}
    line = planned(edited)["caption"]
    assert 5 <= line.due.known <= 7
    assert line.seconds == pytest.approx((line.due.low / rates["caption"], line.due.high / rates["caption"]))
    assert run_all(edited)["caption"]["counts"]["asked"] == line.due.high


def test_a_plan_says_what_it_would_cost_at_the_users_prices(small, planned):
    lines = planned(small(settings__price_in=2.0, settings__price_out=10.0))
    due = lines["preference"].due
    low, high = lines["preference"].money
    assert high == pytest.approx((2 * due.tokens_in + 10 * due.tokens_out) / 1e6)
    assert 0 <= low <= high
    assert lines["examples"].money == (0.0, 0.0)
    assert planned(small())["preference"].money is None
