"""One Parquet file as rows: the columns that are wanted, with their types, and the row each stands in.

Knows neither file systems nor what a column means.
"""

from __future__ import annotations

from collections.abc import Collection

import polars as pl
import pyarrow.dataset

from storage.rows import Rows


def parquet(path: str, wanted: Collection[str] | None = None) -> Rows:
    """The rows of a local file: of its columns those that are `wanted` and there. `known` are all its columns.

    A column that nobody wants costs nothing: of reviews with their texts, the texts are nine tenths.
    Raises OSError or pyarrow.ArrowException where the file is damaged or none.
    """
    found = pyarrow.dataset.dataset(path, format="parquet")
    known = [name for name in found.schema.names if name != "line"]
    table = found.to_table(columns=[name for name in known if wanted is None or name in wanted])
    table.validate(full=True)  # a damaged page may hold text that is no UTF-8
    frame = pl.from_arrow(table) if table.num_columns else pl.DataFrame()
    assert isinstance(frame, pl.DataFrame)
    line = pl.int_range(1, table.num_rows + 1, dtype=pl.UInt32, eager=True).alias("line")
    return Rows(pl.DataFrame([*frame.get_columns(), line]), [], known, table.num_rows)
