"""One local file, open for reading: from the page cache where that has it, else past it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence

from shardckpt.storage.local_errors import explained

__all__ = ["PAGE", "LocalFile"]

# Names here are strings on their way to system calls, beside descriptors, for which Path has none.

PAGE = 4096
"""Offsets, lengths and addresses of reads past the page cache are multiples of it."""

_NO_DIRECT_READS = (errno.EINVAL, errno.EOPNOTSUPP)


class LocalFile:
    """An open file. Safe to use from several threads. Closed with the last reference to it.

    All methods raise StorageError.

    Args:
        descriptor: of a regular file that is open for reading. It is closed by this object.
        path: for messages.
    """

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self._direct: int | None = None
        self._has_nowait = hasattr(os, "RWF_NOWAIT")
        self._has_direct = True
        self._lock = threading.Lock()
        self.path = path

    def __del__(self) -> None:
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)

    def read_cached(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers as far as the page cache has the bytes from `offset` on.

        Returns the number of bytes, which may be 0: up to the first page that is not cached. Never waits for the
        disk. 0 as well where the file system cannot tell.
        """
        if not self._has_nowait:
            return 0
        try:
            return os.preadv(self._descriptor, buffers, offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                with explained("read", self.path):
                    raise
        self._has_nowait = False
        return 0

    def read(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers through the page cache. Returns the number of bytes; 0 at the file's end."""
        with explained("read", self.path):
            return os.preadv(self._descriptor, buffers, offset)

    def read_direct(self, offset: int, buffer: memoryview) -> int:
        """Fill a buffer past the page cache.

        Args:
            offset: a multiple of PAGE.
            buffer: its address and length are multiples of PAGE. In huge pages it is filled in large requests;
                in others reads take about three times as long (4 processes on 2 processors, ext4).

        Returns the number of bytes: less than wanted at the file's end; -1 where the file system cannot.
        """
        if (descriptor := self._opened_direct()) is None:
            return -1
        try:
            return os.preadv(descriptor, [buffer], offset)
        except OSError as error:
            if error.errno not in _NO_DIRECT_READS:
                with explained("read", self.path):
                    raise
        self._has_direct = False  # this file system or device needs another alignment
        return -1

    def read_ahead(self, offset: int, nbytes: int) -> None:
        """Have the kernel read so many bytes into the page cache, in the background."""
        os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def _opened_direct(self) -> int | None:
        with self._lock:
            if self._direct is None and self._has_direct:
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT
                try:
                    self._direct = os.open(f"/proc/self/fd/{self._descriptor}", flags)
                except OSError:  # a file system without it
                    self._has_direct = False
            return self._direct if self._has_direct else None
