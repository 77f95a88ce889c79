"""Names of models and the weights they stand for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mllmsrec_core.errors import UsageError
from tasks.models import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints / "llava", tmp_path / "llava"))


def test_the_same_content_elsewhere_is_the_same_model(folder: Path, checkpoints: Path) -> None:
    here, there = resolve(str(folder)), resolve(str(checkpoints / "llava"))
    assert here.model == there.model
    assert here.location != there.location
    assert here.model.name == "llava" and str(folder) not in repr(here.model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_any_change_of_weights_configuration_or_tokenizer_is_another_model(folder: Path, name: str) -> None:
    before = resolve(str(folder)).model
    file = folder / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert resolve(str(folder)).model.revision != before.revision


def test_notes_and_pickles_beside_the_weights_change_nothing(folder: Path) -> None:
    before = resolve(str(folder)).model
    (folder / "README.md").write_text("notes")
    (folder / "training_args.bin").write_bytes(b"pickle")
    assert resolve(str(folder)).model == before


def test_the_dtype_is_by_default_that_of_the_model_wherever_it_runs(folder: Path) -> None:
    assert resolve("embedded-vlm", "auto") == resolve("embedded-vlm", "float32")
    assert resolve(str(folder), "auto") == resolve(str(folder), "bfloat16")


def test_dtype_quantisation_and_pixels_are_part_of_the_model(folder: Path) -> None:
    plain = resolve(str(folder)).model
    others = [
        resolve(str(folder), "bfloat16"),
        resolve(str(folder), quantisation="nf4"),
        resolve(str(folder), max_pixels=9),
    ]
    assert len({plain, *(other.model for other in others)}) == 4
    assert {other.model.slug for other in others} == {plain.slug}  # the same files


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UsageError, match="safetensors"):
        resolve(str(tmp_path))


def test_a_hub_id_at_a_commit_needs_no_network() -> None:
    known = resolve(f"org/name@{COMMIT}")
    assert (known.model.name, known.model.revision) == ("org/name", COMMIT)
    assert known.location == f"org/name@{COMMIT}"


def test_a_branch_without_the_hub_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"org/name@<40 hex digits>"):
        resolve("org/name@main")


def test_a_branch_in_the_local_cache_is_found_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--org--name" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT)
    assert resolve("org/name").location == f"org/name@{COMMIT}"


@pytest.mark.parametrize("name", ["embeded-vlm", "", "./nowhere", "/nowhere/at/all", "a b/c"])
def test_a_name_that_stands_for_nothing_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="no folder"):
        resolve(name)


@pytest.mark.parametrize("how", [{"dtype": "bfloat17"}, {"quantisation": "nf5"}])
def test_unknown_dtypes_and_quantisations_name_the_nearest(how: Any) -> None:
    with pytest.raises(UsageError, match="did you mean"):
        resolve("scripted", **how)


def test_scripted_is_a_model_of_its_own() -> None:
    assert resolve("scripted", "bfloat16").model.name == "scripted"


def test_importing_models_imports_no_torch() -> None:
    code = "import sys, tasks.models as m; m.resolve('scripted'); print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_served_model_counts_by_the_revision_its_profile_states() -> None:
    found = resolve("served:org/big@2026-11", dtype="bfloat16")
    assert (found.model.name, found.model.revision, found.location) == ("org/big", "2026-11", "")
    assert resolve("served:org/big@2026-12").model != resolve("served:org/big@2026-11").model
    for name in ("served:org/big", "served:@1", "served:"):
        with pytest.raises(UsageError, match="served:NAME@REVISION"):
            resolve(name)


def test_another_revision_of_the_scripted_model_answers_otherwise() -> None:
    assert resolve("scripted@2").model.revision == "2"
    assert resolve("scripted").model.slug != resolve("scripted@2").model.slug
