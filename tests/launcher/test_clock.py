"""A clock whose differences are durations, in launch and in its workers alike."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launcher import clock
from launcher.progress import read_progress, report
from shardckpt.progress import ProgressFile, now


def test_workers_tell_the_time_as_launch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system's clock says: here launch has started a day before it was set back."""
    day = 86400.0
    monkeypatch.setenv("LAUNCH_CLOCK", repr(clock.ANCHOR + day))
    for number, tell in enumerate((lambda: report(3), told)):
        monkeypatch.setenv("LAUNCH_PROGRESS_FILE", str(tmp_path / str(number)))
        before = clock.now() + day
        tell()
        progress = read_progress(tmp_path / str(number))
        assert progress is not None
        assert before - 0.001 <= progress.time <= clock.now() + day + 0.001
    assert before <= now() <= clock.now() + day


def told() -> None:
    file = ProgressFile.of_worker()
    assert file is not None
    file.step(3)


def test_without_launch_it_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAUNCH_CLOCK", raising=False)
    assert abs(now() - time.time()) < 1.0
    assert "LAUNCH_CLOCK" not in os.environ
