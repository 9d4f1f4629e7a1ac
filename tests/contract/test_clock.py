"""LAUNCH_CLOCK: times of `launch` and of its workers differ by durations, whatever the system's clock does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import clock
from launcher.progress import read_progress, report
from shardckpt.progress import ProgressFile, now


def report_by_shardckpt() -> None:
    file = ProgressFile.of_worker()
    assert file is not None
    file.step(3)


@pytest.mark.parametrize("write", [lambda: report(3), report_by_shardckpt], ids=["launcher", "shardckpt"])
def test_workers_have_the_time_of_launch(
    write: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here `launch` was started a day before the system's clock was set back."""
    day = 86400.0
    monkeypatch.setenv("LAUNCH_CLOCK", repr(clock.ANCHOR + day))
    monkeypatch.setenv("LAUNCH_PROGRESS_FILE", str(tmp_path / "progress"))
    before = clock.now() + day
    write()
    progress = read_progress(tmp_path / "progress")
    assert progress is not None
    assert before - 0.001 <= progress.time <= clock.now() + day + 0.001
    assert before <= now() <= clock.now() + day


def test_without_launch_it_is_the_systems_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAUNCH_CLOCK", raising=False)
    assert abs(now() - time.time()) < 1.0
    assert "LAUNCH_CLOCK" not in os.environ
