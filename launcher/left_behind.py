"""Processes that ranks have started and left behind when they ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from launcher.condition import look_at_what_is_left
from launcher.processes import descendants

__all__ = ["LeftBehind", "find_left_behind"]

_PAUSE = 0.02
_LONGEST = 120  # characters of a command line


@dataclass(frozen=True)
class LeftBehind:
    """A process that a rank has left behind."""

    pid: int
    rank: str  # "?" where that is not known
    command: str

    def __str__(self) -> str:
        return f"pid {self.pid} of rank {self.rank}: {self.command}"


def find_left_behind(zygote: int, patience: float) -> list[LeftBehind]:
    """What lives on below the zygote, though every worker has ended, and does not end by itself soon.

    Helpers of libraries end when they find their rank dead: they get `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while left := _look(zygote):
        if time.monotonic() >= deadline:
            break
        time.sleep(_PAUSE)
    return left


def _look(zygote: int) -> list[LeftBehind]:
    living = filter(None, map(look_at_what_is_left, descendants([zygote])))
    return [LeftBehind(one.pid, _rank(one.pid), one.command[:_LONGEST]) for one in living]


def _rank(pid: int) -> str:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return "?"
    return next((one[5:].decode(errors="replace") for one in environ if one.startswith(b"RANK=")), "?")
