"""The command line as a whole: what it offers, what it loads for that, and that every command keeps the same manners."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from flows.cli import GROUPS, app

COMMANDS = typer.main.get_group(app).commands
HEAVY = ("torch", "transformers", "prefect", "altair", "jinja2", "sklearn", "fsspec", "storage.store")


def test_help_names_every_command_and_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from flows.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        f"print('loaded', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert all(f" {name} " in done.stdout for name in COMMANDS)


def test_every_command_stands_in_one_group_under_its_own_name():
    functions = [command.__name__.rstrip("_") for group in GROUPS.values() for command in group]
    assert sorted(functions) == sorted(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_takes_a_store_and_can_answer_in_json(name):
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {"--store", "--json"} <= options


@pytest.mark.parametrize("words", [["rnu"], ["run", "--stgae", "score"], ["try"], ["run", "--order", "oldest"]])
def test_what_no_command_knows_exits_with_2(words):
    assert CliRunner().invoke(app, words).exit_code == 2
