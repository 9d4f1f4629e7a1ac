"""Memory in huge pages: memory files that have them, mappings that can use them. Free of torch.

A process that maps 1 GiB of small pages enters 262,144 of them into its page table, which takes twice as long as
copying that GiB. With huge pages it is 512, and they are allocated several times as fast (scripts/bench/memory).
MADV_COLLAPSE makes them for memory files, too, whatever `shmem_enabled` says, unless that is "deny".
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache
from pathlib import Path

__all__ = ["HUGE_PAGE", "allocate_file", "has_huge_pages", "map_shared"]

HUGE_PAGE = 2 << 20
"""Bytes."""

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MADV_DONTFORK = 10
_MADV_COLLAPSE = 25  # since Linux 6.1
_FAILED = ctypes.c_void_p(-1).value


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
    """Map and fault in a memory file. It is unmapped with the last reference to the result.

    A process that is forked later does not have the mapping: it could write to what is another process's by then.
    """
    if not size:
        return memoryview(b"")
    access = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
    address = _map(descriptor, 0, size, access, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    content = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(content, _libc().munmap, address, size).atexit = False
    _libc().madvise(address, size, _MADV_DONTFORK)
    view = memoryview(content).cast("B")
    return view if is_writable else view.toreadonly()


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
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
