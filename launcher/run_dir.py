"""The run directory: what lies where, who owns it, and which round is next.

RUN_DIR/lock                     held by the one agent that runs here
RUN_DIR/round                    number of the last round
RUN_DIR/verdicts.jsonl           one verdict per failure
RUN_DIR/ranks/rank-00000/        a rank's own directory, with its progress file
RUN_DIR/logs/round-0001/         rank-00000.out, rank-00000.err, rank-00000.error.json
RUN_DIR/logs/saver.log           what the saver of each start has to say
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import BusyError, RunDirError

__all__ = ["RankFiles", "RunDir"]


@dataclass(frozen=True, slots=True)
class RankFiles:
    """Where one rank's output of one round goes, and its own directory."""

    rank: int
    out: Path
    err: Path
    error: Path  # written by scripts that use torchelastic's @record
    directory: Path

    @property
    def progress(self) -> Path:
        return self.directory / "progress"


class RunDir:
    """A run directory that belongs to this process until `close`, or until its death.

    Raises `BusyError` if another agent has it, `RunDirError` if it cannot be written.
    """

    def __init__(self, path: Path, logs: Path) -> None:
        self.path = path
        self.logs = logs
        try:
            path.mkdir(parents=True, exist_ok=True)
            logs.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunDirError(
                f"run directory {path} cannot be written ({error.strerror}: {error.filename}): "
                f"choose another with --run-dir"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise BusyError(
                f"run directory {path} is in use by another launch (pid {owner}): "
                f"stop that one, or choose another directory with --run-dir"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    @property
    def saver_log(self) -> Path:
        """Where the output of every saver goes."""
        return self.logs / "saver.log"

    def begin_round(self, ranks: int) -> tuple[int, list[RankFiles]]:
        """Number of a new round, and its empty log files. No earlier round's files are touched."""
        try:
            number = self._last_round() + 1
            while not self._claim(self._round_dir(number)):
                number += 1
            (self.path / "round").write_text(f"{number}\n")
            files = [self._rank_files(number, rank) for rank in range(ranks)]
            for of_rank in files:
                of_rank.directory.mkdir(parents=True, exist_ok=True)
                of_rank.out.touch()
                of_rank.err.touch()
        except OSError as error:
            raise RunDirError(
                f"run directory {self.path} cannot be written ({error.strerror}: {error.filename})"
            ) from None
        return number, files

    def record(self, line: str) -> None:
        """Append one JSON line to verdicts.jsonl."""
        with open(self.path / "verdicts.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self) -> None:
        os.close(self._lock)

    def _last_round(self) -> int:
        try:
            return int((self.path / "round").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def _claim(self, path: Path) -> bool:
        try:
            path.mkdir()
        except FileExistsError:
            return False
        return True

    def _round_dir(self, number: int) -> Path:
        return self.logs / f"round-{number:04d}"

    def _rank_files(self, number: int, rank: int) -> RankFiles:
        name = f"rank-{rank:05d}"
        logs = self._round_dir(number)
        return RankFiles(
            rank=rank,
            out=logs / f"{name}.out",
            err=logs / f"{name}.err",
            error=logs / f"{name}.error.json",
            directory=self.path / "ranks" / name,
        )
