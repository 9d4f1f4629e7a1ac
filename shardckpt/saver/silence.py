"""When a saver that exists but does not answer is given up; and what the kernel says about its process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Silence", "describe_process"]

_STATES = {"T": ", stopped by a signal", "t": ", stopped by a debugger", "D": ", in uninterruptible sleep"}
_SHORTEST = 0.1  # seconds between two looks


@dataclass
class Silence:
    """How long a process has not answered. Time counts only while this process itself runs.

    Attributes:
        patience: seconds without an answer after which it is given up.
        interval: seconds without a message after which it is asked for one.
    """

    patience: float
    interval: float
    seconds: float = 0.0
    is_asked: bool = False

    def limit(self, patience: float) -> None:
        """Lower the patience to this many seconds, if it is more."""
        self.patience = min(self.patience, patience)
        self.interval = min(self.interval, max(self.patience / 2, _SHORTEST))

    def heard(self) -> None:
        """A message has come."""
        self.seconds, self.is_asked = 0.0, False

    def passed(self) -> bool:
        """Count another interval without a message. True if the process is to be given up."""
        self.seconds += self.interval if self.is_asked else 0.0
        return self.seconds >= self.patience


def describe_process(pid: int) -> str:
    """`process 123, stopped by a signal`"""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        state = stat.rpartition(b")")[2].split(None, 1)[0].decode("ascii")
    except (OSError, IndexError, ValueError):
        state = ""
    return f"process {pid}{_STATES.get(state, '')}"
