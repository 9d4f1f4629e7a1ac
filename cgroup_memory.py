"""How much memory the machine and this process's control groups have left, and how often they ran out of it.

Control groups of version 1 and 2, the process's own and all around it: each of their limits applies. Both
packages use this module; it imports the standard library only. `root` is where /proc and /sys are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryGroup", "Room", "machine_memory", "memory_groups", "memory_room", "read_table"]

_UNLIMITED = 1 << 60  # version 1 writes "no limit" as a number near 2**63


@dataclass(frozen=True)
class MemoryGroup:
    """A memory control group of either version, by its directory. Values that cannot be read are None or 0."""

    path: Path

    @property
    def limit(self) -> int | None:
        """Bytes at which the kernel kills processes of this group; None without a limit."""
        return self._limit("memory.max", "memory.limit_in_bytes")

    @property
    def bound(self) -> int | None:
        """Bytes that the group should not exceed: its limit, or the one at which the kernel throttles it."""
        bounds = [b for b in (self.limit, self._limit("memory.high")) if b is not None]
        return min(bounds, default=None)

    @property
    def used(self) -> int | None:
        """Bytes that the kernel cannot reclaim: page cache that no process has mapped does not count.

        Cache that was read once is "inactive", cache that was read again "active"; the kernel drops both before
        it kills. Mapped files, such as the code of libraries, count as used: without them nothing runs.
        """
        usage = _first_number(self.path / name for name in ("memory.current", "memory.usage_in_bytes"))
        if usage is None:
            return None
        table = read_table(self.path / "memory.stat")

        def stat(name: str, old_name: str = "") -> int:
            # In version 1 only "total_..." includes the groups below; version 2 always does.
            return table.get(f"total_{old_name or name}", table.get(name, 0))

        inactive = stat("inactive_file")
        mapped = max(0, stat("file_mapped", "mapped_file") - stat("shmem"))
        cache = max(inactive, inactive + stat("active_file") - mapped)
        return max(0, usage - cache)

    @property
    def kills(self) -> int:
        """How many processes of this group the kernel has killed because memory ran out."""
        tables = [read_table(self.path / name) for name in ("memory.events", "memory.oom_control")]
        return sum(table.get(name, 0) for table in tables for name in ("oom_kill", "oom_group_kill"))

    def _limit(self, *names: str) -> int | None:
        limit = _first_number(self.path / name for name in names)
        return None if limit is None or limit >= _UNLIMITED else limit


@dataclass(frozen=True)
class Room:
    """The memory left at the tightest bound.

    Attributes:
        free: bytes that can still be allocated.
        total: bytes of the bound.
        group: the control group that sets the bound; None for the machine.
    """

    free: int
    total: int
    group: MemoryGroup | None = None

    def __str__(self) -> str:
        """`1.5 GB of memory is left of the machine's 64.0 GB`"""
        total = f"{self.total / (1 << 30):.1f} GiB"
        of = f"the cgroup limit of {total} ({self.group.path})" if self.group else f"the machine's {total}"
        return f"{self.free / (1 << 30):.1f} GiB of memory is left of {of}"


def memory_groups(root: Path = Path("/")) -> tuple[MemoryGroup, ...]:
    """This process's memory groups, the innermost first, as far as they are visible."""
    return tuple(dict.fromkeys(map(MemoryGroup, _directories(root))))


def machine_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory of the machine; None if /proc does not have it."""
    total = read_table(root / "proc/meminfo").get("MemTotal:")
    return None if total is None else total * 1024


def memory_room(groups: Sequence[MemoryGroup] | None = None, root: Path = Path("/")) -> Room | None:
    """The memory left for this process, read at each call; None if it cannot be read."""
    rooms = []
    free = read_table(root / "proc/meminfo").get("MemAvailable:")
    if free is not None:
        rooms.append(Room(free * 1024, machine_memory(root) or free * 1024))
    for group in memory_groups(root) if groups is None else groups:
        bound, used = group.bound, group.used
        if bound is not None and used is not None:
            rooms.append(Room(max(0, bound - used), bound, group))
    return min(rooms, key=lambda room: room.free, default=None)


def read_table(path: Path) -> dict[str, int]:
    """Parse a file of lines with a name and a number; empty if it cannot be read."""
    table = {}
    for line in _lines(path):
        name, *values = line.split() or [""]
        if values and values[0].isdigit():
            table[name] = int(values[0])
    return table


def _directories(root: Path) -> Iterator[Path]:
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        kind = "cgroup2" if number == "0" else "cgroup"
        for mount, mounted in _mounts(root, kind):
            # In a container the mount may show a part of the hierarchy only.
            inside = os.path.relpath(path, mounted)
            here = mount if inside.startswith("..") else mount / inside
            while here.is_relative_to(mount):
                yield here
                here = here.parent


def _mounts(root: Path, kind: str) -> Iterator[tuple[Path, str]]:
    """Where control groups of a kind are mounted, and the path of the group at the top of each mount."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (found, _, options) = before.split(), after.split(" ", 2)
        if found == kind and (kind == "cgroup2" or "memory" in options.split(",")):
            yield root / _unescaped(fields[4]).lstrip("/"), _unescaped(fields[3])


def _unescaped(path: str) -> str:
    """A path of mountinfo, in which blanks are octal escapes."""
    for code, char in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        path = path.replace(code, char)
    return path


def _first_number(paths: Iterable[Path]) -> int | None:
    for path in paths:
        text = "".join(_lines(path)).strip()
        if text.isdigit():
            return int(text)
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
