"""Snapshot buffers: memory without a file, which trainers and the saver map both."""

from __future__ import annotations

import mmap
import os

__all__ = ["allocate", "map_buffer", "rounded"]

_ROUND = 2 << 20  # a huge page; also leaves room for the pack to grow by a few bytes


def rounded(size: int) -> int:
    """Bytes of memory that a pack of `size` bytes takes, which is never nothing."""
    return max(_ROUND, -(-size // _ROUND) * _ROUND)


def allocate(size: int) -> tuple[int, int]:
    """(descriptor, size) of new memory of at least `size` bytes, provided by the kernel already.

    It lives as long as somebody has the descriptor or a mapping: nothing is left in any file system, and
    the size of /dev/shm does not matter. Raises OSError (ENOSPC, ENOMEM) if there is not enough.
    """
    size = rounded(size)
    descriptor = os.memfd_create("shardckpt", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, size


def map_buffer(descriptor: int, size: int, *, writable: bool = True) -> mmap.mmap:
    """The memory, mapped and faulted in, which takes about a tenth of a second per GiB.

    A process that is forked later does not have the mapping: it could write to what is another's by then.
    """
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, access)
    mapping.madvise(mmap.MADV_DONTFORK)
    return mapping
