"""Whether a fork of this process would be safe: in it, the locks that other threads hold are never released."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

__all__ = ["count_threads", "is_fork_safe"]

_TRIAL_SECONDS = 60.0
_GPU_DEVICES = ("/dev/nvidia", "/dev/kfd")  # drivers that work in no fork of a process that has opened them


def is_fork_safe(act: Callable[[], object]) -> bool:
    """True if `act`, tried in a fork of this process, leaves neither threads nor a GPU that is open."""
    pid = os.fork()
    if pid == 0:
        try:
            sink = os.open(os.devnull, os.O_RDWR)
            for fd in (1, 2):
                os.dup2(sink, fd)
            act()
            os._exit(0 if count_threads() == 1 and not _opened_devices() else 1)
        finally:
            os._exit(1)
    deadline = time.monotonic() + _TRIAL_SECONDS
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.01)


def count_threads() -> int:
    """Threads that a fork would find: libraries that support forks (OpenBLAS) end theirs before one."""
    if _count_tasks() != 1:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return _count_tasks()


def _count_tasks() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - pathlib would be one more import


def _opened_devices() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115
        except OSError:
            pass
    return [path for path in found if path.startswith(_GPU_DEVICES)]
