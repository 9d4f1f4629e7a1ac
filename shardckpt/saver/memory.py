"""Snapshot buffers: memory without a file, which trainers and the saver map both."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

__all__ = ["allocate", "map_buffer", "rounded"]

_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_ROUND = 2 << 20  # a huge page; also leaves room for the pack to grow by a few bytes


def rounded(size: int) -> int:
    """Bytes of memory that a pack of `size` bytes takes, which is never nothing."""
    return max(_ROUND, -(-size // _ROUND) * _ROUND)


def allocate(size: int) -> tuple[int, int]:
    """(descriptor, size) of new memory of at least `size` bytes, provided by the kernel already.

    It lives as long as somebody has the descriptor or a mapping: nothing is left in any file system, and
    the size of /dev/shm does not matter. Raises MemoryError if there is not enough; the kernel itself would
    rather kill a process.
    """
    size = rounded(size)
    if size > (free := _available()):
        raise MemoryError(f"{free / 1e9:.1f} GB of memory are available")
    descriptor = os.memfd_create("shardckpt", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, size


def map_buffer(descriptor: int, size: int) -> mmap.mmap:
    """The memory, mapped and faulted in, which takes about a tenth of a second per GiB.

    A process that is forked later does not have the mapping: it could write to what is another's by then.
    """
    mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    mapping.madvise(mmap.MADV_DONTFORK)
    return mapping


def _available() -> float:
    """Bytes that the kernel can still provide, to the machine and to this process's control group."""
    free = [float("inf")]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    for limit, usage in _CGROUP_FILES:
        numbers = [int(line) for line in (*_lines(limit), *_lines(usage)) if line.strip().isdigit()]
        if len(numbers) == 2:
            free.append(numbers[0] - numbers[1])
    return min(free)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []
