"""What holds for all of the library's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.mounts import Mount


@pytest.fixture(autouse=True)
def _no_saver(no_saver: None) -> None:
    """A test asks for a saver, or has none."""


@pytest.fixture
def small_disk(tmp_path: Path, mounts: Mount) -> Path:
    """A file system with 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounts("tmpfs", folder, "size=4m")
    return folder
