"""Process trees on Linux: parents and children, and how to let no process outlive its owner."""

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
    """Have the kernel kill this process when `parent` dies. Exits at once if `parent` is dead already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def outlive_parent() -> None:
    """Undo `die_with_parent`."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def raise_file_limit() -> int:
    """Raise this process's limit of open files to the hard one; return the former limit."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):
        pass  # the kernel's maximum has been lowered since; the limit stays
    return before


def restore_file_limit(files: int) -> None:
    """Undo `raise_file_limit`, which returned `files`: some programs expect no higher limit."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def allow_tracing() -> None:
    """Let other processes of this user read this one's stacks, where Yama restricts that to parents.

    Children do not inherit it. Does nothing on kernels without Yama, which have no such restriction.
    """
    try:
        _prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, daemons included.

    From then on, having no children (ECHILD) means that the whole tree is gone.
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
    """The direct children of `parent`, dead ones that it has not reaped included."""
    return set(_children_by_parent().get(parent, ()))


def descendant_pids(roots: Iterable[int]) -> list[int]:
    """The processes below `roots`, parents first, dead ones that are not reaped included."""
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
    """Makes this process adopt what its children leave behind, and ends that.

    Children that exist before, and those that are spared, are left alone.

    Args:
        files: the limit of open files for workers; None: that of this process.
    """

    def __init__(self, files: int | None = None) -> None:
        self.files = files
        adopt_orphans()
        self._spared = child_pids(os.getpid())

    def spare(self, pid: int) -> None:
        """Leave the child `pid` alone until it ends by itself."""
        self._spared.add(pid)

    def forget(self, pid: int) -> None:
        """Spare `pid` no longer: it has been reaped, and another process may get its number."""
        self._spared.discard(pid)

    def end_children(self, patience: float) -> None:
        """Kill and reap all children of this process that are not spared, and everything below them.

        Args:
            patience: seconds, after which processes that SIGKILL does not end are left.
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
