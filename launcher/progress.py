"""The progress file: how a worker tells how far it is. See docs/worker-contract.md."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["read_step", "report"]

_LINE_BYTES = 42


def report(step: int) -> None:
    """Tell the launcher that `step` optimizer steps are done.

    Cheap enough for every step (one system call on an open file after the first). Does nothing in
    a process that was not started by `launch`.
    """
    path = os.environ.get("LAUNCH_PROGRESS_FILE")
    if path is None:
        return
    line = f"{step:20d} {time.time():20.6f}\n".encode()
    os.pwrite(_open(path), line, 0)


_opened: dict[str, int] = {}


def _open(path: str) -> int:
    if path not in _opened:
        _opened[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    return _opened[path]


def read_step(path: Path) -> int | None:
    """The number of steps that the worker reported last; None if it never did, or wrote garbage."""
    try:
        line = path.read_bytes()[:_LINE_BYTES]
        step, _ = line.split()
        return int(step) if len(line) == _LINE_BYTES and line.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
