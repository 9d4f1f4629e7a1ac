"""Process trees on Linux: who belongs to whom, and how nobody outlives its owner."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import time
from collections.abc import Iterable

__all__ = [
    "Subreaper",
    "adopt_orphans",
    "allow_tracing",
    "child_pids",
    "descendant_pids",
    "die_with_parent",
    "outlive_parent",
    "raise_file_limit",
    "restore_file_limit",
    "signal_all",
]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = -1

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies. Exits at once if it is dead already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def outlive_parent() -> None:
    """Undo `die_with_parent`."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def raise_file_limit() -> int:
    """Let this process open as many files as the hard limit allows; returns how many it could open before."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):
        pass  # what the kernel allows has been lowered since; then it stays as it is
    return before


def restore_file_limit(files: int) -> None:
    """Undo `raise_file_limit`, which returned `files`: some programs do not expect more."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def allow_tracing() -> None:
    """Let other processes of this user read this one's stacks, where Yama restricts that to parents.

    Not inherited by children. Does nothing on kernels without Yama, which restrict nothing.
    """
    try:
        _prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, daemons included.

    Afterwards, having no children left (ECHILD) means that the whole tree is gone.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _children_by_parent() -> dict[int, list[int]]:
    by_parent: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - ten times as fast
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # The command in parentheses may contain anything, also parentheses.
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue  # it has just ended
        by_parent.setdefault(int(fields[1]), []).append(int(name))
    return by_parent


def child_pids(parent: int) -> set[int]:
    """The direct children of `parent`, also dead ones that it has not reaped yet."""
    return set(_children_by_parent().get(parent, ()))


def descendant_pids(roots: Iterable[int]) -> list[int]:
    """The processes below `roots`, parents first, also dead ones that nobody has reaped yet."""
    by_parent = _children_by_parent()
    found: list[int] = []
    level = list(roots)
    while level:
        level = [child for pid in level for child in by_parent.get(pid, ())]
        found += level
    return found


def signal_all(pids: Iterable[int], signum: int) -> None:
    """Send `signum` to each of `pids` that still exists."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except (ProcessLookupError, PermissionError):
            pass


class Subreaper:
    """This process as the one that adopts what its children leave behind, and ends it.

    Children that it has already when this is made are not its business, nor are those it is to spare. `files`
    is how many files its workers may open; None: as many as it may itself.
    """

    def __init__(self, files: int | None = None) -> None:
        self.files = files
        adopt_orphans()
        self._spared = child_pids(os.getpid())

    def spare(self, pid: int) -> None:
        """Let the child `pid` live until it ends by itself."""
        self._spared.add(pid)

    def forget(self, pid: int) -> None:
        """The child `pid` has been reaped: another process may get its number."""
        self._spared.discard(pid)

    def end_children(self, patience: float) -> None:
        """Kill and reap all children of this process that are not spared, and everything below them.

        Gives up after `patience` seconds, on processes that even SIGKILL does not end.
        """
        deadline = time.monotonic() + patience
        while (doomed := child_pids(os.getpid()) - self._spared) and time.monotonic() < deadline:
            signal_all([*doomed, *descendant_pids(doomed)], signal.SIGKILL)
            for pid in doomed:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    pass  # a thread of this process has reaped it
            time.sleep(0.001)
