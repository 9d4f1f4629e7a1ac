"""The run directory: its files, its owner, and the number of the next round.

RUN_DIR/lock                     held by the one agent that runs here, or shared by the agents of several nodes
RUN_DIR/round                    number of the last round
RUN_DIR/ranks/rank-00000/        a rank's own directory, with its progress file
RUN_DIR/logs/round-0001/         rank-00000.out, rank-00000.err, rank-00000.error.json
RUN_DIR/imports.json             what workers have imported, see zygote/import_record.py
RUN_DIR/stacks/round-0001/       rank-00000.txt: a rank's stacks when it hung, or when a user asked

The files of one agent are in the run directory itself or, where several nodes share one on a network file
system, in RUN_DIR/nodes/HOST/:

verdicts.jsonl                   one verdict per failure
events.jsonl                     what happened, see journal.py
control.json                     the address of the agent's control socket, see control.py
drain                            the request to save and end; empty while there is none
saver.log, member.log            the output of these processes
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import BusyError, RunDirError

__all__ = ["RankFiles", "RunDir", "as_typed"]

_AGENTS_PER_HOST = 16


def as_typed(path: Path) -> Path:
    """`path` as the user would type it: relative if it is below the current directory."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


@dataclass(frozen=True, slots=True)
class RankFiles:
    """The files of one rank in one round.

    Args:
        rank: the rank.
        out, err: its stdout and stderr.
        error: written by scripts that use torchelastic's @record.
        directory: the rank's own directory, the same in all rounds.
    """

    rank: int
    out: Path
    err: Path
    error: Path
    directory: Path

    @property
    def progress(self) -> Path:
        return self.directory / "progress"


class RunDir:
    """A run directory that this process owns until `close`, or until its death.

    Args:
        path: the run directory; created if it does not exist.
        logs: the directory in which each round gets a directory of log files.
        is_shared: true if agents of other nodes may use it too.

    Raises:
        BusyError: another agent uses it.
        RunDirError: it cannot be written.
    """

    def __init__(self, path: Path, logs: Path, *, is_shared: bool = False) -> None:
        self.path = path
        self.logs = logs
        self._locks: list[int] = []
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock(path, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
            self.own = self._take_node() if is_shared else path
            self.drain.write_bytes(b"")
        except BlockingIOError:
            owner = self._owner()
            self.close()
            raise BusyError(
                f"run directory {path} is in use by another launch (pid {owner}): "
                f"stop that one, or choose another directory with --run-dir"
            ) from None
        except OSError as error:
            self.close()
            raise RunDirError(
                f"run directory {path} cannot be written ({_reason(error, path)}): choose another with --run-dir"
            ) from None
        try:
            _make_logs(logs)
        except RunDirError:
            self.close()
            raise

    @property
    def saver_log(self) -> Path:
        """The file that gets the output of every saver."""
        return (self.logs if self.own == self.path else self.own) / "saver.log"

    @property
    def member_log(self) -> Path:
        """The file that gets the output of the member process."""
        return self.own / "member.log"

    @property
    def journal(self) -> Path:
        return self.own / "events.jsonl"

    @property
    def drain(self) -> Path:
        """The workers' request to save and end; see docs/worker-contract.md."""
        return self.own / "drain"

    def stacks(self, number: int) -> Path:
        """The directory for the stacks of a round's workers."""
        return self.path / "stacks" / f"round-{number:04d}"

    def next_round(self) -> int:
        """The lowest number, from 1, that the next round can have."""
        number = self._last_round() + 1
        while self._round_dir(number).exists():
            number += 1
        return number

    def begin_round(self, number: int, ranks: Iterable[int]) -> list[RankFiles]:
        """Create the files of `ranks` in a new round; those of earlier rounds stay. Raises `RunDirError`."""
        try:
            self._round_dir(number).mkdir(exist_ok=True)
            (self.path / "round").write_text(f"{number}\n")
            self.drain.write_bytes(b"")
            files = [self._rank_files(number, rank) for rank in ranks]
            for of_rank in files:
                of_rank.directory.mkdir(parents=True, exist_ok=True)
                of_rank.progress.unlink(missing_ok=True)
                of_rank.out.touch()
                of_rank.err.touch()
        except OSError as error:
            raise RunDirError(
                f"run directory {self.path} cannot be written ({_reason(error, self._round_dir(number))})"
            ) from None
        return files

    def request_drain(self, reason: str, tiers: str) -> None:
        """Ask this node's workers to save at their next step boundary and to end.

        Args:
            reason: "preemption" or "restart".
            tiers: "durable" or "memory"; docs/worker-contract.md has the meaning.

        Raises:
            RunDirError: the request cannot be written.
        """
        try:
            self.drain.write_text(json.dumps({"reason": reason, "tiers": tiers}) + "\n")
        except OSError as error:
            raise RunDirError(f"{self.drain} cannot be written: {error.strerror}") from None

    def record(self, line: str) -> None:
        """Append one JSON line to verdicts.jsonl."""
        with open(self.own / "verdicts.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def has_saved(self) -> bool:
        """True if the journal has a durable checkpoint, or a drain, of an earlier job in this directory."""
        try:
            told = self.journal.read_bytes()
        except OSError:
            return False
        return b'"event": "persisted"' in told or b'"event": "drained"' in told

    def close(self) -> None:
        """Release the directory."""
        for lock in self._locks:
            os.close(lock)
        self._locks = []

    def _lock(self, path: Path, how: int) -> None:
        """Lock a directory. Raises BlockingIOError if another process has the lock."""
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BaseException:
            os.close(lock)
            raise
        self._locks.append(lock)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)

    def _owner(self) -> str:
        try:
            return (self.path / "lock").read_text(errors="replace").strip() or "unknown"
        except OSError:
            return "unknown"

    def _take_node(self) -> Path:
        """Lock and return a directory for this agent; a second agent on the host gets another one."""
        host = socket.gethostname()
        names = [host, *(f"{host}-{number}" for number in range(2, _AGENTS_PER_HOST + 1))]
        for name in names:
            path = self.path / "nodes" / name
            path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock(path, fcntl.LOCK_EX)
            except BlockingIOError:
                continue
            return path
        raise BlockingIOError

    def _last_round(self) -> int:
        try:
            return int((self.path / "round").read_text())
        except (FileNotFoundError, ValueError):
            return 0

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


def _make_logs(path: Path) -> None:
    """Create the directory of the rounds' log directories. Raises `RunDirError` if it is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        why = None if os.access(path, os.W_OK | os.X_OK) else "not writable"
    except OSError as error:
        why = _reason(error, path)
    if why is not None:
        raise RunDirError(f"log directory {path} cannot be written ({why}): choose another with --log-dir")


def _reason(error: OSError, path: Path) -> str:
    """The error's text and file; `path` if the system does not name one."""
    return f"{error.strerror}: {error.filename or path}"
