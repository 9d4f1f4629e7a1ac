"""Writing one large file past the page cache, which costs several times the write itself."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os

import numpy as np

__all__ = ["write_file"]

_BLOCK = 4096
_CHUNK = 16 << 20  # one write at a time fills the disk's queue; a second thread gained nothing


def write_file(path: str, view: memoryview) -> None:
    """Create `path` with the bytes of `view`; its content is durable on return.

    Space for all of it is reserved first, so that a full disk is found at once. Goes past the page
    cache (O_DIRECT) where the file system permits, straight from the buffer where its address is a
    multiple of 4096, else through a small aligned buffer. Raises OSError as the system does; what
    was written until then stays.
    """
    size = len(view)
    fd = _open(path)
    try:
        _reserve(fd, size)
        direct = size // _BLOCK * _BLOCK if _address(view) % _BLOCK == 0 else 0
        _write_all(fd, view[:direct], 0)
        if direct < size:
            _write_bounced(fd, view[direct:], direct)
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


def _write_bounced(fd: int, view: memoryview, offset: int) -> None:
    """Write through an aligned buffer. Zeros follow, up to the end of the last block."""
    with mmap.mmap(-1, min(_CHUNK, _round_up(len(view)))) as memory, memoryview(memory) as bounce:
        for start in range(0, len(view), _CHUNK):
            piece = view[start : start + _CHUNK]
            end = _round_up(len(piece))
            bounce[: len(piece)] = piece
            bounce[len(piece) : end] = bytes(end - len(piece))
            with bounce[:end] as blocks:
                _write_all(fd, blocks, offset + start)


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        try:
            with view[done : done + _CHUNK] as piece:
                done += os.pwrite(fd, piece, offset + done)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            # This file system or device wants another alignment: go through the page cache.
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def _round_up(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _address(view: memoryview) -> int:
    if not len(view):
        return 0
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
