"""The state of a process by /proc: whether it runs, and where in the kernel it sleeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["ProcessState", "has_handler", "read_process_state", "read_remaining_state"]

_DEAD = ("", "Z", "X")


@dataclass(frozen=True)
class ProcessState:
    """A process as /proc describes it.

    Args:
        pid: its number.
        state: the letter in /proc/PID/stat; empty if it does not exist.
        wchan: where it sleeps in the kernel; empty if it does not.
        command: its command line.
    """

    pid: int
    state: str
    wchan: str
    command: str

    @property
    def is_still(self) -> bool:
        """True if it cannot run: then it need not be stopped for a dump of its stacks."""
        return self.state in ("T", "D")

    @property
    def kernel(self) -> str | None:
        """`in uninterruptible sleep in nfs_wait`"""
        what = {"R": "running", "S": "asleep", "D": "in uninterruptible sleep"}.get(self.state)
        return f"{what} in {self.wchan}" if what and self.wchan else what

    def halt(self, before: ProcessState) -> str | None:
        """Why it cannot go on by itself; None if it can.

        Args:
            before: its state some time ago: any process may be in uninterruptible sleep for a moment.
        """
        if self.state in _DEAD:
            return "dead"
        if self.state == "T":
            return "stopped by a signal (SIGSTOP)"
        return self.kernel if self.state == before.state == "D" else None


def read_process_state(pid: int) -> ProcessState:
    """The current state of process `pid`."""
    return _read(pid, Path(f"/proc/{pid}"))


def read_remaining_state(pid: int) -> ProcessState | None:
    """The current state of process `pid`; None if it is dead.

    If its first thread is dead and another one is not, the state is that of the other one.
    """
    process = read_process_state(pid)
    threads = [process]
    if process.state == "Z":
        threads = [_read(pid, path) for path in Path(f"/proc/{pid}/task").glob("*")]
    living = [thread for thread in threads if thread.state not in _DEAD]
    return replace(living[0], command=process.command) if living else None


def has_handler(pid: int, signum: int) -> bool:
    """True if process `pid` has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
        caught = status.partition(b"\nSigCgt:")[2].split(None, 1)[0]
        return bool(int(caught, 16) >> (signum - 1) & 1)
    except (OSError, IndexError, ValueError):
        return False


def _read(pid: int, directory: Path) -> ProcessState:
    def read(name: str) -> str:
        try:
            return (directory / name).read_bytes().decode(errors="replace")
        except OSError:
            return ""

    stat = read("stat")
    state = stat.rpartition(")")[2].split()[:1]
    wchan = read("wchan").strip()
    # A process that is ending has no command line, only a name.
    command = read("cmdline").replace("\0", " ").strip() or stat.partition("(")[2].rpartition(")")[0]
    return ProcessState(pid, state[0] if state else "", wchan if wchan != "0" else "", command)
