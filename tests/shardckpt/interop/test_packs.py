"""Packs that are filled in any order, in either kind of storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardckpt.format.manifest import pack_path
from shardckpt.interop.packs import iter_windows, open_packs
from shardckpt.storage import Storage, open_storage

GIB = 1 << 30


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "out" if request.param == "local" else f"memory://{tmp_path.name}-packs")


def test_packs_are_filled_in_any_order(storage: Storage) -> None:
    """What is not put is zero; an empty pack is a file too."""
    with open_packs(storage, {3: 10, 4: 0, 5: 4}) as put:
        put(5, 2, memoryview(b"yz"))
        put(3, 6, memoryview(b"defg"))
        put(3, 0, memoryview(b"abc"))
        put(5, 0, memoryview(b"wx"))
    assert storage.read(pack_path(3)) == b"abc\0\0\0defg"
    assert storage.read(pack_path(4)) == b""
    assert storage.read(pack_path(5)) == b"wxyz"


def test_a_temporary_file_has_two_gib_or_one_pack(storage: Storage) -> None:
    """A local disk needs none, and takes as many packs at a time as may be open."""
    sizes = [GIB, GIB, GIB, 3 * GIB, 1]
    windows = list(iter_windows(storage, sizes))
    is_local = "://" not in storage.url
    assert windows == ([[0, 1, 2, 3, 4]] if is_local else [[0, 1], [2], [3], [4]])


def test_no_more_than_256_packs_are_open(storage: Storage) -> None:
    windows = list(iter_windows(storage, [1] * 600))
    assert [len(window) for window in windows] == [256, 256, 88]
    assert [rank for window in windows for rank in window] == list(range(600))
