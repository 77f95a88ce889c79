"""The report of an environment: one HTML file that holds everything it shows and fetches nothing.

A pure function of what the environment's tables say and of the corrections in force, so a state that was reported by
this version of the package is not reported again. Titles and model answers are
untrusted and always escaped. Works while stages are missing: their sections say which command fills them. Asks nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
import polars as pl
from markupsafe import Markup, escape

import mllmsrec_core
from mllmsrec_core.stages import STAGES
from tasks import environments
from tasks.environments import coverage
from tasks.environments import shown as shown_now
from tasks.report import figures, overruled, ranking
from tasks.report.card import card
from tasks.report.exhibits import Exhibits
from tasks.report.prefixes import prefixes
from tasks.report.shown import Shown

if TYPE_CHECKING:
    from storage.store import Store
    from tasks.work import Work

TOY = ("embedded-vlm", "embedded-clip")  # trained on the demo's kind of pictures and no other
ORDER = tuple(stage.name for stage in STAGES)
PINNED = {stage.name for stage in STAGES if stage.pinned}
MADE_BY = f"mllmsrec {mllmsrec_core.__version__}"
MAX_REASONS = 12
MAX_VALUE = 300  # characters of a parameter that are shown: a prompt's beginning
_SECRET = re.compile(r"://[^/@\s\"]+@")  # user and password inside a URL
_TICKS = re.compile(r"`([^`]*)`")
_PARTICULAR = re.compile(r"`[^`]*`|\d+")  # what differs between two rejects of one kind


def write_report(work: Work, env: str) -> str:
    """Write `reports/<env>/<seq>.html` to the store, unless this version has; returns its absolute path or URL.

    Raises UsageError when the environment has never published anything.
    """
    return write_page(work.store, env)


def write_page(store: Store, env: str, compare: str | None = None, again: bool = False) -> str:
    """As `write_report`; `again` writes it in any case.

    With another environment to `compare` with, the page gains a section that sets both side by side and has a name of
    its own, `<seq>.<other>-<seq of the other>.html`.
    """
    now = shown_now(store, env)
    beside = None if compare is None else environments.compare(store, env, compare)
    stem = f"{now['seq']:08d}" + (f".{compare}-{beside.seqs[1]:08d}" if beside else "")
    name = f"reports/{env}/{stem}.html"
    if again or not written(store, name):
        store.files.write(name, render(Shown(store, env), beside).encode())
    path = store.files.path(name)
    return path if store.files.local else store.files.fs.unstrip_protocol(path)


def written(store: Store, name: str) -> bool:
    """Whether this version of the package has written the page `name`."""
    try:
        return MADE_BY in store.files.read(name)[:2_000].decode("utf-8", errors="replace")  # it stands in the head
    except FileNotFoundError:
        return False


def render(shown: Shown, beside: environments.Comparison | None = None) -> str:
    """The whole page."""
    exhibits = Exhibits(shown)
    content = {
        "made_by": MADE_BY,
        "env": shown.env,
        "seq": shown.seq,
        "at": shown.at,
        "dataset": dataset(shown),
        "models": models(shown),
        "funnel": funnel(shown),
        "rejects": rejects(shown),
        "card": card(shown),
        "pictures": picture_states(shown),
        "captions": exhibits.captions(),
        "users": exhibits.users(),
        "mode": shown.params("preference").get("mode"),
        "training": figures.training(shown),
        "pinned": pinned(shown),
        "prefixes": prefixes(shown),
        "metrics": ranking.metrics(shown),
        "calibration": figures.calibration(shown),
        "audit": figures.audit(shown),
        "flags": exhibits.flags(),
        "failures": failures(shown),
        "overruled": overruled.in_force(shown),
        "beside": beside,
        "parameters": parameters(shown),
        "fingerprints": fingerprints(shown),
        "version": mllmsrec_core.__version__,
    }
    return page().render(notices=notices(shown), **content)  # notices last: tables found lost are named there


def page() -> jinja2.Template:
    """The template, with escaping on and unknown names as errors."""
    text = (resources.files("tasks.report") / "page.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {name.__name__: name for name in (count, span, share, figure, signed, short, ticks)}
    return environment.from_string(text)


# --- numbers as text ------------------------------------------------------------------------------------------------


def count(number: float | None) -> str:
    """1,234, or a dash."""
    return "–" if number is None else f"{number:,.0f}"


def span(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def share(value: float | None) -> str:
    """12.3 %; a share that is not zero is never shown as 0."""
    if value is None:
        return "–"
    return "< 0.1 %" if 0 < value < 0.0005 else f"{100 * value:.1f} %"


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def short(value: Any) -> str:
    """A parameter's value on a few lines."""
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = safe(text)
    return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + " …"


def ticks(text: str) -> Markup:
    """Escaped text in which `this` is set as code."""
    return Markup(_TICKS.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped before


# --- what stands at the top -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    name: str
    path: str
    items: int | None
    users: int | None
    interactions: int | None
    sample: int | None


def dataset(shown: Shown) -> Dataset:
    params = shown.params("ingest")
    interactions = shown.table("interactions")
    samples = [record["parts"].get("sample") for record in shown.stages.values()]
    return Dataset(
        params.get("dataset", "unknown dataset"),
        safe(params.get("path", "")),
        shown.pointers.get("items", {}).get("rows"),
        None if interactions is None else interactions["user_id"].n_unique(),
        None if interactions is None else len(interactions),
        next((n for n in samples if n), None),
    )


@dataclass(frozen=True)
class ModelRow:
    """A model and the stages that ask it."""

    name: str
    revision: str
    how: str
    stages: tuple[str, ...]


def models(shown: Shown) -> list[ModelRow]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for stage in in_order(shown.stages):
        model = shown.stages[stage]["parts"].get("model")
        if model:
            how = ", ".join(part for part in (model["dtype"], model["quantisation"]) if part != "none")
            found.setdefault((model["name"], model["revision"][:12], how), []).append(stage)
    return [ModelRow(*model, tuple(stages)) for model, stages in found.items()]


def in_order(stages: Iterable[str]) -> list[str]:
    """Stage names as they run; ones this page does not know come last."""
    return sorted(stages, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def notices(shown: Shown) -> list[str]:
    """What a reader must know before believing anything below."""
    names = {model.name for model in models(shown)}
    toys = sorted(names & set(TOY))
    name = shown.params("ingest").get("dataset")
    found = []
    if "scripted" in names:
        found.append(
            "Dry run: the model `scripted` gives made-up answers, drawn by hash from each question. Texts and figures "
            "below show that the pipeline works and say nothing about any model or dataset."
        )
    if toys and name not in (None, "demo"):
        found.append(
            f"The embedded models ({', '.join(toys)}) have only ever seen the built-in shop's drawings; this dataset "
            f"is `{name}`: captions will be poor, and so will all that rests on them. Give a real model: --set model=…"
        )
    if sample := dataset(shown).sample:
        found.append(f"A sample of {sample:,} users drawn by hash, not the whole dataset.")
    for row in funnel(shown):
        if row.coverage < 1:
            since = (
                f", the oldest of the others stands since {row.stale_since:%Y-%m-%d %H:%M} UTC"
                if row.stale_since
                else ""
            )
            part = share(row.coverage)
            found.append(
                f"Stage {row.stage}: {part} of its rows are up to date{since}. `mllmsrec run` goes on with them."
            )
    if at := pinned(shown):
        found.append(
            f"The adapter is pinned: it was trained on an earlier state of the data ({at[:10]}). "
            "`mllmsrec run --retrain` trains anew."
        )
    if stale := [name for name in shown.stale() if name not in PINNED]:
        stages = ", ".join(dict.fromkeys(in_order(stale)))
        found.append(f"Made of older tables than the ones shown: {stages}. `mllmsrec run` brings them up to date.")
    if missing := [stage for stage in ORDER if stage not in shown.stages]:
        found.append(f"Not run in this environment yet: {', '.join(missing)}.")
    if shown.lost:
        found.append(f"Files of these tables are gone: {', '.join(shown.lost)}. `mllmsrec run` rebuilds them.")
    return found


def pinned(shown: Shown) -> str | None:
    """When the adapter was trained, where the environment keeps it although the data have moved on."""
    held = PINNED & set(shown.stale())
    adapters = shown.table("adapters")
    return shown.stages[min(held)]["at"] if held and adapters is not None and len(adapters) else None


# --- the funnel -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FunnelRow:
    """One stage: what it published and what that took."""

    stage: str
    tables: tuple[tuple[str, int], ...]
    units: int
    asked: int
    known: int
    failed: int
    tokens_in: int
    tokens_out: int
    seconds: float
    coverage: float  # share of the rows that are up to date
    stale_since: datetime | None  # when the oldest of the others was left as it is


def funnel(shown: Shown) -> list[FunnelRow]:
    rows = []
    for stage in in_order(shown.stages):
        record = shown.stages[stage]
        counts = record["counts"]
        tables = tuple((name, pointer["rows"]) for name, pointer in record["tables"].items())
        spent = {name: counts[name] for name in ("asked", "known", "failed", "tokens_in", "tokens_out")}
        fresh = {"coverage": coverage(record), "stale_since": stale_since(shown, record)}
        rows.append(FunnelRow(stage, tables, counts["rows"], seconds=record["seconds"], **spent, **fresh))
    return rows


def stale_since(shown: Shown, record: Mapping[str, Any]) -> datetime | None:
    """Since when the stage's oldest row that is not up to date stands; None where all are, or none says."""
    frames = [shown.table(name) for name in record["tables"]] if coverage(record) < 1 else []
    dates = [frame["stale_since"].min() for frame in frames if frame is not None and "stale_since" in frame.columns]
    return min((at for at in dates if isinstance(at, datetime)), default=None)


def rejects(shown: Shown) -> list[tuple[str, int]] | None:
    """Reject reasons with their particulars left out, the commonest first; the rest in one row."""
    table = shown.table("rejects")
    if table is None:
        return None
    kinds = table.select(pl.col("reason").str.replace_all(_PARTICULAR.pattern, "…")).to_series()
    counted = kinds.value_counts(sort=True, name="n").sort("n", "reason", descending=[True, False])
    rows = list(counted.head(MAX_REASONS).iter_rows())
    rest = int(counted["n"].slice(MAX_REASONS).sum())
    return [*rows, ("other reasons", rest)] if rest else rows


def picture_states(shown: Shown) -> list[tuple[str, int]]:
    """How many items have a picture, and what became of the others."""
    table = shown.table("images")
    if table is None:
        return []
    return list(
        table["status"].cast(pl.String).value_counts(sort=True, name="n").sort("n", descending=True).iter_rows()
    )


@dataclass(frozen=True)
class Failure:
    stage: str
    error: str
    n: int
    share: float


def failures(shown: Shown) -> list[Failure]:
    """Failed rows by stage and error class."""
    return [
        Failure(stage, error, n, n / max(1, shown.stages[stage]["counts"]["rows"]))
        for stage in in_order(shown.stages)
        for error, n in sorted(shown.stages[stage]["counts"]["errors"].items(), key=lambda pair: (-pair[1], pair[0]))
    ]


# --- what stands at the foot ----------------------------------------------------------------------------------------


def parameters(shown: Shown) -> str:
    """The parameters each stage ran with, as TOML."""
    return "\n\n".join(toml(stage, shown.params(stage)) for stage in in_order(shown.stages))


def toml(table: str, values: Mapping[str, Any]) -> str:
    """One TOML table, sub-tables after it; what is None is left out, as TOML has no word for it."""
    plain = [f"{name} = {safe(json.dumps(v, ensure_ascii=False))}" for name, v in values.items() if _plain(v)]
    below = [toml(f"{table}.{name}", v) for name, v in values.items() if isinstance(v, Mapping) and v]
    return "\n\n".join(["\n".join([f"[{table}]", *plain]), *below])


def _plain(value: Any) -> bool:
    return value is not None and not isinstance(value, Mapping)


def safe(text: str) -> str:
    """`text` without the user and password a URL may hold."""
    return _SECRET.sub("://…@", text)


@dataclass(frozen=True)
class Fingerprint:
    stage: str
    fingerprint: str
    code: str
    tables: tuple[tuple[str, str], ...]  # name, content digest


def fingerprints(shown: Shown) -> list[Fingerprint]:
    return [
        Fingerprint(
            stage,
            record["fingerprint"][:16],
            str(record["parts"].get("code", ""))[:16],
            tuple((name, pointer["digest"][:16]) for name, pointer in record["tables"].items()),
        )
        for stage in in_order(shown.stages)
        for record in [shown.stages[stage]]
    ]
