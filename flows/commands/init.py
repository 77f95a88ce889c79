"""init: a commented profile for a folder of files, with every doubtful guess marked on its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.shared import Json, StoreUrl, emit, failures_as_exit_codes, say
from mllmsrec_core.errors import UsageError

if TYPE_CHECKING:
    from tasks.init import Line, Proposal


def init(
    path: Annotated[str, typer.Argument(help="the folder that holds the dataset: local, or any fsspec URL")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the profile to write")] = Path("mine.toml"),
    force: Annotated[bool, typer.Option("--force", help="replace the profile if it exists")] = False,
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Look at a dataset's files and write a commented profile for them; guesses are marked `# unsure`."""
    from tasks.init import propose

    with failures_as_exit_codes(as_json):
        output = output if output.suffix == ".toml" else output.with_name(f"{output.name}.toml")
        if output.exists() and not force:
            raise UsageError(f"{output} exists; --force replaces it, -o FILE.toml writes another")
        if not output.parent.is_dir():
            raise UsageError(f"there is no folder {output.parent} for the profile; make it, or give another with -o")
        proposal = propose(path)
        output.write_text(profile(proposal, path, store), "utf-8")
        if as_json:
            emit("init", path=str(output), dataset=proposal.dataset, unsure=proposal.unsure)
            return
        say(f"{output}: dataset {proposal.dataset}, {len(proposal.unsure)} unsure")
        for doubt in proposal.unsure:
            say(f"  {doubt}")
        say(f"Next: mllmsrec plan -p {output if output.is_absolute() else f'./{output}'}")


def profile(proposal: Proposal, path: str, store: str | None = None) -> str:
    """The proposal as a commented TOML profile, and beside it what is most often set by hand."""
    from tasks.init import Line

    ingest = (
        Line("ingest", "dataset", proposal.dataset),
        Line("ingest", "path", path, note="a folder or any fsspec URL"),
        Line("ingest", "min_history", 5, note="users with fewer interactions wait", off=True),
        Line("ingest", "k_core", [5, 5], note="as many of each user, and of each item", off=True),
    )
    tables: dict[str, list[Line]] = {}
    for line in (*([Line("settings", "store", store)] if store else []), *ingest, *proposal.lines):
        tables.setdefault(line.table, []).append(line)
    doubts = f" {len(proposal.unsure)} of the guesses are marked `# unsure`: check them." if proposal.unsure else ""
    head = (
        f"# What the files seem to be: {proposal.dataset}.{doubts}\n"
        "# Then: mllmsrec plan -p THIS.toml, and mllmsrec run -p THIS.toml --sample 100\n\n"
        '# model = "Qwen/Qwen2.5-VL-7B-Instruct"  # every stage that names none of its own; else a very small one'
    )
    return (
        "\n\n".join([head, *("\n".join([f"[{table}]", *map(written, lines)]) for table, lines in tables.items())])
        + "\n"
    )


def written(line: Line) -> str:
    """`key = value  # unsure: why; note` on one line, whatever stands in the name of a file or column."""
    said = "; ".join(part for part in (line.unsure and f"unsure: {line.unsure}", line.note) if part)
    said = "".join(letter if letter.isprintable() else "?" for letter in said)
    value = json.dumps(line.value, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )  # the one that TOML escapes and JSON not
    text = f"{'# ' if line.off else ''}{line.key} = {value}"
    return f"{text}  # {said}" if said else text
