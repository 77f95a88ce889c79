"""Configuration in layers: defaults in code, then profiles, then `MLLMSREC_*`, then `--set`; unknown keys are errors.

A profile is a TOML file with one table per stage, `[settings]`, and the keys `model`, `dtype` and `quantisation`, which
every stage without a model of its own uses.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mllmsrec_core.errors import UsageError, nearest
from tasks.config import Config, Pipeline, Settings

PREFIX = "MLLMSREC_"


def load(profiles: Iterable[str], sets: Iterable[str] = (), environ: Mapping[str, str] | None = None) -> Config:
    """Merge the layers and validate. Raises UsageError that names the wrong key and the nearest right one."""
    profiles = tuple(profiles)
    merged: dict[str, Any] = {}
    for name in profiles:
        _merge(merged, read_profile(name))
    for path, value in _from_environment(os.environ if environ is None else environ):
        _put(merged, path, value)
    for text in sets:
        path, separator, value = text.partition("=")
        if not separator:
            raise UsageError(f"--set {text}: write it as key=value, for example --set caption.max_tokens=100")
        _put(merged, path.strip().split("."), _value(value))
    settings = merged.pop("settings", {})
    known = sorted(set(Pipeline.model_fields) | {"settings"})
    return Config(_validate(Settings, settings, "settings."), _validate(Pipeline, merged, "", known))


def stages_with_model() -> list[str]:
    """Stages whose questions go to a model of their own choosing."""
    return [name for name, params in Config(Settings(), Pipeline()).stage_params().items() if hasattr(params, "model")]


def read_profile(name: str) -> dict[str, Any]:
    """A profile that ships with the package, or a TOML file by its path."""
    shipped = resources.files("flows") / "profiles" / f"{name}.toml"
    path = Path(name) if name.endswith(".toml") else shipped
    if not path.is_file():
        names = [entry.name.removesuffix(".toml") for entry in (resources.files("flows") / "profiles").iterdir()]
        raise UsageError(
            f"there is no profile `{name}`; {nearest(name, names)} A file is given by its path: ./{name}.toml"
        )
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"profile {path} is not valid TOML: {error}") from error


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for name, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _put(into: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        into = into.setdefault(name, {})
        if not isinstance(into, dict):
            raise UsageError(f"{'.'.join(path)}: `{name}` is a value, not a table")
    into[path[-1]] = value


def _from_environment(environ: Mapping[str, str]) -> Iterable[tuple[list[str], Any]]:
    """`MLLMSREC_STORE` is a setting, `MLLMSREC_CAPTION__MAX_TOKENS` a parameter of a stage."""
    for name, value in sorted(environ.items()):
        if name.startswith(PREFIX):
            path = name.removeprefix(PREFIX).lower().split("__")
            yield (["settings", *path] if len(path) == 1 and path[0] in Settings.model_fields else path), _value(value)


def _value(text: str) -> Any:
    """TOML where it parses, `file:PATH` as that file's text, else the text itself."""
    if text.startswith("file:"):
        path = Path(text.removeprefix("file:"))
        if not path.is_file():
            raise UsageError(f"{text}: there is no file {path}")
        return path.read_text("utf-8").rstrip("\n")
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _validate(model: type[Any], values: dict[str, Any], where: str, known: list[str] | None = None) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(model, item, where, known) for item in error.errors())) from None


def _explain(model: type[BaseModel], item: Any, where: str, known: list[str] | None) -> str:
    path = [str(part) for part in item["loc"]]
    name = where + ".".join(path)
    if item["type"] == "extra_forbidden":
        return f"unknown key `{name}`; {nearest(path[-1], _fields(model, path[:-1], known))}"
    return f"`{name}` = {item['input']!r}: {item['msg']}"


def _fields(model: Any, path: list[str], known: list[str] | None) -> list[str]:
    for name in path:
        model, known = model.model_fields[name].annotation, None
    return known or sorted(model.model_fields)
