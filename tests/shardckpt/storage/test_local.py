"""A folder on a local file system: links, full and read-only disks, permissions, the page cache."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardckpt.errors import (
    CredentialsError,
    StorageError,
    StorageFullError,
)
from shardckpt.storage import Storage, open_storage
from tests.kit.mounts import remount_read_only
from tests.shardckpt.storage.helpers import PART, names, noise, race_processes

MOUNTED = [pytest.param(kind, marks=pytest.mark.mounts) for kind in ("tmpfs", "ramfs")]


def test_only_whole_files_are_ever_there(tmp_path: Path) -> None:
    """What a writer that died half-way left is not listed, and does not hinder the next."""
    storage = open_storage(tmp_path)
    storage.write("a", b"x")
    (tmp_path / ".shardckpt-0123").write_bytes(b"half")
    assert storage.list() == ["a"]
    storage.write("a", b"y")
    storage.create("b", b"z")
    assert names(tmp_path) == [".shardckpt-0123", "a", "b"]


def test_a_reader_of_the_earlier_pack_is_not_disturbed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write_pack("pack", memoryview(b"old" * 5000))
    with (tmp_path / "pack").open("rb") as file:
        storage.write_pack("pack", memoryview(b"new"))
        assert file.read() == b"old" * 5000
    assert storage.read("pack") == b"new"


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "run")
    storage.write("a/x", b"x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    (tmp_path / "run/a/link").symlink_to(outside)
    storage.delete_tree("a")
    assert storage.list() == []
    assert names(outside) == ["precious"]


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write("a", b"x")
    for put in (storage.write, storage.create):
        with pytest.raises(StorageError, match=r"a is in the way"):
            put("a/b", b"")
    storage.write("folder/x", b"x")
    with pytest.raises(StorageError, match="folder"):
        storage.write("folder", b"")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=st.integers(0, 3),
    rest=st.sampled_from([0, 1, 63, 4095]) | st.integers(0, 4095),
    misaligned=st.sampled_from([0, 1, 64, 4095]),
)
@pytest.mark.parametrize("where", ["disk", *MOUNTED])
def test_packs_of_odd_sizes_and_addresses(folder: Path, blocks: int, rest: int, misaligned: int) -> None:
    """Past the page cache on a disk, and on ramfs, which has no such way and no reservation."""
    size = blocks * 4096 + rest
    memory = mmap.mmap(-1, 1 << 16)
    view = memoryview(memory)[misaligned : misaligned + size]
    view[:] = noise(size)
    open_storage(folder).write_pack("pack", view)
    assert (folder / "pack").read_bytes() == view


@pytest.mark.parametrize("misaligned", [0, 1])
@pytest.mark.parametrize("where", ["disk", MOUNTED[1]])
def test_packs_of_many_chunks(folder: Path, misaligned: int) -> None:
    size = 3 * PART + 4097
    memory = mmap.mmap(-1, size + 1)
    memory[misaligned : misaligned + size] = noise(size)
    view = memoryview(memory)[misaligned : misaligned + size]
    open_storage(folder).write_pack("pack", view)
    with (folder / "pack").open("rb") as file:
        assert file.read() == view


def test_packs_do_not_fill_the_page_cache(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"this file system has no O_DIRECT: {error}")
    open_storage(tmp_path).write_pack("pack", memoryview(bytes(PART)))
    with (tmp_path / "pack").open("rb") as file, pytest.raises(BlockingIOError):
        os.preadv(file.fileno(), [bytearray(4096)], PART - 4096, os.RWF_NOWAIT)


def test_one_of_many_racing_processes_creates(tmp_path: Path) -> None:
    race_processes(str(tmp_path / "run"), None)


def test_a_full_disk_is_found_before_anything_is_written(small_disk: Path) -> None:
    storage = open_storage(small_disk)
    size = 8 << 20
    with pytest.raises(StorageFullError) as caught:
        storage.write_pack("p/pack", memoryview(bytes(size)))
    message = str(caught.value)
    assert f"{small_disk}/p/pack" in message
    assert f"wanted {size} bytes" in message
    free = os.statvfs(small_disk)
    assert f"{free.f_bavail * free.f_frsize} are free" in message
    assert caught.value.errno == errno.ENOSPC
    assert names(small_disk / "p") == []


def test_a_full_disk_leaves_no_half_files_and_the_earlier_one(small_disk: Path) -> None:
    storage = open_storage(small_disk)
    storage.write("file", b"earlier")
    for put in (storage.write, storage.create):
        with pytest.raises(StorageFullError):
            put("file", bytes(8 << 20))
    assert names(small_disk) == ["file"]
    assert storage.read("file") == b"earlier"


def test_a_read_only_disk(small_disk: Path) -> None:
    storage = open_storage(small_disk)
    storage.write("file", b"x")
    storage.write("folder/other", b"x")
    remount_read_only(small_disk, options="size=4m")
    for call in _mutations(storage):
        with pytest.raises(StorageError, match=r"read-only.*Choose another") as caught:
            call()
        assert str(small_disk) in str(caught.value)
    assert storage.read("file") == b"x"


def test_no_permission(tmp_path: Path, unprivileged: Callable[[], Any]) -> None:
    storage = open_storage(tmp_path / "run")
    storage.write("file", b"x")
    storage.write("folder/other", b"x")
    for folder in ("run/folder", "run"):  # its owner may write into what is in it, but for this
        (tmp_path / folder).chmod(0o500)
    with unprivileged():
        for call in _mutations(storage):
            with pytest.raises(CredentialsError, match="permissions") as caught:
                call()
            assert str(tmp_path) in str(caught.value)


@pytest.fixture
def folder(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder on a file system of the kind `where`."""
    folder = tmp_path / where
    folder.mkdir()
    if where != "disk":
        request.getfixturevalue("mounts")(where, folder)
    return folder


@pytest.fixture
def unprivileged() -> Callable[[], Any]:
    """A context in which file permissions are enforced, as they are not for root."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(before)

    return context


def _mutations(storage: Storage) -> list[Callable[[], None]]:
    return [
        lambda: storage.write("file", b"y"),
        lambda: storage.create("new", b"y"),
        lambda: storage.write_pack("pack", memoryview(b"y")),
        lambda: storage.write("folder/file", b"y"),
        lambda: storage.delete("file"),
        lambda: storage.delete_tree("folder"),
    ]
