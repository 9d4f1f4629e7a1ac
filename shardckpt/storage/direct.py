"""Large files past the page cache, which costs several times a write and may differ from the disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from shardckpt.storage.buffers import as_bytes
from shardckpt.storage.protocol import Before

__all__ = ["read_file", "write_file", "write_pieces"]

_PAGE = 4096
_BLOCK = 16 << 20  # one write at a time fills the disk's queue; a second one gained nothing


def write_file(path: str, view: memoryview, before: Before | None = None) -> None:
    """Create a file with the bytes of `view`; its content is durable on return.

    Space for all of it is reserved first, so that a full disk is found at once. Goes past the page cache
    (O_DIRECT) if the file system permits, straight from the buffer if its address is a multiple of 4096, else
    through an aligned buffer of one block.

    Args:
        path: of the file, which does not exist.
        view: its content, flat.
        before: see `Storage.write_pack`. Runs for a block while the one or two ahead of it are written.

    Raises OSError, and what `before` raises; what was written until then stays.
    """
    fd = _open(path)
    try:
        _reserve(fd, len(view))
        _write_blocks(fd, view, before)
        os.ftruncate(fd, len(view))
        os.fsync(fd)
    finally:
        os.close(fd)


def write_pieces(path: str, size: int, pieces: Iterable[memoryview]) -> None:
    """Create a file with the bytes of the pieces, `size` in all, as `write_file` does.

    Straight from their memory if it is aligned as the file is, as in a mapped one, else through a block. Raises
    OSError, ValueError if the pieces have another size in all, and what the pieces raise.
    """
    fd = _open(path)
    try:
        _reserve(fd, size)
        with mmap.mmap(-1, _BLOCK) as memory, memoryview(memory) as block:
            written = used = 0  # the block holds what comes behind the bytes written

            def flush() -> None:
                nonlocal written, used
                end = -(-used // _PAGE) * _PAGE
                block[used:end] = bytes(end - used)
                with block[:end] as pages:
                    _write_all(fd, pages, written)
                written, used = written + used, 0

            def hold(view: memoryview) -> None:
                nonlocal used
                while view:
                    taken = view[: _BLOCK - used]
                    block[used : used + len(taken)] = taken
                    used, view = used + len(taken), view[len(taken) :]
                    if used == _BLOCK:
                        flush()

            for piece in map(as_bytes, pieces):
                lead = -used % _PAGE
                straight = piece[lead : len(piece) - (len(piece) - lead) % _PAGE]
                if not straight or _address(straight) % _PAGE:
                    hold(piece)
                    continue
                hold(piece[:lead])
                flush()
                _write_all(fd, straight, written)
                written += len(straight)
                hold(piece[lead + len(straight) :])
            flush()
        if written != size:
            raise ValueError(f"{written} bytes came for {path}, which was to have {size}")
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)


def read_file(fd: int, offset: int, view: memoryview) -> int:
    """Fill `view` from the disk, not from the page cache. Returns how many bytes there were, by the file's end.

    If the file system has no O_DIRECT, the kernel is asked to drop what it has cached. The descriptor is not
    usable for other reads afterwards.
    """
    with contextlib.suppress(OSError):
        os.fdatasync(fd)  # dirty pages cannot be dropped
    os.posix_fadvise(fd, offset, len(view), os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    found = 0
    with mmap.mmap(-1, _BLOCK) as memory, memoryview(memory) as bounce:
        while found < len(view):
            position = offset + found
            start = position // _PAGE * _PAGE
            end = -(-(offset + len(view)) // _PAGE) * _PAGE
            with bounce[: min(_BLOCK, end - start)] as pages:
                n = _read_once(fd, pages, start) - (position - start)
            if n <= 0:
                break
            n = min(n, len(view) - found)
            view[found : found + n] = bounce[position - start : position - start + n]
            found += n
    return found


def _read_once(fd: int, pages: memoryview, offset: int) -> int:
    try:
        return os.preadv(fd, [pages], offset)
    except OSError as error:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
            raise
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return os.preadv(fd, [pages], offset)


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
    """Allocate the file's blocks, if the file system can without writing them.

    os.posix_fallocate would write a byte to every block otherwise.
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


def _write_blocks(fd: int, view: memoryview, before: Before | None) -> None:
    blocks = [(start, min(start + _BLOCK, len(view))) for start in range(0, len(view), _BLOCK)]
    is_aligned = _address(view) % _PAGE == 0
    with mmap.mmap(-1, _PAGE if is_aligned else _BLOCK) as memory, memoryview(memory) as bounce:

        def write(start: int, stop: int) -> None:
            straight = start + (stop - start) // _PAGE * _PAGE if is_aligned else start
            _write_block(fd, view[start:straight], view[straight:stop], start, bounce)

        if before is None:
            for block in blocks:
                write(*block)
            return
        with _in_order_beside(write) as put:
            for block in blocks:
                before(*block)
                put(*block)


@contextlib.contextmanager
def _in_order_beside(write: Callable[[int, int], None]) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that queues calls of `write` for a thread of its own; at the end all are done.

    After an error `write` is not called any more; the next queued call, or the end of the block, raises it.
    """
    # An executor would refuse work once the interpreter begins to exit, which waits for running saves.
    waiting: queue.Queue[tuple[int, int] | None] = queue.Queue(1)
    errors: list[BaseException] = []

    def run() -> None:
        while (block := waiting.get()) is not None:
            try:
                if not errors:
                    write(*block)
            except BaseException as error:
                errors.append(error)

    def put(start: int, stop: int) -> None:
        if errors:
            raise errors[0]
        waiting.put((start, stop))

    thread = threading.Thread(target=run, name="shardckpt-write")
    thread.start()
    try:
        yield put
    finally:
        waiting.put(None)
        thread.join()
    if errors:
        raise errors[0]


def _write_block(fd: int, straight: memoryview, rest: memoryview, offset: int, bounce: memoryview) -> None:
    """Write the aligned part, then the rest through `bounce`, with zeros up to the end of the page."""
    _write_all(fd, straight, offset)
    if rest:
        end = -(-len(rest) // _PAGE) * _PAGE
        bounce[: len(rest)] = rest
        bounce[len(rest) : end] = bytes(end - len(rest))
        with bounce[:end] as pages:
            _write_all(fd, pages, offset + len(straight))


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        try:
            with view[done:] as left:
                done += os.pwrite(fd, left, offset + done)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            # This file system or device needs another alignment: go through the page cache.
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def _address(view: memoryview) -> int:
    if not len(view):
        return 0
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
