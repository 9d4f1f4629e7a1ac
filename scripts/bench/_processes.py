"""Processes of a benchmark: found by a mark in their environment, and ended, whatever becomes of it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

__all__ = ["MARK", "exit_on_sigterm", "kill_marked", "marked", "remove_leftovers"]

MARK = "SHARDCKPT_BENCH_WORLD"
"""The variable that holds a text of a world's own, in its processes and whatever they start."""

_SHARED = (Path("/dev/shm"), Path("/tmp/ckpt_sock"))
_POLL_SECONDS = 0.01
_GONE_SECONDS = 10.0


def exit_on_sigterm() -> None:
    """Have SIGTERM end this process by SystemExit, so that what it has started is ended and removed."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def marked(mark: str) -> list[int]:
    """The processes that have the mark, and have not ended."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def kill_marked(mark: str) -> None:
    """Kill them all, also those that the first ones still start, and delete what they leave in shared memory."""
    deadline = time.monotonic() + _GONE_SECONDS
    while (pids := marked(mark)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(_POLL_SECONDS)
    remove_leftovers(mark)


def remove_leftovers(mark: str) -> None:
    """Delete shared memory and sockets that are named after the mark."""
    for folder in _SHARED:
        for path in folder.glob(f"*{mark}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
