"""scripts/soak itself, for some seconds: what it says of a job that recovers, and that it leaves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.launching import ROOT


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_short_soak(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts/soak", "--minutes=0.2", "--seed=2", "--dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "final state: every bit as undisturbed; nothing left behind" in done.stdout
    assert list(tmp_path.iterdir()) == []
