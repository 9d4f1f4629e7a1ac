"""Processes that ranks have started, and that still run when the ranks have ended."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.system.process_state import read_remaining_state
from launcher.system.processes import descendant_pids

__all__ = ["LeftBehind", "find_left_behind"]

_PAUSE = 0.02
_LONGEST = 120  # characters of a command line


@dataclass(frozen=True)
class LeftBehind:
    """A process that a rank has left behind."""

    pid: int
    rank: int | None  # None: not known
    command: str

    def __str__(self) -> str:
        whose = "a rank" if self.rank is None else f"rank {self.rank}"
        return f"pid {self.pid} of {whose}: {self.command}"


def find_left_behind(zygote: int, workers: Mapping[int, int], patience: float) -> list[LeftBehind]:
    """The processes below the zygote that still run, although every worker has ended.

    Args:
        zygote: its process id.
        workers: ranks by the process id that each worker had.
        patience: seconds for processes to end by themselves: helpers of libraries do when their rank is dead.
    """
    deadline = time.monotonic() + patience
    while left := _look(zygote, workers):
        if time.monotonic() >= deadline:
            break
        time.sleep(_PAUSE)
    return left


def _look(zygote: int, workers: Mapping[int, int]) -> list[LeftBehind]:
    living = filter(None, map(read_remaining_state, descendant_pids([zygote])))
    return [
        LeftBehind(one.pid, _rank(one.pid, workers), " ".join(one.command.split())[:_LONGEST])
        for one in living
    ]


def _rank(pid: int, workers: Mapping[int, int]) -> int | None:
    """The rank by the process's session, which the worker leads; if it has left that, by its environment."""
    try:
        if (rank := workers.get(os.getsid(pid))) is not None:
            return rank
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    told = next((one[5:] for one in environ if one.startswith(b"RANK=")), b"")
    return int(told) if told.isdigit() else None
