"""What a stage is: three pure functions and a table contract.

`rows(inputs)` says what the work is, one row per unit of work; `ask(row)` is a generator that yields Asks, receives
their Replies and returns finished rows; `tables(inputs, rows)` shapes the published tables. A stage without `ask` is
pure arithmetic. Knows nothing of engines, stores or order of execution.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Protocol

import dataframely as dy
import polars as pl
from dataframely.exc import ValidationError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mllmsrec_core.ask import Ask, Model, Reply
from mllmsrec_core.errors import ContractError

Row = dict[str, Any]
Chain = Generator[Ask, Reply, list[Row]]
"""Yields Asks one at a time, is sent each Reply, returns the finished rows of its unit of work.

A finished row may hold `error` (an error class): such rows are counted and listed, and stay in the table.
"""


def in_order(schema: dict[str, Any]) -> None:
    """Number a JSON schema's properties: Prefect keeps it where Postgres forgets their order, and its forms ask for this."""
    for position, described in enumerate(schema.get("properties", {}).values()):
        described["position"] = position


class Params(BaseModel):
    """Base of every stage's parameters: whatever would change a byte of output, and nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, json_schema_extra=in_order)


class AskParams(Params):
    """Parameters every stage with questions shares."""

    max_error_rate: float = Field(0.1, ge=0, le=1, description="share of failed rows above which the stage stops")


def fields(*known: str) -> AfterValidator:
    """Marks a parameter as a template over these fields: `Annotated[str, fields("user", "item")]`.

    Anything else between braces is refused before a run starts rather than in the midst of it.
    """
    allowed = " and ".join(f"{{{name}}}" for name in known)
    hint = f"the prompt's fields are {allowed}; write {{{{ and }}}} for braces that stand for themselves"

    def check(template: str) -> str:
        try:
            used = list(Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"{error}; {hint}") from error
        for _, name, spec, conversion in used:
            if name is not None and (name not in known or spec or conversion):
                raise ValueError(f"{{{name}}} is not plainly one of its fields; {hint}")
        return template

    return AfterValidator(check)


class Source(Protocol):
    """Where a dataset's files lie; paths are relative to its root. Readers in the core open files only here."""

    def names(self, under: str = "") -> list[str]:
        """Every file below `under`, sorted; names that are no UTF-8 are left out.

        Members of a zip archive are `zip://7.jpg::covers.zip`. Raises SourceError for an archive that cannot be read.
        """
        ...

    def table(self, name: str, columns: Mapping[str, str] | None = None) -> tuple[pl.DataFrame, pl.DataFrame]:
        """A CSV, TSV, JSONL or Parquet file as its rows, and the rows that are broken. A folder of parts of one
        format is one table: key=value folders are columns of text, and a part may lack columns that others have.

        `columns` maps our names to the file's; None takes all as they are. Text formats come as String throughout: a
        number as it is written (in JSON without exponent, 4.0 as 4), nested JSON as JSON, an empty field as null; Parquet
        keeps its types. The UInt32 column `line` counts from 1, the header included; in Parquet it is the row. Beside it
        `source` names the file or part it is the line of; with None, which has no such column, lines go on from part to
        part. Broken rows (source, line, reason) are rejects.
        Raises SourceError when the file is missing, has no bytes or lacks a column.
        """
        ...

    def lines(self, name: str) -> Iterator[pl.DataFrame]:
        """A text file, compressed or not, as frames of `text` and `line` (UInt32, from 1), a bounded number at a time.

        Lines come as written, without their ends and a byte order mark; blank ones are left out, and bytes that are no
        UTF-8 replaced. Raises SourceError when the file is missing, cannot be read or holds nothing.
        """
        ...

    def uri(self, name: str) -> str:
        """The absolute URI by which the fetch engine finds `name`; that of the root for an empty name."""
        ...

    def version(self, name: str) -> str | None:
        """ETag, or size and mtime, of one file, from a listing; None when there is no such file."""
        ...


@dataclass(frozen=True)
class Inputs:
    """What a stage's functions may read: published tables, everyone's parameters, its resolved model, a source."""

    tables: Mapping[str, pl.DataFrame]
    params: Mapping[str, Any]  # stage name -> its Params
    model: Model | None = None
    source: Source | None = None
    versions: Callable[[list[str]], list[str]] | None = None  # image URIs -> versions, by listing
    before: Mapping[str, pl.DataFrame] = field(default_factory=dict)  # what a stage that `continues` published last
    forgotten: Callable[[pl.Series], pl.Series] | None = None  # user ids -> whether each asked to be forgotten

    def __getitem__(self, table: str) -> pl.DataFrame:
        return self.tables[table]

    def need_model(self) -> Model:
        """The stage's model; a stage that asks one always has it."""
        assert self.model is not None, "the runner resolves a model for every stage that names one"
        return self.model


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline. `reads` and `writes` name tables; `needs` names other stages whose params it reads.

    `caption.max_pixels` in `needs` stands for that one parameter: the others of its stage then change nothing here.
    """

    name: str
    params: type[Params]
    reads: tuple[str, ...]
    writes: Mapping[str, type[dy.Schema]]
    rows: Callable[[Inputs], pl.DataFrame]
    tables: Callable[[Inputs, pl.DataFrame], dict[str, pl.DataFrame]]
    ask: Callable[[Inputs, Row], Chain] | None = None
    done: Mapping[str, Any] = field(default_factory=dict)  # polars schema of finished rows
    needs: tuple[str, ...] = ()
    longest_first: str | None = None  # a column of `rows`: units of work with the largest value start first
    outside: Callable[[Inputs], Any] | None = None  # JSON-able: the version of what it reads besides tables
    unit: tuple[str, ...] = ()  # the columns of `rows` that name a unit of work; none: its rows are never carried over
    continues: Callable[[Inputs], bool] | None = None  # with these parameters it goes on from its own tables (`before`)
    pinned: bool = False  # new data alone does not make it due: what the environment shows stands until asked anew


def conform(frame: pl.DataFrame, schema: type[dy.Schema]) -> pl.DataFrame:
    """`frame` with exactly the contract's columns in order, cast, validated and sorted by its key.

    Raises ContractError that names the contract.
    """
    columns = schema.columns()
    try:
        frame = frame.select(pl.col(name).cast(column.dtype) for name, column in columns.items())
        return schema.validate(frame).sort(schema.primary_key())
    except (ValidationError, pl.exceptions.PolarsError) as error:
        raise ContractError(
            f"a table breaks the contract {schema.__module__}.{schema.__name__}: {error}. The rows come from upstream "
            "tables or from the stage's own code; nothing was published."
        ) from error
