"""Memory in huge pages, where this machine has them."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from shardckpt.huge_pages import HUGE_PAGE, FreshMemory, allocate_file, has_huge_pages, map_shared


@pytest.fixture
def descriptor() -> Iterator[int]:
    made = os.memfd_create("test")
    yield made
    os.close(made)


def mapped(what: str) -> list[tuple[int, dict[str, int]]]:
    """(address, bytes by name) of each mapping of the memory file of this name."""
    found: list[tuple[int, dict[str, int]]] = []
    is_wanted = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            is_wanted = f"/memfd:{what} " in f"{line} "
            if is_wanted:
                found.append((int(name.split("-")[0], 16), {}))
        elif is_wanted and rest[-1:] == ["kB"]:
            found[-1][1][name.rstrip(":")] = int(rest[0]) << 10
    return found


def test_an_allocated_file_is_all_there_and_zero(descriptor: int) -> None:
    for start in (0, 2 * HUGE_PAGE):
        allocate_file(descriptor, start, 2 * HUGE_PAGE)
    found = os.fstat(descriptor)
    assert found.st_size == found.st_blocks * 512 == 4 * HUGE_PAGE
    assert bytes(map_shared(descriptor, 4 * HUGE_PAGE)) == bytes(4 * HUGE_PAGE)


def test_content_that_is_there_stays(descriptor: int) -> None:
    os.pwrite(descriptor, b"here", HUGE_PAGE + 5)
    allocate_file(descriptor, 0, 2 * HUGE_PAGE)
    assert os.pread(descriptor, 4, HUGE_PAGE + 5) == b"here"


def test_more_than_there_is_raises() -> None:
    """As a file system does that is full."""
    read_only = os.open("/proc/self/status", os.O_RDONLY)
    try:
        with pytest.raises(OSError) as raised:
            allocate_file(read_only, 0, HUGE_PAGE)
        assert raised.value.errno in (errno.EBADF, errno.ENODEV)
    finally:
        os.close(read_only)


def test_a_mapping_is_shared_aligned_and_faulted_in(descriptor: int) -> None:
    size = HUGE_PAGE + 12345
    os.ftruncate(descriptor, size)
    view = map_shared(descriptor, size)
    ((address, of),) = mapped("test")
    assert len(view) == size
    assert address % HUGE_PAGE == 0
    assert of["Rss"] >= size
    view[12345:12349] = b"seen"
    assert os.pread(descriptor, 4, 12345) == b"seen"


def test_a_mapping_ends_with_the_last_reference(descriptor: int) -> None:
    os.ftruncate(descriptor, HUGE_PAGE)
    part = map_shared(descriptor, HUGE_PAGE)[5:10]
    gc.collect()
    assert len(mapped("test")) == 1
    part[:] = b"alive"
    part.release()
    gc.collect()
    assert mapped("test") == []


def test_a_read_only_mapping_cannot_be_written_to(descriptor: int) -> None:
    os.ftruncate(descriptor, HUGE_PAGE)
    view = map_shared(descriptor, HUGE_PAGE, is_writable=False)
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1


def test_an_empty_file_is_mapped_as_nothing(descriptor: int) -> None:
    assert bytes(map_shared(descriptor, 0)) == b""


def test_a_mapping_that_fails_leaves_nothing(descriptor: int) -> None:
    os.ftruncate(descriptor, HUGE_PAGE)
    read_only = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    before = len(Path("/proc/self/maps").read_text().splitlines())
    try:
        with pytest.raises(PermissionError):
            map_shared(read_only, HUGE_PAGE)
    finally:
        os.close(read_only)
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= before + 1


def test_a_forked_process_does_not_have_the_mapping() -> None:
    """And the end of the interpreter does not unmap what threads may still use."""
    script = """
        import os, sys
        from shardckpt.huge_pages import HUGE_PAGE, map_shared
        descriptor = os.memfd_create("test")
        os.ftruncate(descriptor, HUGE_PAGE)
        view = map_shared(descriptor, HUGE_PAGE)
        child = os.fork()
        if child == 0:
            sys.stdout.write(str("/memfd:test" in open("/proc/self/maps").read()))
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False"


def private(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory that has no pages yet."""
    return np.frombuffer(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE), np.uint8)


def address(array: npt.NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])


def resident(array: npt.NDArray[np.uint8]) -> int:
    """Bytes of its pages that are in memory."""
    start, stop = address(array), address(array) + array.nbytes
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        found = os.pread(file.fileno(), (stop - start) // mmap.PAGESIZE * 8, start // mmap.PAGESIZE * 8)
    return int((np.frombuffer(found, np.uint64) >> np.uint64(63)).sum()) * mmap.PAGESIZE


def test_fresh_memory_is_faulted_in_where_it_is_asked_for() -> None:
    """Other blocks are left until they are: a load of a part takes no memory for the rest."""
    memory = private(64 * HUGE_PAGE)
    FreshMemory([(address(memory), memory.nbytes)]).provide(address(memory) + memory.nbytes // 2, 1)
    assert HUGE_PAGE <= resident(memory) < memory.nbytes // 2
    assert not memory.any()


@pytest.mark.skipif(not has_huge_pages(), reason="this machine has no huge pages")
def test_fresh_memory_asks_for_huge_pages() -> None:
    """'hg' says that in the mapping's flags."""
    memory = private(8 * HUGE_PAGE)
    FreshMemory([(address(memory), memory.nbytes)]).provide(address(memory), memory.nbytes)
    flags: dict[bool, str] = {}
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            is_inside = low <= address(memory) + 2 * HUGE_PAGE < high
        elif first == "VmFlags:":
            flags[is_inside] = line
    assert " hg" in flags[True]


def test_neighbours_are_faulted_in_together() -> None:
    """Though an allocator has touched a page of each, and each is smaller than a huge page."""
    memory = private(4 * HUGE_PAGE)
    size = 256 << 10
    memory[::size] = 7
    fresh = FreshMemory((address(memory) + at + 64, size - 64) for at in range(0, memory.nbytes, size))
    for at in range(0, memory.nbytes, size):
        fresh.provide(address(memory) + at + 64, size - 64)
    assert resident(memory) == memory.nbytes
    assert memory.sum() == 7 * memory.nbytes // size, "its content is what it was"


def test_memory_that_is_in_use_is_left_as_it_is() -> None:
    memory = private(8 * HUGE_PAGE)
    memory[: 7 * HUGE_PAGE] = 3
    before = resident(memory)
    FreshMemory([(address(memory), memory.nbytes)]).provide(address(memory), 6 * HUGE_PAGE)
    assert resident(memory) == before
    assert (memory[: 7 * HUGE_PAGE] == 3).all()


def test_memory_outside_the_spans_is_not_touched() -> None:
    memory = private(16 * HUGE_PAGE)
    part = memory[5 * HUGE_PAGE : 9 * HUGE_PAGE]
    fresh = FreshMemory([(address(part), part.nbytes)])
    fresh.provide(address(memory), memory.nbytes)
    assert resident(memory) == resident(part) == part.nbytes


def test_several_threads_may_need_the_same_block() -> None:
    memory = private(16 * HUGE_PAGE)
    fresh = FreshMemory([(address(memory), memory.nbytes)])

    def write(value: int) -> None:
        fresh.provide(address(memory), memory.nbytes)
        memory[value :: len(threads)] = value

    threads = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((memory[value::4] == value).all() for value in range(4))


def test_small_and_empty_spans_are_left_to_the_kernel() -> None:
    memory = private(HUGE_PAGE)
    fresh = FreshMemory([(address(memory), 100), (address(memory) + HUGE_PAGE // 2, 0)])
    fresh.provide(address(memory), 100)
    assert resident(memory) == 0
