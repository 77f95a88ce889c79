"""Every test of the store runs on a local folder and in memory, which stands for object stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.files import Files


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path}"


@pytest.fixture
def files(url: str) -> Files:
    return Files(url)
