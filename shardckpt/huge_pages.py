"""Memory in huge pages: memory files, their mappings, and private memory before its first use. Free of torch.

A process that maps 1 GiB of small pages enters 262,144 of them into its page table, which takes twice as long as
copying that GiB. With huge pages it is 512, and they are allocated several times as fast (scripts/bench/memory).
MADV_COLLAPSE makes them for memory files, too, whatever `shmem_enabled` says, unless that is "deny", and for
neighbours in memory that are each smaller than a huge page.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Iterable
from functools import cache
from pathlib import Path

__all__ = ["HUGE_PAGE", "FreshMemory", "allocate_file", "has_huge_pages", "map_shared"]

HUGE_PAGE = 2 << 20
"""Bytes."""

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MADV_DONTFORK = 10
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # since Linux 5.14
_MADV_COLLAPSE = 25  # since Linux 6.1
_FAILED = ctypes.c_void_p(-1).value
_FEW_PAGES = 64 << 10
_GAP = 8 << 10  # bytes between two neighbours that an allocator has put side by side
_BLOCK = 4 * HUGE_PAGE
_SLOW = 0.5 / (1 << 30)  # CPU seconds per byte: longer than the kernel takes for small pages


def allocate_file(descriptor: int, start: int, nbytes: int) -> None:
    """Have the kernel provide a part of a memory file now: in huge pages, or in small ones where it has none.

    Args:
        descriptor: of a file that memfd_create has made.
        start: first byte, a multiple of HUGE_PAGE.
        nbytes: a multiple of HUGE_PAGE.

    Raises OSError if there is not enough memory.
    """
    if has_huge_pages():
        for end in range(start + HUGE_PAGE, start + nbytes + 1, HUGE_PAGE):
            os.posix_fallocate(
                descriptor, end - mmap.PAGESIZE, mmap.PAGESIZE
            )  # a mere hole is not collapsed
        address = _map(descriptor, start, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)
        try:
            _libc().madvise(address, nbytes, _MADV_COLLAPSE)
        finally:
            _libc().munmap(address, nbytes)
    os.posix_fallocate(descriptor, start, nbytes)


def map_shared(descriptor: int, size: int, *, is_writable: bool = True) -> memoryview:
    """Map a memory file. It is unmapped with the last reference to the result.

    A writable one is faulted in at once. A process that is forked later does not have the mapping: it could write
    to what is another process's by then.
    """
    if not size:
        return memoryview(b"")
    access = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
    address = _map(descriptor, 0, size, access, mmap.MAP_SHARED | (mmap.MAP_POPULATE if is_writable else 0))
    content = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(content, _libc().munmap, address, size).atexit = False
    _libc().madvise(address, size, _MADV_DONTFORK)
    view = memoryview(content).cast("B")
    return view if is_writable else view.toreadonly()


class FreshMemory:
    """Private memory that is about to be written to for the first time. Safe to use from several threads.

    It is faulted in at once, a block at a time, in huge pages where possible: also in those that several
    neighbours share, as tensors that are allocated one after another are. Faulted in page by page, it takes five
    times as long (scripts/bench/memory). Memory that has been written to is left as it is.

    The host of a virtual machine may have taken free huge pages back, and then provides each anew, which takes
    longer than small pages do that were in use a moment ago: once that is seen, the rest gets small pages.
    """

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        """`spans`: (address, bytes) of each piece. Its owner keeps it, and nobody else writes to it meanwhile."""
        areas: list[tuple[int, int]] = []
        for address, nbytes in sorted(spans):
            if areas and address - areas[-1][1] <= _GAP:
                areas[-1] = areas[-1][0], max(areas[-1][1], address + nbytes)
            else:
                areas.append((address, address + nbytes))
        self._blocks = [
            _Block(max(start, at), min(stop, at + _BLOCK))
            for start, stop in areas
            if stop - start >= _FEW_PAGES
            for at in range(start // _BLOCK * _BLOCK, stop, _BLOCK)
        ]
        self._starts = [block.start for block in self._blocks]
        self._is_huge = has_huge_pages()

    def provide(self, address: int, nbytes: int) -> None:
        """Fault in the blocks that have these bytes, as far as they belong to the spans."""
        for number in range(max(0, bisect_right(self._starts, address) - 1), len(self._blocks)):
            block = self._blocks[number]
            if block.start >= address + nbytes:
                break
            if block.stop > address and not block.is_provided:
                began = time.thread_time()
                block.provide(is_huge=self._is_huge)
                if time.thread_time() - began > _SLOW * (block.stop - block.start):
                    self._is_huge = False


class _Block:
    """A part of fresh memory that is faulted in at once."""

    def __init__(self, start: int, stop: int) -> None:
        self.start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        self.stop = stop // mmap.PAGESIZE * mmap.PAGESIZE
        self.is_provided = False
        self._lock = threading.Lock()

    def provide(self, *, is_huge: bool) -> None:
        """Fault it in, unless another thread has."""
        with self._lock:
            if self.is_provided:
                return
            self.is_provided = True
            if self._is_resident():
                return
            advise = _libc().madvise
            start, stop = -(-self.start // HUGE_PAGE) * HUGE_PAGE, self.stop // HUGE_PAGE * HUGE_PAGE
            if is_huge and start < stop:
                advise(start, stop - start, _MADV_HUGEPAGE)
                advise(start, stop - start, _MADV_COLLAPSE)  # where an allocator has touched a page
            advise(self.start, self.stop - self.start, _MADV_POPULATE_WRITE)

    def _is_resident(self) -> bool:
        """True unless most of its pages have never been touched."""
        pages = (self.stop - self.start) // mmap.PAGESIZE
        found = bytearray(max(pages, 1))
        address = ctypes.addressof(ctypes.c_char.from_buffer(found))
        if _libc().mincore(self.start, pages * mmap.PAGESIZE, address) != 0:
            return True
        return found.count(0) * 2 < pages


@cache
def has_huge_pages() -> bool:
    """True unless the kernel has none, or the administrator has turned them off."""
    try:
        return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text("ascii")
    except OSError:
        return False


def _map(descriptor: int, offset: int, size: int, access: int, flags: int) -> int:
    """Map a part of a file, from a multiple of HUGE_PAGE on, to an address that is one; return the address."""
    room = -(-size // HUGE_PAGE) * HUGE_PAGE
    reserved = _mmap(0, room + HUGE_PAGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    address = -(-reserved // HUGE_PAGE) * HUGE_PAGE
    end = reserved + room + HUGE_PAGE
    try:
        _mmap(address, size, access, flags | _MAP_FIXED, descriptor, offset)
    except OSError:
        _libc().munmap(reserved, end - reserved)
        raise
    stop = address + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    for start, length in ((reserved, address - reserved), (stop, end - stop)):
        if length:
            _libc().munmap(start, length)
    return address


def _mmap(address: int, size: int, access: int, flags: int, descriptor: int, offset: int) -> int:
    found = _libc().mmap(address, size, access, flags, descriptor, offset)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
    ]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
