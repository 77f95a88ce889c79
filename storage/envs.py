"""Environments and stage records: small JSON files that say which tables stand where.

`stages/<stage>/<fingerprint>.json` says which tables a stage made of exactly these inputs; `envs/<name>/<seq>.json` says
which tables an environment shows, the highest number holds. Both are written after what they point at.
`rates/<stage>/<model>.json` is how fast a model last answered a stage's questions. Knows nothing of what stages mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
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
        """The environment as it stands: `{"seq", "at", "note", "stages": {stage: record}}`.

        Before its first run it is `{"seq": 0, "stages": {}}`.
        """
        paths = self._states(name)
        newest = self._json(paths[max(paths)]) if paths else None
        return newest or {"seq": 0, "stages": {}}

    def history(self, name: str) -> list[dict[str, Any]]:
        """Every state of the environment, oldest first."""
        states = (self._json(path) for _, path in sorted(self._states(name).items()))
        return [state for state in states if state]

    def move(self, name: str, stages: dict[str, Any], note: str = "") -> int:
        """Point the environment at `stages` over what it showed before; returns the new number.

        Nothing is written when nothing changed. Of two racers each gets a number of its own; the later one holds.
        """
        return self._next(name, lambda shown: {**shown, **stages}, note)

    def replace(self, name: str, stages: dict[str, Any], note: str) -> int:
        """Point the environment at exactly `stages`; otherwise as `move`."""
        return self._next(name, lambda shown: stages, note)

    def rate(self, stage: str, model: str) -> float | None:
        """Questions of the stage that the model answers a second, as last measured; `model` is a slug or `source`."""
        return (self._json(_rate(stage, model)) or {}).get("asks_per_second")

    def write_rate(self, stage: str, model: str, rate: float) -> None:
        self._write(_rate(stage, model), {"asks_per_second": rate, "at": _now()})

    def names(self) -> list[str]:
        return sorted({name.split("/")[1] for name in self.files.names("envs", ".json")})

    def _next(self, name: str, follow: Callable[[dict[str, Any]], dict[str, Any]], note: str) -> int:
        while True:
            now = self.current(name)
            stages = json.loads(json.dumps(follow(now["stages"])))  # compared with what was read: a tuple is a list
            if stages == now["stages"]:
                return now["seq"]
            state = {"seq": now["seq"] + 1, "at": _now(), "note": note, "stages": stages}
            if self.files.create(f"envs/{name}/{state['seq']:08d}.json", json.dumps(state, indent=1).encode()):
                return state["seq"]

    def _states(self, name: str) -> dict[int, str]:
        """Number -> file of each state."""
        if not NAME.fullmatch(name):
            raise UsageError(f"environment `{name}`: a name is made of letters, digits, `_`, `-` and `.`")
        found = ((_stem(path), path) for path in self.files.names(f"envs/{name}", ".json"))
        return {int(stem): path for stem, path in found if stem.isdigit()}

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


def _rate(stage: str, model: str) -> str:
    return f"rates/{stage}/{model}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
