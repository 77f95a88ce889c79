"""Overruling answers, on purpose and recorded: open the questions of chosen rows again, or correct one item's text.

Both write corrections and ask nothing; the next run makes of them what they change. Knows nothing of the command line.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

import polars as pl

from mllmsrec_core.errors import UsageError, nearest
from storage.corrections import Action, Correction
from tasks.carry import KEY
from tasks.report.shown import Shown, first
from tasks.stage_task import STAGE_BY_NAME
from tasks.work import Work

Of = Literal["caption", "summary"]
TABLE = {"caption": "captions", "summary": "item_summaries"}


def reask(work: Work, env: str, stage: str, where: str | None, why: str, by: str) -> int:
    """Open every question on the known chains of the chosen units of work again; returns how many questions.

    `where` is an SQL expression over the stage's finished rows, its units' columns and, where these are pictures, the
    `item_id` they belong to; None chooses all. Nothing is asked here. Raises UsageError for what cannot be chosen.
    """
    shown = Shown(work.store, env)
    units = chosen(shown, stage, where)
    asks = b"".join(units["asks"].drop_nulls())
    keys = dict.fromkeys(asks[start : start + KEY] for start in range(0, len(asks), KEY))
    made = Correction("reask", None, by, datetime.now(UTC), said(why))
    return work.store.corrections.write((key, stage, made) for key in keys)


def chosen(shown: Shown, stage: str, where: str | None) -> pl.DataFrame:
    """The stage's units of work for which `where` holds for at least one finished row."""
    units, done = _carried(shown, stage)
    unit = list(STAGE_BY_NAME[stage].unit)
    if where is None:
        return units
    rows = _with_items(shown, units.select(unit).join(done, on=unit, how="left", nulls_equal=True))
    try:
        condition = pl.sql_expr(where)
        fits = rows.select(condition.alias("fits"))["fits"]
    except pl.exceptions.PolarsError as error:
        raise _wrong(where, rows, str(error).splitlines()[0]) from error
    if fits.dtype != pl.Boolean or len(fits) != len(rows):
        raise _wrong(where, rows, f"it gives {fits.dtype} and not true or false for each row")
    return units.join(rows.filter(fits).select(unit).unique(), on=unit, how="semi", nulls_equal=True)


def _carried(shown: Shown, stage: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The units and finished rows the environment holds of the stage."""
    asking = [name for name, known in STAGE_BY_NAME.items() if known.ask]
    if stage not in asking:
        raise UsageError(f"`{stage}` is not a stage that asks; {nearest(stage, asking)}")
    if not STAGE_BY_NAME[stage].unit:
        raise UsageError(f"stage {stage} has no rows to ask again; make its output anew with: mllmsrec run --retrain")
    pointers = shown.stages.get(stage, {}).get("carried")
    if not pointers:
        raise UsageError(
            f"environment `{shown.env}` does not know which questions stage {stage} asked; run it once: "
            f"mllmsrec run --stage {stage}"
        )
    units, done = (shown.store.tables.read(f"{name}.{stage}", pointers[name]["write_id"]) for name in ("units", "done"))
    return units, done


def _with_items(shown: Shown, rows: pl.DataFrame) -> pl.DataFrame:
    """`rows` about pictures once for each item that has the picture; others as they are."""
    if "item_id" in rows.columns:
        return rows
    by, table, column = ("sha256", "images", "sha256") if "uri" not in rows.columns else ("uri", "items", "image_uri")
    owners = shown.table(table)
    if by not in rows.columns or owners is None:
        return rows
    owned = owners.filter(pl.col(column).is_not_null()).select("item_id", pl.col(column).alias(by))
    return rows.join(owned, on=by, how="left")


def _wrong(where: str, rows: pl.DataFrame, why: str) -> UsageError:
    columns = ", ".join(name for name in rows.columns if name not in ("ask", "asks"))
    return UsageError(
        f"--where `{where}`: {why}. It is an SQL condition over the columns {columns}; text stands between single quotes: "
        "item_id = 'B01'"
    )


def correct(
    work: Work,
    env: str,
    item: str,
    *,
    of: Of = "caption",
    text: str | None = None,
    ban: bool = False,
    reask: bool = False,
    why: str,
    by: str,
) -> str:
    """Correct the caption of an item's picture, or its summary, by exactly one of a new text, a ban or a new question.

    Returns in words what was done and what else it reaches. Asks nothing: the next run makes of it what it changes.
    """
    actions: dict[Action, bool] = {"replace": text is not None, "ban": ban, "reask": reask}
    wanted: list[Action] = [action for action, asked in actions.items() if asked]
    if len(wanted) != 1:
        raise UsageError(f"say exactly one of a text, --ban and --reask for the {of} of item `{item}`")
    if text is not None and not text.strip():
        raise UsageError(f"the new {of} is empty; to take the old one away use --ban")
    shown = Shown(work.store, env)
    row = _row(shown, item, of)
    made = Correction(wanted[0], text, by, datetime.now(UTC), said(why))
    work.store.corrections.write([(row["ask"], of, made)])
    done = {"replace": f"is now: {text}", "ban": "is banned", "reask": "will be asked again by the next run"}[wanted[0]]
    return f"the {of} of item {item} {done}{_reached(shown, item, of, row)} Take it into the tables with: mllmsrec run"


def said(why: str) -> str:
    """The reason, which must not be empty: without it nobody knows later whether a correction still holds."""
    if not why.strip():
        raise UsageError('say why, for whoever reads it later: --why "the picture shows a mug, not a cap"')
    return why.strip()


def _row(shown: Shown, item: str, of: Of) -> dict[str, Any]:
    """The row of the caption or summary, with the key of its question."""
    items = _of(shown, "items", "item_id", item)
    if not items:
        raise UsageError(f"there is no item `{item}` in environment `{shown.env}`; look with: mllmsrec export items")
    if of == "summary":
        row = _of(shown, TABLE[of], "item_id", item)
    else:
        image = _of(shown, "images", "item_id", item)
        if image and image["status"] != "ok":
            raise UsageError(f"the picture of item `{item}` is {image['status']}, so it has no caption to correct")
        row = _of(shown, TABLE[of], "sha256", image.get("sha256"))
    if not row:
        raise UsageError(f"item `{item}` has no {of} in environment `{shown.env}`; run: mllmsrec run --stage {of}")
    if row["ask"] is None:
        raise UsageError(f"no question stands behind the {of} of item `{item}`, so there is no answer to correct")
    return row


def _of(shown: Shown, table: str, column: str, value: Any) -> dict[str, Any]:
    frame = shown.table(table)
    return {} if frame is None else first(frame.filter(pl.col(column) == value))


def _reached(shown: Shown, item: str, of: Of, row: dict[str, Any]) -> str:
    """Which other items the same answer stands behind, as the end of one sentence."""
    table, column, what = ("images", "sha256", "picture") if of == "caption" else (TABLE[of], "ask", "question")
    frame = shown.table(table)
    assert frame is not None, "its row was read before"
    same = frame.filter(pl.col(column) == row[column], pl.col("item_id") != item)["item_id"].sort().to_list()
    return f"; the {what} is also that of {', '.join(same)}." if same else f"; no other item shares the {what}."
