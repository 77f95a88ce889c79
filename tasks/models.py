"""From the name of a model in a profile to the exact weights that its answers are kept under.

A name is `embedded-vlm`, `embedded-clip`, `scripted` (`scripted@2` answers otherwise), a local folder, a hub id
`org/name@revision`, or `served:name@revision` behind an endpoint that alone has the weights. No model is loaded and
neither torch nor transformers is imported here, so that `plan` stays quick.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path

from mllmsrec_core.ask import Model
from mllmsrec_core.errors import UsageError, nearest

EMBEDDED = {f"embedded-{kind}": Path(__file__).parent / "embedded" / kind for kind in ("vlm", "clip")}
DTYPES = ("float32", "bfloat16", "float16")
QUANTISATIONS = ("none", "nf4")
# What changes an answer: weights, configuration, tokenizer and chat template. Never pickles, never notes beside them.
CONTENT = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_SECONDS = 10.0  # one small request; longer means that there is no way to the hub


@dataclass(frozen=True)
class Resolved:
    """An exact model, and where its weights lie: a folder, `org/name@commit`, or nothing for `scripted`."""

    model: Model
    location: str


def resolve(name: str, dtype: str = "float32", quantisation: str = "none", max_pixels: int | None = None) -> Resolved:
    """The exact weights behind `name`. Raises UsageError for a name that stands for none.

    A folder counts by its base name and content, never by its path, so a moved folder is the same model. A hub id
    counts by commit: a branch or tag is looked up at the hub, or in its local cache when there is no network.
    """
    if dtype == "auto":  # by the model and not by the machine: it is in every key
        dtype = "float32" if name in EMBEDDED else "bfloat16"
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} of model {name} is unknown; {nearest(dtype, DTYPES)}")
    if quantisation not in QUANTISATIONS:
        raise UsageError(
            f"quantisation {quantisation!r} of model {name} is unknown; {nearest(quantisation, QUANTISATIONS)}"
        )
    if name.split("@", maxsplit=1)[0] == "scripted":
        from tasks.engines.scripted import MODEL

        return Resolved(Model(MODEL.name, name.partition("@")[2] or MODEL.revision), "")
    short, revision, location = _weights(name)
    return Resolved(Model(short, revision, dtype, quantisation, max_pixels), location)


def _weights(name: str) -> tuple[str, str, str]:
    """Name, revision and location of the weights behind `name`."""
    if name in EMBEDDED:
        return name, _content(name, EMBEDDED[name]), str(EMBEDDED[name])
    if name.startswith("served:"):
        served, _, revision = name.removeprefix("served:").rpartition("@")
        if not served or not revision:
            raise UsageError(f"model {name}: state the revision that is served, as `served:NAME@REVISION`")
        return served, revision, ""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        folder = folder.resolve()
        return folder.name, _content(name, folder), str(folder)
    hub = HUB_ID.fullmatch(name)
    if hub is None or name.startswith((".", "/", "~")):
        raise UsageError(
            f"model {name!r} is no folder, no hub id `org/name@revision` and not built in; "
            f"{nearest(name, [*EMBEDDED, 'scripted'])}"
        )
    commit = _commit(hub["name"], hub["revision"])
    return hub["name"], commit, f"{hub['name']}@{commit}"


def _content(name: str, folder: Path) -> str:
    """A digest over the files in `folder` that make up the model."""
    files = sorted(file for file in folder.glob("*") if file.is_file() and file.suffix in CONTENT)
    if not any(file.suffix == ".safetensors" for file in files):
        raise UsageError(
            f"model {name}: {folder} holds no .safetensors weights. Save them there, or name another folder."
        )
    stats = [file.stat() for file in files]
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter, so shards are read side by side
        digests = list(threads.map(_digest, files, (s.st_size for s in stats), (s.st_mtime_ns for s in stats)))
    listing = "".join(f"{file.name}\0{digest}\n" for file, digest in zip(files, digests, strict=True))
    return sha256(listing.encode()).hexdigest()


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, modified_ns: int) -> str:
    """The sha256 of a file, read again only when its size or time of change differ."""
    with file.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()


def _commit(name: str, revision: str | None) -> str:
    """The commit that `revision` (none: the default branch) stands for now."""
    if revision and COMMIT.fullmatch(revision):
        return revision
    import huggingface_hub as hub
    from huggingface_hub import constants

    try:
        commit = hub.HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS).sha
    except Exception as error:  # no network, no such repository, no permission: the remedy is the same
        cached = Path(
            constants.HF_HUB_CACHE, hub.constants.REPO_ID_SEPARATOR.join(["models", *name.split("/")]), "refs"
        )
        reference = cached / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else None
        if commit is None:
            raise UsageError(
                f"model {name}: the revision {revision or 'main'!r} cannot be looked up ({type(error).__name__}). "
                f"Without the hub, give the commit as `{name}@<40 hex digits>` or name a local folder with the weights."
            ) from error
    if not commit:
        raise UsageError(f"model {name}: the hub names no commit for {revision or 'main'!r}; give `{name}@<commit>`.")
    return commit
