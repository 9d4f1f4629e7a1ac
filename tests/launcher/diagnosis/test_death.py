"""What is read from a failed rank's files."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from launcher.diagnosis.death import read_death
from launcher.diagnosis.judge import find_culprit
from launcher.events import WorkerExited
from launcher.run_dir import RankFiles
from launcher.system.oom import OomWatch
from tests.kit.failures import (
    TRACEBACK,
    gathered,
    verdict_on,
)


def test_everything_is_gathered(files: RankFiles) -> None:
    files.err.write_text(f"loading\n{TRACEBACK}bye\n")
    files.progress.write_text(f"{1200:20d} {1e9:20.6f}\n")
    death = gathered(files)
    assert (death.rank, death.pid, death.code, death.host, death.at) == (0, 100, 1, "here", 1e9)
    assert death.step == 1200
    assert death.has_traceback
    assert death.error == "KeyError: 'x'"
    assert "\n".join(death.lines) + "\n" == TRACEBACK
    assert death.log == str(files.err)


def test_last_lines_without_a_traceback(files: RankFiles) -> None:
    """stderr's, or stdout's if there is nothing on stderr; of a progress bar its last state."""
    files.out.write_text("".join(f"step {i}\n" for i in range(100)))
    assert gathered(files).lines == tuple(f"step {i}" for i in range(90, 100))
    files.err.write_bytes(b"\r 1%\r 2%\r 3%\xff")
    assert gathered(files).lines == (" 3%\ufffd",)
    assert gathered(files).error is None


def test_the_error_file_of_torchelastic(files: RankFiles) -> None:
    message = {"message": "KeyError: 'z'", "extraInfo": {"py_callstack": TRACEBACK.replace("x", "z")}}
    files.error.write_text(json.dumps({"message": message}))
    assert gathered(files).error == "KeyError: 'z'"
    assert gathered(files).has_traceback
    files.error.write_text(json.dumps({"message": "no call stack was told"}))
    files.err.write_text("a line\n")
    assert gathered(files).error == "no call stack was told"
    assert gathered(files).lines == ("a line",)
    assert not gathered(files).has_traceback
    for garbage in ("", "{", "[]", '{"message": {}}', "1"):
        files.error.write_text(garbage)
        assert gathered(files).error is None


def test_missing_files_are_no_evidence(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    death = gathered(RankFiles(0, nowhere, nowhere, nowhere, nowhere))
    assert (death.lines, death.error, death.step) == ((), None, None)


def test_whose_sigkill_it_was(files: RankFiles, oom: OomWatch) -> None:
    assert "(the machine's 64.0 GiB)" in (gathered(files, -9, oom).kill or "")
    assert gathered(files, -9, oom, is_ours=True).kill is None
    assert gathered(files, -11, oom).kill is None
    assert gathered(files, -9).kill is None


def test_memory_that_a_dataloader_worker_lacked(files: RankFiles, oom: OomWatch) -> None:
    said = TRACEBACK.replace(
        "KeyError: 'x'", "RuntimeError: DataLoader worker (pid 23018) is killed by signal: Killed. "
    )
    files.err.write_text(said)
    death = gathered(files, 1, oom)
    assert (death.kill or "").startswith("its DataLoader worker was ")
    assert "killed a DataLoader worker" in (verdict_on(death).hint or "")
    assert verdict_on(death).cause.endswith(f" (exit code 1); {death.kill}")
    assert find_culprit([death]) is death
    oom.mark()
    assert gathered(files, 1, oom).kill is None  # the kernel has not killed for that


def test_a_dataloader_worker_that_died_of_something_else(files: RankFiles, oom: OomWatch) -> None:
    said = "RuntimeError: DataLoader worker (pid 23018) is killed by signal: Segmentation fault. "
    files.err.write_text(TRACEBACK.replace("KeyError: 'x'", said))
    assert gathered(files, 1, oom).kill is None


def test_an_answer_to_a_stop_is_no_failure(files: RankFiles) -> None:
    """A worker may handle SIGTERM, and raise; what it had raised before that is its own."""
    exit_ = WorkerExited(0, 100, 1, 1.0)
    files.err.write_text("loading\n")
    before = files.err.stat().st_size
    files.err.write_text(f"loading\n{TRACEBACK}")
    answer = read_death(files, exit_, "here", 1e9, None, True, before)
    assert not answer.has_traceback
    assert find_culprit([answer], is_explained=True) is None  # a hang, or a node that is lost
    own = read_death(files, exit_, "here", 1e9, None, True, before + 60)
    assert find_culprit([own]) == own


def test_an_error_marked_as_uncaught_counts_however_the_teardown_went_on(files: RankFiles) -> None:
    marked = "".join(f"[rank0]: {line}\n" for line in TRACEBACK.splitlines())
    files.err.write_text(f"{marked}closing the loader\nstill closing\n")
    death = gathered(files, -signal.SIGKILL, is_ours=True)
    assert (death.error, death.failure_code) == ("KeyError: 'x'", 1)
