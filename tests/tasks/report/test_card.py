"""The data card as the report shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from mllmsrec_core.card import DataCard
from storage.store import Store
from tasks.report import render
from tasks.report.card import card
from tasks.report.shown import Shown

FIGURES = [
    ("users", "", 1_234.0),
    ("sparsity", "", None),
    ("history_length", "10 %", 3.0),
    ("history_length", "100 %", 12.0),
    ("history_length", "50 %", 6.0),
    ("history_length", "mean", 6.5),
    ("popularity_share", "top 1 %", 0.25),
    ("popularity_share", "top 10 %", 0.5),
    ("time", "first: 2024-01-01 00:00 UTC", 1.7e9),
    ("rejects", "no item", 2.0),
    ("rejects", "no user", 3.0),
]


@pytest.fixture
def shown(tmp_path: Path) -> Callable[..., Any]:
    """`shown(figures)`: the card of an environment whose ingest published these."""

    def publish(figures: list[tuple[str, str, float | None]], compat: str = "none") -> Any:
        store = Store(str(tmp_path / "store"))
        schema = {name: column.dtype for name, column in DataCard.columns().items()}
        made = store.tables.publish("data_card", pl.DataFrame(figures, schema=schema, orient="row"), {})
        pointer = {"write_id": made.write_id, "digest": made.digest, "rows": made.rows}
        parts = {"params": {"ingest": {"compat": compat}}}
        store.envs.move("dev", {"ingest": {"tables": {"data_card": pointer}, "parts": parts}})
        return card(Shown(store, "dev"))

    return publish


def test_bars_stand_in_the_order_of_their_per_cent_and_the_longest_is_whole(shown):
    told = shown(FIGURES)
    assert [(bar.name, bar.share) for bar in told.lengths] == [("10 %", 0.25), ("50 %", 0.5), ("100 %", 1.0)]
    assert [(bar.name, bar.share) for bar in told.popularity] == [("top 1 %", 0.25), ("top 10 %", 0.5)]


def test_facts_are_the_figures_there_are_with_rejects_in_all(shown):
    facts = {name: value for name, value, _ in shown(FIGURES).facts}
    assert facts["users"] == "1,234" and facts["rejects"] == "5"
    assert facts["first interaction"] == "2024-01-01 00:00 UTC"
    assert "sparsity" not in facts and "items" not in facts


def test_of_an_ingest_that_made_no_card_there_is_none(tmp_path: Path):
    store = Store(str(tmp_path / "store"))
    store.envs.move("dev", {"ingest": {"tables": {}, "parts": {"params": {"ingest": {}}}}})
    assert card(Shown(store, "dev")) is None


def test_another_construction_is_named(shown):
    assert shown(FIGURES, "mllm_msr").compat == "mllm_msr" and shown(FIGURES).compat == ""


@pytest.mark.parametrize("compat", ["none", "mllm_msr"])
def test_the_page_holds_the_card_and_says_when_histories_are_not_those_of_time(
    small: Callable[..., Any], run_all: Callable[..., Any], tmp_path: Path, compat: str
):
    config = small(ingest__compat=f'"{compat}"', examples__compat=f'"{compat}"')
    records = run_all(config)
    html = render(Shown(Store(str(tmp_path / "store")), "dev"))
    section = html.split('<section id="data">')[1].split("</section>", maxsplit=1)[0]
    assert section.count("<meter") == 8 + 5 and "has not run" not in section
    assert ("compat.mllm_msr" in section) == (compat == "mllm_msr")
    assert ("compat.mllm_msr/" in html.split('<section id="metrics">')[1]) == (compat == "mllm_msr")
    assert records["ingest"]["tables"]["data_card"]["rows"] > 20
