"""Files of a rank, and a machine whose kernel has killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.run_dir import RankFiles
from launcher.system.oom import OomWatch


@pytest.fixture
def files(tmp_path: Path) -> RankFiles:
    for name in ("out", "err"):
        (tmp_path / name).touch()
    return RankFiles(0, tmp_path / "out", tmp_path / "err", tmp_path / "error", tmp_path)


@pytest.fixture
def oom(tmp_path: Path) -> OomWatch:
    """A machine whose kernel has killed once for want of memory since the round's start."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("oom_kill 0\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 67108864 kB\n")
    watch = OomWatch(tmp_path)
    (tmp_path / "proc/vmstat").write_text("oom_kill 1\n")
    return watch
