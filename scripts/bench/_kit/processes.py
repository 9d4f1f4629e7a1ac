"""Processes and files of a benchmark: nothing of them is left, whatever becomes of it.

Processes are found by a mark in their environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "MARK",
    "contained",
    "exit_on_signals",
    "kill_marked",
    "marked",
    "remove_leftovers",
    "scratch_folder",
]

MARK = "SHARDCKPT_BENCH_WORLD"
"""The variable that holds a text of a world's own, in its processes and whatever they start."""

_SHARED = (Path("/dev/shm"), Path("/tmp/ckpt_sock"))
_POLL_SECONDS = 0.01
_GONE_SECONDS = 10.0
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def exit_on_signals() -> None:
    """Have SIGINT, SIGTERM and SIGHUP end this process by SystemExit, so that what it has started is ended.

    Only the first of them does: another one would break that off.
    """

    def end(signum: int, _: object) -> None:
        for one in _ENDING:
            signal.signal(one, signal.SIG_IGN)
        sys.exit(128 + signum)

    for one in _ENDING:
        if signal.getsignal(one) is not signal.SIG_IGN:  # as under nohup
            signal.signal(one, end)


@contextmanager
def _deferred() -> Iterator[None]:
    """Signals that end this process do so when the context does, not in the middle of it."""
    came: list[int] = []
    handlers = {one: signal.getsignal(one) for one in _ENDING}
    for one, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(one, lambda signum, _: came.append(signum))
    try:
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def contained(mark: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """subprocess.Popen for processes with the mark. Whatever ends the context, nothing of them is left then."""
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], *, env: dict[str, str], **options: Any) -> subprocess.Popen[bytes]:
        with _deferred():  # or one that has just been started might not be known
            started.append(subprocess.Popen(command, env={**env, MARK: mark}, **options))
        return started[-1]

    try:
        yield start
    finally:
        with _deferred():
            kill_marked(mark)
            for process in started:
                process.kill()
                process.wait()


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder. Whatever ends the context, it is removed then."""
    with _deferred():
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        with _deferred():
            shutil.rmtree(folder)


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
