"""Memory of this process: aligned blocks, huge pages, views of it. Free of torch.

The advice goes through libc, since `mmap.madvise` holds the interpreter lock meanwhile.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "aligned_memory",
    "no_garbage_collection",
    "prefer_huge_pages",
    "writable",
]

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def aligned_memory(nbytes: int) -> npt.NDArray[np.uint8]:
    """New memory that begins with a huge page, and consists of huge pages where the kernel has them."""
    memory = np.empty(nbytes + _HUGE_PAGE, dtype=np.uint8)
    start = -_address(memory) % _HUGE_PAGE
    prefer_huge_pages(_address(memory) + start, nbytes)
    return memory[start : start + nbytes]


def prefer_huge_pages(address: int, nbytes: int) -> None:
    """Ask for huge pages where whole ones fit into `nbytes` bytes at `address`.

    Restoring into small pages takes 1.6 times as long (scripts/bench/memory).
    """
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    length = (address + nbytes) // _HUGE_PAGE * _HUGE_PAGE - start
    if length > 0:
        _libc().madvise(start, length, _MADV_HUGEPAGE)


def bytes_at(address: int, nbytes: int) -> memoryview:
    """Return these bytes of this process's memory, which the caller keeps allocated."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def writable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the same memory as an array with the writable flag, which `torch.from_numpy` demands.

    Only for callers that do not write to a memory that is read-only.
    """
    return array if array.flags.writeable else np.asarray(_Writable(array))


class _Writable:
    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._keeps = array
        self.__array_interface__ = {**array.__array_interface__, "data": (_address(array), False)}


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn off garbage collection in a block or a decorated function.

    A collection visits every object of torch, which takes longer than a save's own work.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
