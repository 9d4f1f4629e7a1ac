"""Snapshot buffers: memory without a file, mapped by a trainer and the saver."""

from __future__ import annotations

import ctypes
import os
import threading
from enum import Enum
from pathlib import Path

from cgroup_memory import Room, memory_groups, memory_room
from shardckpt.huge_pages import HUGE_PAGE, allocate_file

__all__ = ["Pressure", "SnapshotMemory", "empty", "rounded"]

_PIECE = 64 << 20  # bytes between two looks at what is left
_FALLOC_KEEP_SIZE_PUNCH_HOLE = 3

# What is left to training, as a share of all memory and in bytes at most: less than _NEEDED is a shortage, and
# spare snapshots must leave _SPARE.
_NEEDED = 1 / 64, 1 << 30
_SPARE = 1 / 16, 8 << 30


class Pressure(Enum):
    """How short memory is."""

    NONE = "none"
    SHORT = "short"
    """Nearly all of it is taken."""
    KILLED = "killed"
    """The kernel has killed a process of this one's control groups since the last look."""


class SnapshotMemory:
    """Allocates buffers while the machine and this process's control groups have memory. Safe from any thread.

    Args:
        root: the folder that has /proc and /sys.
    """

    look_every = 1.0
    """Seconds between two looks at the pressure."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._promised = 0  # bytes of buffers that are being allocated
        self._kills = self._count_kills()

    def allocate(self, size: int) -> tuple[int, int]:
        """Allocate at least `size` bytes, which the kernel provides at once. Returns (descriptor, size).

        The memory lives as long as any process has the descriptor or a mapping: nothing is left in a file system,
        and the size of /dev/shm does not matter. Raises MemoryError if there is not enough, or no longer enough,
        since training takes memory at the same time; the kernel itself would kill a process instead.
        """
        size = rounded(size)
        with self._lock:
            self._check(size, size)
            self._promised += size
        left = size
        try:
            descriptor = os.memfd_create("shardckpt", os.MFD_CLOEXEC)
            try:
                while left:
                    piece = min(left, _PIECE)
                    allocate_file(descriptor, size - left, piece)
                    with self._lock:
                        self._promised -= piece
                        left -= piece
                        self._check(0, size)
            except BaseException:
                os.close(descriptor)
                raise
        finally:
            with self._lock:
                self._promised -= left
        return descriptor, size

    def lacking(self, size: int) -> str:
        """Say why `size` bytes more for spare snapshots would leave training too little; empty if not."""
        room = self._room()
        if room is None or size + _share(room, _SPARE) <= room.free or _is_little(size, room.free):
            return ""
        return f"{room}, and one more takes {size / (1 << 30):.1f} GiB"

    def pressure(self, held: int) -> Pressure:
        """Measure how short memory is. It never is if the `held` bytes of all buffers matter little."""
        kills, self._kills = self._kills, self._count_kills()
        if self._kills > kills:
            return Pressure.KILLED
        room = self._room()
        needed = 0 if room is None else _share(room, _NEEDED)
        is_short = room is not None and room.free < needed and not _is_little(held, needed)
        return Pressure.SHORT if is_short else Pressure.NONE

    def _check(self, more: int, size: int) -> None:
        """Raise MemoryError if `more` bytes for a buffer of `size` would leave too little to training."""
        room = self._room()
        if (
            room is not None
            and more + _share(room, _NEEDED) > room.free
            and not _is_little(size, room.free)
        ):
            raise MemoryError(str(room))

    def _room(self) -> Room | None:
        room = memory_room(root=self._root)
        return room and Room(max(0, room.free - self._promised), room.total, room.group)

    def _count_kills(self) -> int:
        return sum(group.kills for group in memory_groups(self._root))


def rounded(size: int) -> int:
    """Bytes of memory that a pack of `size` bytes takes; never 0."""
    return max(HUGE_PAGE, -(-size // HUGE_PAGE) * HUGE_PAGE)


def empty(descriptor: int, size: int) -> None:
    """Free the memory behind a descriptor, although processes have it mapped. It reads as zeros then."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = ctypes.c_longlong(0), ctypes.c_longlong(size)
    if libc.fallocate(descriptor, _FALLOC_KEEP_SIZE_PUNCH_HOLE, *arguments) != 0:
        raise OSError(ctypes.get_errno(), "memory could not be given back")


def _is_little(size: int, memory: int) -> bool:
    """True if so many bytes matter little, compared to this memory."""
    return size * 8 <= memory


def _share(room: Room, share: tuple[float, int]) -> int:
    """A share of all memory, and at most so many bytes."""
    part, most = share
    return min(int(room.total * part), most)
