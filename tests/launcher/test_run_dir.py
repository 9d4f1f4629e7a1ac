"""The run directory: who owns it, which round is next, and what is said of a disk that is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import BusyError, RunDirError
from launcher.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    run_dir = RunDir(tmp_path / "run", tmp_path / "run/logs")
    yield run_dir
    run_dir.close()


def test_rounds_go_on_counting_and_nothing_is_overwritten(tmp_path: Path) -> None:
    """Also when the job is started again, when logs go elsewhere, and when the counter is lost."""
    for expected in (1, 2):
        run_dir = RunDir(tmp_path / "run", tmp_path / "run/logs")
        assert run_dir.next_round() == expected
        files = run_dir.begin_round(expected, range(2))
        run_dir.close()
        assert files[1].out == tmp_path / f"run/logs/round-000{expected}/rank-00001.out"
        assert files[1].directory == tmp_path / "run/ranks/rank-00001"
        assert files[1].out.read_text() == ""
        files[1].out.write_text("kept")
    run_dir = RunDir(tmp_path / "run", tmp_path / "elsewhere")
    assert run_dir.next_round() == 3
    run_dir.begin_round(3, range(1))
    run_dir.close()
    (tmp_path / "run/round").unlink()
    run_dir = RunDir(tmp_path / "run", tmp_path / "run/logs")
    assert run_dir.next_round() == 3
    run_dir.close()
    assert (tmp_path / "run/logs/round-0001/rank-00001.out").read_text() == "kept"


def test_one_agent_per_run_directory(tmp_path: Path) -> None:
    owner = RunDir(tmp_path / "run", tmp_path / "run/logs")
    with pytest.raises(BusyError, match=rf"in use by another launch \(pid {os.getpid()}\)"):
        RunDir(tmp_path / "run", tmp_path / "run/logs")
    owner.close()
    RunDir(tmp_path / "run", tmp_path / "run/logs").close()


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match=r"cannot be written \(Not a directory.* --run-dir"):
        RunDir(tmp_path / "file/run", tmp_path / "file/run/logs")


def test_a_log_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """The option that is to be changed is the one that is named; the run directory is let go."""
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match=r"log directory .* --log-dir$"):
        RunDir(tmp_path / "run", tmp_path / "file/logs")
    RunDir(tmp_path / "run", tmp_path / "logs").close()


def test_a_full_disk_names_what_could_not_be_written(run_dir: RunDir) -> None:
    """The system does not say which file it was that could not grow."""
    (run_dir.path / "round").symlink_to("/dev/full")
    with pytest.raises(RunDirError, match=r"No space left on device: .*round-0001"):
        run_dir.begin_round(1, [0])
