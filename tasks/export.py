"""Published tables as files for other systems."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import polars.selectors as cs

from mllmsrec_core.errors import UsageError


def export(frame: pl.DataFrame, path: Path) -> int:
    """Write `frame` in the format of the file's ending; returns the number of rows. Keys of Asks become hex in text formats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = frame.with_columns(cs.binary().bin.encode("hex"))
    match path.suffix:
        case ".parquet":
            frame.write_parquet(path, compression="zstd")
        case ".csv":
            nested = [name for name, dtype in text.schema.items() if dtype.is_nested()]
            text.with_columns(pl.col(nested).map_elements(lambda v: str(v.to_list()), pl.String)).write_csv(path)
        case ".jsonl":
            text.write_ndjson(path)
        case other:
            raise UsageError(f"cannot export to `{other or path.name}`; the file's ending says the format: .parquet, .csv, .jsonl")
    return len(frame)
