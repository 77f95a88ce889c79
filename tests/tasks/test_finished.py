"""Finished rows come back whole and in their order, from memory or from the disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl
import pytest

from mllmsrec_core.errors import StoreError
from mllmsrec_core.stages import caption
from tasks import finished
from tasks.finished import Finished
from tasks.runner import Unit

FULL = Path("/dev/full")


def unit(number: int, rows: int = 1) -> Unit:
    made = [
        {"sha256": f"{number}-{n}", "caption": "x" * n, "ask": bytes([number]) * 32, "error": None} for n in range(rows)
    ]
    return Unit(number, iter(()), (), [bytes([number]) * 32], made)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_memory", [1, 10**9])
def test_lots_are_given_back_in_the_order_in_which_they_came(monkeypatch, in_memory):
    monkeypatch.setattr(finished, "SPOOLED_BYTES", in_memory)
    made = Finished(caption.STAGE)
    made.take([unit(3), unit(1, rows=2)])
    made.take([unit(2, rows=0)])
    assert made.asks().rows() == [(n, bytes([n]) * 32) for n in (3, 1, 2)]
    rows = made.rows(pl.DataFrame())
    assert rows.select("__row", "sha256").rows() == [(3, "3-0"), (1, "1-0"), (1, "1-1")]
    assert rows.schema == {"__row": pl.UInt32, **finished.done_schema(caption.STAGE)}


def test_nothing_finished_is_an_empty_table():
    made = Finished(caption.STAGE)
    assert made.rows(pl.DataFrame()).is_empty()
    assert made.asks().columns == ["__row", "asks"]


def disk_is_full(_: pytest.MonkeyPatch, made: Finished) -> None:
    made._rows._file = FULL.open("wb")  # type: ignore[assignment]


def folder_is_gone(monkeypatch: pytest.MonkeyPatch, _: Finished) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("trouble", [disk_is_full, folder_is_gone])
def test_a_folder_that_takes_nothing_is_named_with_the_variable_that_names_another(monkeypatch, trouble):
    monkeypatch.setattr(finished, "SPOOLED_BYTES", 1)
    made = Finished(caption.STAGE)
    trouble(monkeypatch, made)
    with pytest.raises(StoreError, match=r"(No space left on device|No such file or directory)\. .*TMPDIR"):
        made.take([unit(1)])
