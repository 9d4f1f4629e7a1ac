"""Memory in huge pages, where this machine has them."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardckpt.huge_pages import HUGE_PAGE, allocate_file, map_shared


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
