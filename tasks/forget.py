"""Forgetting a user: everything the store holds of them goes, and a scan of every value shows that it did.

The user is put on the suppression list first, then all that is to go is written down, and that note is the last thing to
go: a kill at any moment leaves a state that the same command brings to the same end. Nobody else may work meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from mllmsrec_core.errors import UsageError
from storage.presence import live
from storage.store import Store
from tasks.carry import HASHES, KEY
from tasks.proof import Proof, prove
from tasks.traces import Traces, Write, find, findable, split

OWN = ("table", "write_id", "digest", "rows", "schema", "parts")  # what `publish` writes into a manifest by itself
FORGOTTEN = "(a forgotten user)"  # what stands for the id in the words of a correction that stays
FROM = "rewritten_from"  # in the manifest of a write that took another's place


def forget(store: Store, user: str, force: bool = False) -> Proof:
    """Remove all the store holds of `user`, and prove it by a scan of the whole store.

    Items that nobody else ever clicked go too. Raises UsageError while runs are at work (unless `force`) or another
    process removes things. The proof's `clean` says whether nothing was found; while it is not, repeat the command.
    """
    user = user.strip()  # as ingest reads ids
    if not user:
        raise UsageError("name the user to forget: mllmsrec forget --user U1")
    if (runs := live(store.files)) and not force:
        raise UsageError(
            f"{len(runs)} runs are at work on the store ({', '.join(runs)}) and would write what is being removed; end "
            "them, or if they are dead repeat the command with --force"
        )
    with store.forgotten.lock():
        store.forgotten.suppress(user)
        note = f"locks/forget-{store.forgotten.subject('user', user).hex()}.json"
        traces = find(store, user, _noted(store, note, user))
        store.files.write(note, traces.to_json())
        removed = Removal(store, traces).all()
        proof = prove(store, traces, removed, skip=note)
        if proof.clean:
            store.files.remove(note)
        return proof


def _noted(store: Store, note: str, user: str) -> Traces:
    """What an earlier attempt wrote down and may have removed since."""
    try:
        return Traces.from_json(store.files.read(note))
    except FileNotFoundError:
        return Traces(user)


class Removal:
    """Removes what `traces` names; each step may be repeated."""

    def __init__(self, store: Store, traces: Traces) -> None:
        self.store, self.traces, self.files = store, traces, store.files
        self.keys = traces.binary_keys()
        self.removed: dict[str, int] = {}

    def all(self) -> dict[str, int]:
        """Tables, who points at them, answers, pictures, and what was made to be looked at; how many of each went."""
        for name in self.files.leftovers(0):
            self.files.remove(name)
        self._tables()
        self._answers()
        for picture in sorted(self.traces.pictures):
            for name in (picture, f"{picture}.ref"):  # a copy, a reference, or both
                self._remove("pictures", f"blobs/{picture[:2]}/{name}")
        for folder in ("reports", "scratch"):
            for name in self.files.names(folder):
                self._remove(folder, name)
        return self.removed

    def _tables(self) -> None:
        """Write every table again without the rows that go, point at the new writes, then remove the old ones."""
        states = {name: json.loads(self.files.read(name)) for name in self.files.names("envs", ".json")}
        reached = {write for state in states.values() for write in pointed(state["stages"])}
        manifests = {write: self.store.tables.manifest(*write) for write in self.store.tables.writes()}
        rewritten = {(m["table"], m[FROM]): m for m in manifests.values() if m and FROM in m}
        moved: dict[Write, dict[str, Any] | None] = {}
        for write, manifest in manifests.items():
            frame = self._without(write) if manifest else None
            if manifest is None or (frame is not None and write not in reached):
                moved[write] = None
            elif frame is not None:
                moved[write] = self._again(rewritten.get(write)) or self._publish(write, frame, manifest)
        for name, state in states.items():
            if (new := repointed(state, moved)) != state:
                self.files.write(name, json.dumps(new, indent=1).encode())
        for name in self.files.names("stages", ".json"):
            if not moved.keys().isdisjoint(pointed({"": json.loads(self.files.read(name))})):
                self._remove("stage records", name)
        for write in moved:
            self.store.tables.remove(*write)

    def _again(self, earlier: dict[str, Any] | None) -> dict[str, Any] | None:
        """The write that an earlier attempt made, unless more has to go by now."""
        return earlier if earlier and self._without((earlier["table"], earlier["write_id"])) is None else None

    def _without(self, write: Write) -> pl.DataFrame | None:
        """The write's rows that stay, without the keys that go; None where that changes nothing.

        A unit of work that loses a key loses its hashes too, so that the next run asks its questions anew.
        """
        frame = self.store.tables.read(*write)
        kept = frame.filter(~self.traces.rows(write[0], frame.columns))
        self.removed["rows"] = self.removed.get("rows", 0) + len(frame) - len(kept)
        gone = self.keys.implode()
        if "ask" in kept.columns:
            kept = kept.with_columns(ask=pl.when(~pl.col("ask").is_in(gone)).then("ask"))
        if "asks" in kept.columns:
            kept = self._without_keys(kept)
        return None if kept.equals(frame) else kept

    def _without_keys(self, units: pl.DataFrame) -> pl.DataFrame:
        going = set(self.keys)
        if going.isdisjoint(split(units["asks"])):
            return units
        asks = [None if joined is None else _less(joined, going) for joined in units["asks"]]
        changed = pl.Series(asks, dtype=pl.Binary).ne_missing(units["asks"])
        hashes = (pl.when(~changed).then(name).alias(name) for name in HASHES if name in units.columns)
        return units.with_columns(*hashes, asks=pl.Series(asks, dtype=pl.Binary))

    def _publish(self, write: Write, frame: pl.DataFrame, manifest: Mapping[str, Any]) -> dict[str, Any]:
        about = {name: value for name, value in manifest.items() if name not in OWN}
        made = self.store.tables.publish(write[0], frame, {**about, FROM: write[1]})
        return {"write_id": made.write_id, "digest": made.digest, "rows": made.rows}

    def _answers(self) -> None:
        """Replies, questions, corrections, and every use by the user or by an item that goes."""
        subject = self.store.forgotten.subject
        for kind, count in self.store.replies.remove(list(self.keys)).items():
            self.removed[kind] = self.removed.get(kind, 0) + count
        gone = [subject("user", self.traces.user), *(subject("item", item) for item in sorted(self.traces.items))]
        self.store.replies.remove_subjects(gone)
        self.removed["corrections"] = self.store.corrections.remove(self.keys)
        if findable(self.traces.user):
            said = pl.col("text", "by", "reason").str.replace_all(self.traces.user, FORGOTTEN, literal=True)
            self.store.corrections.rewrite(lambda part: part.with_columns(said))

    def _remove(self, kind: str, name: str) -> None:
        if self.files.exists(name):
            self.files.remove(name)
            self.removed[kind] = self.removed.get(kind, 0) + 1


def pointed(stages: Mapping[str, Any]) -> set[Write]:
    """Every write of a table that these stage records point at."""
    return {
        (table, pointer["write_id"])
        for record in stages.values()
        for table, pointer in (*record["tables"].items(), *_carried(record).items())
    }


def repointed(state: Mapping[str, Any], moved: Mapping[Write, Mapping[str, Any] | None]) -> dict[str, Any]:
    """An environment's state with its pointers to writes that were made again moved to the new ones."""

    def pointer(table: str, old: dict[str, Any]) -> dict[str, Any]:
        new = moved.get((table, old["write_id"]))
        return {**old, **{name: new[name] for name in ("write_id", "digest", "rows")}} if new else old

    def record(old: Mapping[str, Any]) -> dict[str, Any]:
        tables = {table: pointer(table, made) for table, made in old["tables"].items()}
        carried = {name.split(".")[0]: pointer(name, made) for name, made in _carried(old).items()}
        return {**old, "tables": tables} | ({"carried": carried} if "carried" in old else {})

    return {**state, "stages": {name: record(old) for name, old in state["stages"].items()}}


def _carried(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Table name -> pointer of the units and finished rows behind a record's tables."""
    return {f"{name}.{record['stage']}": made for name, made in (record.get("carried") or {}).items()}


def _less(joined: bytes, going: set[bytes]) -> bytes:
    keys = (joined[start : start + KEY] for start in range(0, len(joined), KEY))
    return b"".join(key for key in keys if key not in going)
