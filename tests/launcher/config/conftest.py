"""Fixtures of the tests of config."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a script in it."""
    monkeypatch.chdir(tmp_path)
    for variable in ("PET_NPROC_PER_NODE", "PET_NNODES", "PET_MAX_RESTARTS", "SLURM_STEP_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "train.py").write_text("")
    return tmp_path
