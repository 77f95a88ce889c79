"""What nobody needs any more: table writes no recent state shows, what points at them, and what dead runs left behind.

Nothing younger than the grace period is touched, and nothing at all while a run is at work, so that what a run has just
made or is about to point at stays. Answers go only when asked for. Knows nothing of the command line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from mllmsrec_core.errors import UsageError
from storage.presence import live
from storage.replies import decode
from storage.store import Store
from tasks.forget import pointed
from tasks.stage_task import STAGE_BY_NAME
from tasks.traces import Write, split

NAMING = ("fetch", "train")  # kinds of questions whose answer names a blob

Dropped = tuple[str, str, int, str]  # kind, name, bytes, why


def collect(
    store: Store, *, grace_hours: float = 24, keep: int = 5, replies: bool = False, dry_run: bool = False
) -> list[Dropped]:
    """Remove, or with `dry_run` only list, what no need was found for: (kind, name, bytes, why) each.

    Kept are the tables of the last `keep` states of every environment; with `replies` answers go that none of their
    rows rests on, and pictures and adapters that neither they nor answers name. Raises UsageError while a run or a
    removal is at work.
    """
    if keep < 1:
        raise UsageError(f"keep = {keep} would leave no environment its tables; keep at least 1 state")
    if runs := live(store.files):
        raise UsageError(
            f"{len(runs)} runs are at work on the store ({', '.join(runs)}); repeat the command after them"
        )
    with store.forgotten.lock():
        found = Collection(store, grace_hours * 3600, keep)
        found.tables()
        found.leftovers()
        if replies:
            found.replies()
        return found.drop(dry_run)


@dataclass
class Collection:
    """What may go, each with how to remove it; in an order in which a kill leaves nothing pointing at what is gone."""

    store: Store
    grace: float  # seconds
    keep: int
    now: float = field(default_factory=time.time)
    found: list[tuple[Dropped, Callable[[], object]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        envs = self.store.envs
        self.states = {name: envs.history(name) for name in envs.names()}
        self.records = [
            r for states in self.states.values() for s in states[-self.keep :] for r in s["stages"].values()
        ]
        self.kept = {write for record in self.records for write in pointed({"": record})}

    def drop(self, dry_run: bool) -> list[Dropped]:
        """Remove all that was found unless this is a rehearsal; what it was."""
        for _, remove in () if dry_run else self.found:
            remove()
        return [dropped for dropped, _ in self.found]

    def tables(self) -> None:
        """Records whose tables are gone or go, then table writes that no kept state reaches."""
        names: dict[Write, list[str]] = {write: [] for write in self.store.tables.writes()}
        for name in self.store.files.names("tables"):
            if (write := (name.split("/")[1], name.split("/")[2])) in names:
                names[write].append(name)
        going = {write for write, files in names.items() if write not in self.kept and all(map(self.old, files))}
        standing = names.keys() - going
        for name in self.store.files.names("stages", ".json"):
            record = json.loads(self.store.files.read(name))
            if self.old(name) and not pointed({"": record}) <= standing:
                self.file("record", name, "tables it points at are gone, or go with this")
        for write in sorted(going):
            self.write(write, names[write])

    def write(self, write: Write, files: list[str]) -> None:
        states = "state" if self.keep == 1 else f"{self.keep} states"
        why = f"none of the last {states} of an environment shows it"
        size = sum(self.store.files.size(name) or 0 for name in files)
        self.found.append((("table", "/".join(write), size, why), lambda: self.store.tables.remove(*write)))

    def leftovers(self) -> None:
        """Temporary files, presence of dead runs, reports of states that are no more."""
        for name in self.store.files.leftovers(self.grace):
            self.file("leftover", name, "a write that never ended")
        for name in filter(self.old, self.store.files.names("runs", ".json")):
            self.file("presence", name, "its run is dead")
        reported = {f"reports/{env}/{state['seq']:08d}." for env, states in self.states.items() for state in states}
        for name in filter(self.old, self.store.files.names("reports")):
            if not any(name.startswith(state) for state in reported):
                self.file("report", name, "its state is gone")

    def replies(self) -> None:
        """Answers that no kept row rests on, older than the grace; then the blobs that nothing kept names."""
        needed = pl.Series("key", sorted(self.needed()), dtype=pl.Binary)
        before = datetime.fromtimestamp(self.now, UTC) - timedelta(seconds=self.grace)
        named = self.shown()
        for folder, rows in self.folders():
            young = rows.filter((pl.col("at") >= before) | pl.col("key").is_in(needed.implode()))["key"]
            stays = pl.col("key").is_in(young.implode())  # a key goes with all its answers or with none
            going, kept = rows.filter(~stays), rows.filter(stays)
            if len(going):
                self.answers(folder, going["key"].unique().to_list(), int(going["size"].sum()))
            if "value" in kept.columns:
                named |= blobs_in(folder.split("/")[1], kept["value"])
        self.blobs(named)

    def answers(self, folder: str, keys: list[bytes], size: int) -> None:
        why = f"{len(keys):,} answers that no kept row rests on"
        self.found.append((("reply", folder, size, why), lambda: self.store.replies.remove(keys)))

    def folders(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """Each folder of answers with its rows: key, at, size in bytes, and the value where it may name a blob."""
        pieces: dict[str, list[pl.DataFrame]] = {}
        for folder, piece in self.store.replies.scan():
            if folder.startswith("replies/"):
                value = ["value"] if folder.split("/")[1] in NAMING else []
                size = pl.col("value").bin.size().alias("size")
                pieces.setdefault(folder, []).append(piece.select("key", "at", *value, size))
        for folder, parts in pieces.items():
            yield folder, pl.concat(parts)

    def needed(self) -> set[bytes]:
        """The keys of all questions behind kept units and rows. Raises UsageError where a stage's are not known."""
        keys: set[bytes] = set()
        for record in self.records:
            stage = STAGE_BY_NAME.get(record["stage"])
            if stage and stage.ask and stage.unit and not record.get("carried"):
                raise UsageError(
                    f"which answers the tables of stage {stage.name} rest on is not known: they were made by an earlier "
                    f"version. Run it once (mllmsrec run --stage {stage.name}), then repeat the command"
                )
        for table, write_id in self.kept:
            manifest = self.store.tables.manifest(table, write_id)
            for name in {"ask", "asks"} & set((manifest or {"schema": ()})["schema"]):
                keys |= split(self.store.tables.read(table, write_id, columns=[name])[name])
        return keys

    def shown(self) -> set[str]:
        """The sha256s in kept tables of pictures and adapters."""
        found: set[str] = set()
        for table, write_id in self.kept:
            if table in ("images", "adapters") and self.store.tables.manifest(table, write_id):
                found.update(self.store.tables.read(table, write_id, columns=["sha256"])["sha256"].drop_nulls())
        return found

    def blobs(self, named: set[str]) -> None:
        for name in filter(self.old, self.store.files.names("blobs")):
            if name.rsplit("/", 1)[1].removesuffix(".ref") not in named:
                self.file("blob", name, "no kept table and no answer names it")

    def file(self, kind: str, name: str, why: str) -> None:
        size = self.store.files.size(name) or 0
        self.found.append(((kind, name, size, why), lambda: self.store.files.remove(name)))

    def old(self, name: str) -> bool:
        """Whether a file was written before the grace period; one that is gone is nobody's to remove."""
        try:
            written = self.store.files.fs.modified(self.store.files.path(name))
        except FileNotFoundError:
            return False
        at = written if written.tzinfo else written.replace(tzinfo=UTC)
        return self.now - at.timestamp() > self.grace


def blobs_in(kind: str, values: Iterable[bytes | None]) -> set[str]:
    """The sha256s that answers of fetches or trainings name."""
    found: Iterable[Mapping[str, Any]] = (decode(kind, value) for value in values if value is not None)  # type: ignore[arg-type]
    return {value["sha256"] for value in found}
