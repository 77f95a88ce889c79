"""Published tables as files for other systems."""

from __future__ import annotations

import json
import os
from pathlib import Path

import polars as pl
import polars.selectors as cs

from mllmsrec_core.errors import UsageError

FORMATS = (".parquet", ".csv", ".jsonl")


def export(frame: pl.DataFrame, path: Path) -> int:
    """Write `frame` in the format of the file's ending; returns the number of rows.

    Text formats show keys of Asks as hex; CSV shows lists and structs as JSON. The file is whole or as it was before.
    """
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise UsageError(
            f"cannot export to `{ending or path.name}`; the file's ending says the format: {', '.join(FORMATS)}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        _write(frame, unfinished, ending)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return len(frame)


def _write(frame: pl.DataFrame, path: Path, ending: str) -> None:
    if ending == ".parquet":
        frame.write_parquet(path, compression="zstd")
        return
    text = frame.with_columns(cs.binary().bin.encode("hex"))
    if ending == ".jsonl":
        text.write_ndjson(path)
    else:
        text.with_columns(_json(text[name]) for name in text.columns if text[name].dtype.is_nested()).write_csv(path)


def _json(column: pl.Series) -> pl.Series:
    values = (
        None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in column.to_list()
    )
    return pl.Series(column.name, list(values), pl.String)
