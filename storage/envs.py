"""Environments and stage records: small JSON files that say which tables stand where.

`stages/<stage>/<fingerprint>.json` says which tables a stage made of exactly these inputs; `envs/<name>/<seq>.json` says
which tables an environment shows, the highest number holds. Both are written after what they point at.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

from mllmsrec_core.errors import StoreError, UsageError
from storage.files import Files

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # one folder, and no way out of it


class Envs:
    """Pointers; nothing here is ever changed in place."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def record(self, stage: str, fingerprint: str) -> dict[str, Any] | None:
        """What a stage made of these inputs, or None when it never finished on them."""
        return self._json(f"stages/{stage}/{fingerprint}.json")

    def write_record(self, stage: str, fingerprint: str, record: dict[str, Any]) -> None:
        self._write(f"stages/{stage}/{fingerprint}.json", record)

    def current(self, name: str) -> dict[str, Any]:
        """The environment as it stands: `{"seq", "at", "stages": {stage: record}}`; empty before its first run."""
        if not NAME.fullmatch(name):
            raise UsageError(f"environment `{name}`: a name is made of letters, digits, `_`, `-` and `.`")
        paths = {
            int(stem): path for path in self.files.names(f"envs/{name}", ".json") if (stem := _stem(path)).isdigit()
        }
        newest = self._json(paths[max(paths)]) if paths else None
        return newest or {"seq": 0, "stages": {}}

    def move(self, name: str, stages: dict[str, Any]) -> int:
        """Point the environment at `stages` over what it showed before; returns the new number.

        Nothing is written when nothing changed. Of two racers each gets a number of its own; the later one holds.
        """
        stages = json.loads(json.dumps(stages))  # compared with what was read, where a tuple is a list
        while True:
            now = self.current(name)
            merged = {**now["stages"], **stages}
            if merged == now["stages"]:
                return now["seq"]
            state = {"seq": now["seq"] + 1, "at": datetime.now(UTC).isoformat(timespec="seconds"), "stages": merged}
            if self.files.create(f"envs/{name}/{state['seq']:08d}.json", json.dumps(state, indent=1).encode()):
                return state["seq"]

    def names(self) -> list[str]:
        return sorted({name.split("/")[1] for name in self.files.names("envs", ".json")})

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads(self.files.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(
                f"{self.files.path(name)} is not JSON; it was changed by hand. Remove it: the next run makes it again."
            ) from error

    def _write(self, name: str, value: dict[str, Any]) -> None:
        self.files.write(name, json.dumps(value, indent=1, sort_keys=True).encode())


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[1].removesuffix(".json")
