"""Writing one large file past the page cache, which costs several times the write itself."""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import fcntl
import mmap
import os
import threading

import numpy as np

__all__ = ["write_file"]

_ALIGNMENT = 4096
_CHUNK = 16 << 20
_THREADS = 2


def write_file(path: str, view: memoryview) -> None:
    """Create `path` with the bytes of `view`; its content is durable on return.

    Space for all of it is reserved first, so that a full disk is found at once. Goes past the page
    cache (O_DIRECT) where the file system permits, straight from the buffer where its address is a
    multiple of 4096, else through small aligned buffers. Raises OSError as the system does; what
    was written until then stays.
    """
    size = len(view)
    fd = _open(path)
    try:
        _reserve(fd, size)
        bounces = threading.local()
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            jobs = [
                threads.submit(_write_chunk, fd, view[start : start + _CHUNK], start, bounces)
                for start in range(0, size, _CHUNK)
            ]
            try:
                for job in jobs:
                    job.result()
            finally:
                for job in jobs:
                    job.cancel()
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)


def _open(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # Linux creates the file before it finds that the file system has no O_DIRECT.
    return os.open(path, flags & ~os.O_EXCL | os.O_TRUNC, 0o666)


def _reserve(fd: int, size: int) -> None:
    """Allocate the file's blocks, where the file system can without writing them.

    Not os.posix_fallocate: where the file system cannot, that writes a byte to every block.
    """
    if not size:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    length = ctypes.c_longlong(size)
    while libc.fallocate(fd, 0, ctypes.c_longlong(0), length) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _write_chunk(fd: int, piece: memoryview, offset: int, bounces: threading.local) -> None:
    """Write a piece; where it does not end on a block, zeros up to the block's end follow it."""
    direct = len(piece) // _ALIGNMENT * _ALIGNMENT if _address(piece) % _ALIGNMENT == 0 else 0
    _write_all(fd, piece[:direct], offset)
    rest = piece[direct:]
    if not rest:
        return
    if not hasattr(bounces, "buffer"):  # one per thread: to touch fresh memory is slow
        bounces.buffer = mmap.mmap(-1, _CHUNK)
    bounce = memoryview(bounces.buffer)[: -(-len(rest) // _ALIGNMENT) * _ALIGNMENT]
    bounce[: len(rest)] = rest
    bounce[len(rest) :] = bytes(len(bounce) - len(rest))
    _write_all(fd, bounce, offset + direct)


def _write_all(fd: int, piece: memoryview, offset: int) -> None:
    done = 0
    while done < len(piece):
        try:
            done += os.pwrite(fd, piece[done:], offset + done)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            # This file system or device wants another alignment: go through the page cache.
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def _address(view: memoryview) -> int:
    if not len(view):
        return 0
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
