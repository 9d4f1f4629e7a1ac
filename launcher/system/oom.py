"""Tells a SIGKILL by the kernel, which ran out of memory, from others."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cgroup_memory import machine_memory, memory_groups, read_table
from launcher.formatting import amount

__all__ = ["OomWatch"]

_FIRST_PID_NAMESPACE = "pid:[4026531836]"
_KILLED = r"(?P<cgroup>Memory cgroup out of memory|Out of memory)[^:]*: Killed process (?P<pid>\d+) "
_HELD = r"(?:anon|shmem)-rss:(\d+)kB"


@dataclass(frozen=True)
class _Counters:
    """How often the kernel has killed because memory ran out, as far as this process can see."""

    cgroup: int  # in the agent's cgroup and those around it, in total
    machine: int  # anywhere on the machine


class OomWatch:
    """Reads the counters of this process's memory cgroups and of the machine, and the kernel's log.

    Sources that cannot be read are left out; in a container these may be all but the cgroup.

    Args:
        root: where /proc, /sys and /dev are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._cgroups = memory_groups(root)
        self._log = _Log(root)
        self._before = self._count()

    def mark(self) -> None:
        """Forget the kills so far."""
        self._before = self._count()
        self._log.skip()

    def explain(self, pid: int) -> str | None:
        """Why a process that died of SIGKILL after `mark` was killed; None if there is no sign of the kernel.

        Args:
            pid: its number in this namespace. The kernel logs the numbers of the first one, so the log is used
                only there.
        """
        held = self._log.find(pid)
        if held is not None:
            is_cgroup, size = held
            return f"killed by the kernel, out of memory ({self._limit(is_cgroup)}; it held {amount(size)})"
        now = self._count()
        if now.cgroup > self._before.cgroup:
            return f"killed by the kernel, out of memory ({self._limit(True)})"
        if now.machine > self._before.machine:
            return (
                f"probably killed by the kernel, which ran out of memory just then ({self._limit(False)})"
            )
        return None

    def _count(self) -> _Counters:
        in_cgroups = sum(group.kills for group in self._cgroups)
        return _Counters(in_cgroups, read_table(self._root / "proc/vmstat").get("oom_kill", 0))

    def _limit(self, is_cgroup: bool) -> str:
        machine = machine_memory(self._root)
        limits = [limit for group in self._cgroups if (limit := group.limit) is not None]
        limits = [limit for limit in limits if machine is None or limit < machine]
        if is_cgroup and limits:
            return f"cgroup limit {amount(min(limits))}"
        return f"the machine's {amount(machine)}" if machine else "the machine's memory"


class _Log:
    """The kernel's log from a position on."""

    def __init__(self, root: Path) -> None:
        self._fd: int | None = None
        try:
            if (root / "proc/self/ns/pid").readlink() == Path(_FIRST_PID_NAMESPACE):
                self._fd = os.open(root / "dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            pass
        self._text = ""
        self.skip()

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def skip(self) -> None:
        self._text = ""
        if self._fd is not None:
            os.lseek(self._fd, 0, os.SEEK_END)

    def find(self, pid: int) -> tuple[bool, int] | None:
        """True if process `pid` was killed because of its cgroup's limit, and the bytes that it held."""
        self._text += "".join(self._read())
        for line in self._text.splitlines():
            killed = re.search(_KILLED, line)
            if killed and int(killed["pid"]) == pid:
                held = sum(map(int, re.findall(_HELD, line))) * 1024
                return killed["cgroup"].startswith("Memory cgroup"), held
        return None

    def _read(self) -> Iterator[str]:
        while self._fd is not None:
            try:
                record = os.read(self._fd, 1 << 13)
            except BrokenPipeError:
                continue  # older records have been overwritten; the next read goes on behind them
            except OSError:
                return
            if not record:
                return
            yield record.decode(errors="replace")
