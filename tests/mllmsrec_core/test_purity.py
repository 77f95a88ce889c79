"""The core opens nothing: files, clocks, the network and unseeded chance belong to the layers around it."""

import ast
from pathlib import Path

import pytest

import mllmsrec_core

CORE = Path(mllmsrec_core.__file__).parent
FILES = sorted(CORE.rglob("*.py"))
BANNED = {
    "pathlib",
    "os",
    "shutil",
    "glob",
    "tempfile",
    "socket",
    "urllib",
    "http",
    "subprocess",
    "time",
    "secrets",
    "uuid",
}
CLOCKS = {"now", "utcnow", "today"}


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [(node.module or "").partition(".")[0]] if isinstance(node, ast.ImportFrom) else []


def opens(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name):
        return node.func.id == "open"
    return isinstance(node.func, ast.Attribute) and node.func.attr.startswith(("read_", "scan_", "sink_", "write_"))


def violations(source: str, pillow_allowed: bool = False) -> list[str]:
    found = []
    banned = BANNED if pillow_allowed else BANNED | {"PIL"}
    for node in ast.walk(ast.parse(source)):
        found += [f"import {name}" for name in imported(node) if name in banned]
        if opens(node):
            found.append(ast.unparse(node)[:60])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CLOCKS:
            found.append(ast.unparse(node)[:60])
    return found


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(CORE)) for file in FILES])
def test_a_file_of_the_core_opens_nothing_and_asks_no_clock(file):
    assert violations(file.read_text(), file.relative_to(CORE).as_posix() == "datasets/demo.py") == []


@pytest.mark.parametrize(
    "line",
    [
        "open('x')",
        "pl.read_csv('x')",
        "pl.scan_parquet('x')",
        "frame.write_parquet('x')",
        "import pathlib",
        "from pathlib import Path",
        "import os.path",
        "from PIL import Image",
        "datetime.now()",
    ],
)
def test_the_check_itself_sees(line):
    assert violations(line)


def test_there_is_something_to_check():
    assert len(FILES) > 5
