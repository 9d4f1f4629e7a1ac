"""What memory and disk allow: the same bytes, moved by the same processes with nothing around it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

__all__ = ["LIMITS", "Limits", "touch_free_memory"]

LIMITS = {
    "copy": "memcpy",
    "copy_fresh": "memcpy, untouched pages",
    "write": "disk write, O_DIRECT",
    "read_direct": "disk read, O_DIRECT",
    "read_cold": "disk read, buffered, cold",
    "read_warm": "disk read, buffered, warm",
}
"""What `Limits.measure` returns, in words."""

_PIECE = 16 << 20
_BUFFERED = 1 << 20
_PAGE = 4096


def touch_free_memory(size: int) -> None:
    """Have so many bytes of free memory that have been touched lately.

    The host of a virtual machine may take back what is free for some seconds, and then the first touch of
    a page costs several times what it costs the kernel: whoever comes first would pay for it.
    """
    with mmap.mmap(-1, -(-size // _PAGE) * _PAGE, mmap.MAP_PRIVATE) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, size, _PAGE):
            memory[start] = 0


class Limits:
    """Measures with a buffer and a file as large as this rank's share of the checkpoint."""

    def __init__(self, tensors: Sequence[torch.Tensor], size: int, path: Path) -> None:
        """The first `size` bytes of `tensors` are what is copied."""
        self._sources = _cut(tensors, size)
        self._size = -(-size // _PAGE) * _PAGE
        self._path = path

    def measure(
        self, seconds: Callable[[Callable[[], object]], float], forget: Callable[[Path], object]
    ) -> dict[str, float]:
        """Seconds of each; `seconds` runs a function on all ranks together, `forget` empties caches."""
        with self.buffer() as memory:
            view = memoryview(memory)
            touch_free_memory(self._size)
            times = {"copy_fresh": seconds(lambda: self.copy(memory))}
            times["copy"] = seconds(lambda: self.copy(memory))
            times["write"] = seconds(lambda: self._write(view))
            times["read_direct"] = seconds(lambda: self._read(view, _PIECE, os.O_DIRECT))
            forget(self._path)
            touch_free_memory(self._size)
            times["read_cold"] = seconds(lambda: self._read(view, _BUFFERED))
            times["read_warm"] = seconds(lambda: self._read(view, _BUFFERED))
            view.release()
        self._path.unlink()
        return times

    def buffer(self) -> mmap.mmap:
        """Memory for a copy, which nothing has touched yet."""
        memory = mmap.mmap(-1, self._size, mmap.MAP_PRIVATE)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def copy(self, memory: mmap.mmap) -> None:
        """A bare copy of this rank's share of the bytes."""
        target = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for address, nbytes in self._sources:
            ctypes.memmove(target, address, nbytes)
            target += nbytes

    def _write(self, view: memoryview) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT
        descriptor = os.open(self._path, flags, 0o600)
        os.posix_fallocate(descriptor, 0, self._size)
        for start in range(0, self._size, _PIECE):
            os.pwrite(descriptor, view[start : start + _PIECE], start)
        os.fsync(descriptor)
        os.close(descriptor)

    def _read(self, view: memoryview, piece: int, flags: int = 0) -> None:
        descriptor = os.open(self._path, os.O_RDONLY | flags)
        for start in range(0, self._size, piece):
            os.preadv(descriptor, [view[start : start + piece]], start)
        os.close(descriptor)


def _cut(tensors: Sequence[torch.Tensor], size: int) -> list[tuple[int, int]]:
    """Addresses and sizes of the first `size` bytes."""
    sources, left = [], size
    for tensor in tensors:
        nbytes = min(left, tensor.nbytes)
        if nbytes:
            sources.append((tensor.data_ptr(), nbytes))
        left -= nbytes
    return sources
