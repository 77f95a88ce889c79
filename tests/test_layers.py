"""The shape of the code: imports go one way, files tell one idea, and what is imported is declared."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from mllmsrec_core.stages import STAGES

ROOT = Path(__file__).parents[1]
PACKAGES = ("mllmsrec_core", "storage", "tasks", "flows")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_STAGE = 400, 200
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Import name -> distribution, where they differ.
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "open_clip": "open_clip_torch"}
# Imported too, but required by a declared one, which also chooses their version.
THROUGH = {
    "aiohttp": "s3fs",
    "botocore": "s3fs",
    "datasets": "trl",
    "huggingface_hub": "transformers",
    "markupsafe": "jinja2",
    "safetensors": "transformers",
    "tokenizers": "transformers",
}


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_imports_go_from_flows_to_tasks_to_storage_to_the_core(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    broken = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert not broken, capsys.readouterr().out


@pytest.mark.parametrize("source", SOURCES, ids=shown)
def test_no_file_is_longer_than_four_hundred_lines(source):
    assert len(source.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_no_stage_is_longer_than_two_hundred_lines(stage):
    source = ROOT / "mllmsrec_core" / "stages" / f"{stage.name}.py"
    assert len(source.read_text().splitlines()) <= MOST_LINES_OF_A_STAGE


@pytest.mark.parametrize("source", SOURCES, ids=shown)
def test_every_file_opens_by_saying_what_it_is(source):
    assert ast.get_docstring(ast.parse(source.read_text()))


def declared(requirements: list[str]) -> set[str]:
    return {
        re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0].replace("-", "_").lower() for requirement in requirements
    }


def imported(source: Path) -> set[str]:
    """Top-level names of everything the file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_every_library_that_is_imported_is_declared():
    extras = [
        requirement
        for name, group in PROJECT["optional-dependencies"].items()
        if name != "dev"
        for requirement in group
    ]
    known = declared(PROJECT["dependencies"] + extras)
    assert declared(list(THROUGH.values())) <= known
    ours_or_standard = set(PACKAGES) | set(sys.stdlib_module_names) | set(THROUGH)
    used = {(name, shown(source)) for source in SOURCES for name in imported(source) - ours_or_standard}
    missing = {(n, path) for n, path in used if DISTRIBUTION.get(n, n).replace("-", "_").lower() not in known}
    assert missing == set()


def test_every_package_of_ours_is_listed_for_installation():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {source.parent.relative_to(ROOT).as_posix().replace("/", ".") for source in SOURCES}
    assert folders == set(setuptools["packages"])
