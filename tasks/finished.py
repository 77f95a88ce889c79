"""What a pass over a stage has finished so far, as columns: in a file as soon as it is much, until it is published.

As Python objects a row takes some ten times the memory, and as columns a large stage would still fill it with a table
that nobody reads before the end.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import suppress
from typing import Any

import polars as pl

from mllmsrec_core.errors import StoreError
from mllmsrec_core.stage import Stage
from tasks.carry import STALE, joined
from tasks.runner import Unit

SPOOLED_BYTES = 8_000_000  # of compressed rows in memory, some 60,000, before a file is made


class Finished:
    """Takes units in any order and gives their rows, and the keys of their Asks, by the unit's number `__row`."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._rows = _Spool({"__row": pl.UInt32, **done_schema(stage)})
        self._asks = _Spool({"__row": pl.UInt32, "asks": pl.Binary})

    def take(self, units: list[Unit]) -> None:
        """Add a lot of finished units. Raises StoreError where the temporary folder cannot take it."""
        self._rows.add([{**row, "__row": unit.number} for unit in units for row in unit.rows])
        self._asks.add([{"__row": unit.number, "asks": joined([*unit.keys, *_kept(unit)])} for unit in units])

    def asks(self) -> pl.DataFrame:
        """`__row` and `asks` of every unit taken."""
        return self._asks.frame()

    def rows(self, asked: pl.DataFrame) -> pl.DataFrame:
        """Every finished row, a unit's in their order, with the unit's columns they lack from `asked`."""
        done = self._rows.frame()
        lacking = [name for name in self.stage.unit if name not in done.columns]
        return done.join(asked.select("__row", *lacking), on="__row", maintain_order="left") if lacking else done


def done_schema(stage: Stage) -> dict[str, Any]:
    """The polars schema of finished rows; where a stage states none, that of the one table it writes."""
    if stage.done:
        return {**stage.done, STALE: pl.Datetime("us", "UTC")}
    (contract,) = stage.writes.values()
    return {name: column.dtype for name, column in contract.columns().items()}


def _kept(unit: Unit) -> list[bytes]:
    """The keys of finished rows: those that kept an older answer did not ask it again."""
    return [row["ask"] for row in unit.rows if row.get("ask")]


class _Spool:
    """Rows of one schema, lot after lot."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = schema
        self._file = tempfile.SpooledTemporaryFile(SPOOLED_BYTES)
        self._sizes: list[int] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        content = io.BytesIO()
        pl.DataFrame(rows, self.schema, orient="row").write_ipc(content, compression="lz4")
        try:
            self._sizes.append(self._file.write(content.getbuffer()))
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # it cannot write what it still holds
                self._file.close()
            raise StoreError(
                f"finished rows cannot wait in a temporary file: {error.strerror or error}. Everything answered is kept; "
                "free space in the folder for temporary files, or name another in TMPDIR, and repeat the command."
            ) from error

    def frame(self) -> pl.DataFrame:
        """Every row, in the order in which they came; asked for once."""
        with self._file:
            self._file.seek(0)
            lots = [pl.read_ipc(self._file.read(size)) for size in self._sizes]
        return pl.concat([pl.DataFrame(schema=self.schema), *lots])
