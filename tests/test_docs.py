"""The documents say what the code does: commands, options, tables, links; and the project speaks of itself alone."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

import flows
import mllmsrec_core
import storage
import tasks
from flows.cli import app
from flows.settings import load
from mllmsrec_core import errors
from mllmsrec_core.stages import STAGES

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
COMMANDS = typer.main.get_group(app).commands
NOT_OURS = {".git", ".venv", ".venv-vllm", ".prefect", "__pycache__", "store", "demo-store", "test-output"}
# `mllmsrec run --stage score`: the command and the rest of what is quoted or stands on the line
CALL = re.compile(r"mllmsrec ([a-z]+)\b([^\n`\"'<|]*)")


def tracked() -> list[Path]:
    """Files under version control or about to be; every file of ours where there is no git."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    found = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in found if not NOT_OURS & set(path.relative_to(ROOT).parts)]


def text_of(path: Path) -> str:
    """The file's text; empty for a binary one."""
    content = path.read_bytes()
    return "" if b"\0" in content else content.decode("utf-8", errors="replace")


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def unknown_calls(text: str) -> list[str]:
    """Calls of `mllmsrec` in `text` whose command or long option does not exist."""
    wrong = []
    for name, rest in CALL.findall(text):
        options = set(re.findall(r"--[a-z][a-z-]*", rest))
        known = {o for p in COMMANDS[name].params for o in p.opts} | {"--help"} if name in COMMANDS else set()
        if name not in COMMANDS or options - known:
            wrong.append(f"mllmsrec {name} {' '.join(sorted(options - known))}".strip())
    return wrong


def code_in(markdown: str) -> str:
    """Fenced and indented blocks, and what stands in backticks."""
    fenced = re.findall(r"^```.*?^```", markdown, re.M | re.S)
    indented = re.findall(r"^    .*$", markdown, re.M)
    return "\n".join([*fenced, *indented, *re.findall(r"`[^`\n]+`", markdown)])


@pytest.mark.parametrize("document", DOCS, ids=shown)
def test_every_command_in_a_document_exists_with_its_options(document):
    assert unknown_calls(code_in(document.read_text())) == []


@pytest.mark.parametrize("package", [mllmsrec_core, storage, tasks, flows], ids=lambda package: package.__name__)
def test_every_command_an_error_message_recommends_exists(package):
    sources = [path for path in Path(package.__file__).parent.rglob("*") if path.suffix in (".py", ".j2", ".toml")]
    quoted = re.compile(r"(?:`|<code>|: )(mllmsrec [a-z]+\b[^`\"'<]*)")
    wrong = {shown(path): unknown_calls("\n".join(quoted.findall(path.read_text()))) for path in sources}
    assert {path: calls for path, calls in wrong.items() if calls} == {}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_is_in_the_readme(command):
    assert re.search(rf"^    mllmsrec {command}\b", README, re.M), f"README.md does not show `mllmsrec {command}`"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_says_what_it_does(command):
    assert COMMANDS[command].help


def test_the_check_of_commands_itself_sees():
    assert unknown_calls("mllmsrec rnu -p demo") == ["mllmsrec rnu"]
    assert unknown_calls("mllmsrec run -p demo --stgae score") == ["mllmsrec run --stgae"]


@pytest.mark.parametrize("document", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run"], ids=shown)
def test_every_make_target_that_is_named_exists(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for words in re.findall(r"^ *make ((?:[a-z]+ ?)+)$|^ {4}make ([a-z]+) ", document.read_text(), re.M)
             for word in " ".join(words).split()}  # fmt: skip
    assert named and named <= targets


def test_the_readme_stays_below_two_hundred_lines():
    assert len(README.splitlines()) < 200


def test_the_readme_shows_every_table_with_its_stage_its_key_and_all_its_columns():
    lines = re.findall(r"^\| `(\w+)` \| [^|]+ \| `(\w+)` \| ([^|]+) \|$", README, re.M)
    contracts = [
        (stage.name, table, ", ".join(f"**{n}**" if n in schema.primary_key() else n for n in schema.columns()))
        for stage in STAGES
        for table, schema in stage.writes.items()
    ]
    assert lines == contracts


def test_the_readme_names_every_shipped_profile():
    for profile in (ROOT / "flows" / "profiles").glob("*.toml"):
        assert f"`{profile.stem}`" in README


def test_the_profile_in_the_readme_is_valid(tmp_path):
    (block,) = re.findall(r"^```toml\n(.*?)^```", README, re.M | re.S)
    (tmp_path / "mine.toml").write_text(block)
    ingest = load([str(tmp_path / "mine.toml")], environ={}).stage_params()["ingest"]
    assert (ingest.dataset, ingest.generic.item_columns.item_id) == ("generic", "sku")


@pytest.mark.parametrize("document", DOCS, ids=shown)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCS, ids=shown)
def test_files_a_document_names_exist(document):
    """`mllmsrec_core/ask.py` in backticks is a file or a folder; names with <placeholders> are not looked at."""
    named = re.findall(
        r"`((?:mllmsrec_core|storage|tasks|flows|docs|tests|benchmarks)/[\w./-]*)`", document.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_decision_says_what_why_and_what_it_cost_in_five_lines():
    sections = (ROOT / "docs" / "decisions.md").read_text().split("\n## ")[1:]
    for section in sections:
        title, *lines = [line for line in section.splitlines() if line.strip()]
        assert len(lines) <= 5, title
        assert [line[: line.index(":") + 3] for line in lines] == ["- **What:**", "- **Why:**", "- **Cost:**"], title


def test_the_tree_of_errors_names_every_error():
    ours = [name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__]
    classes = [name for name in ours if isinstance(getattr(errors, name), type)]
    assert classes and [name for name in classes if name not in (errors.__doc__ or "")] == []


def test_no_tracked_file_holds_a_path_of_somebodys_machine():
    machine = re.compile(r"(?<![\w.~/:-])/(?:home|root|Users|work|mnt|opt/pypi)/[\w.-]{2,}")
    held = {shown(path): machine.findall(text_of(path)) for path in tracked()}
    assert {path: found for path, found in held.items() if found} == {}


@pytest.mark.parametrize("package", [mllmsrec_core, storage, tasks, flows], ids=lambda package: package.__name__)
def test_the_imported_package_is_ours(package):
    """`tasks`, `flows` and `storage` are generic names: another package must not stand in for them."""
    assert Path(package.__file__).parent == ROOT / package.__name__


def test_the_arithmetic_of_the_page_on_scale_prints_what_it_shows(capsys):
    text = (ROOT / "docs" / "scaling.md").read_text()
    (code,), (shown,) = (re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S) for kind in ("python", "text"))
    exec(code, {})
    assert capsys.readouterr().out == shown
