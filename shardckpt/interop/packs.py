"""Packs that are filled in any order: in place on a local disk, by way of a temporary file elsewhere."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from shardckpt.format.manifest import pack_path
from shardckpt.storage import LocalStorage, Storage
from shardckpt.storage.local_errors import check_space, explained

__all__ = ["Put", "iter_windows", "open_packs"]

_WINDOW = 2 << 30
"""Bytes of packs that are in a temporary file at a time, on their way to an object store."""

_PIECE = 16 << 20

_MOST_FILES = 256
"""Packs that are open at a time."""

Put = Callable[[int, int, memoryview], None]
"""Called with a rank, an offset in its pack, and the bytes to put there."""


def iter_windows(storage: Storage, sizes: Sequence[int]) -> Iterator[list[int]]:
    """The ranks, in groups whose packs are to be open at the same time.

    Args:
        storage: where the packs go.
        sizes: bytes of each rank's pack.
    """
    most_bytes = None if isinstance(storage, LocalStorage) else _WINDOW
    window: list[int] = []
    size = 0
    for rank, nbytes in enumerate(sizes):
        is_full = len(window) == _MOST_FILES or (most_bytes is not None and size + nbytes > most_bytes)
        if window and is_full:
            yield window
            window, size = [], 0
        window.append(rank)
        size += nbytes
    yield window


def open_packs(storage: Storage, sizes: Mapping[int, int]) -> AbstractContextManager[Put]:
    """Open the packs of some ranks. At the end of the block they are in the storage, durable.

    Args:
        storage: the checkpoint's folder.
        sizes: rank -> bytes of its pack. What is not put stays zero.

    Raises StorageFullError before the block if there is no room for them; StorageError.
    """
    return _local(storage, sizes) if isinstance(storage, LocalStorage) else _remote(storage, sizes)


@contextlib.contextmanager
def _local(storage: LocalStorage, sizes: Mapping[int, int]) -> Iterator[Put]:
    with contextlib.ExitStack() as stack:
        files: dict[int, int] = {}
        for rank, nbytes in sizes.items():
            storage.write_pack(pack_path(rank), memoryview(b""))  # makes the folders durable
            path = f"{storage.url}/{pack_path(rank)}"
            files[rank] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, files[rank])
            os.ftruncate(files[rank], nbytes)
        end = sum(sizes.values())
        with explained("write", storage.url, end):
            check_space(storage.url, end)
            yield lambda rank, offset, data: _write_at(files[rank], offset, data)
            for descriptor in files.values():
                os.fsync(descriptor)


@contextlib.contextmanager
def _remote(storage: Storage, sizes: Mapping[int, int]) -> Iterator[Put]:
    starts: dict[int, int] = {}
    end = 0
    for rank, nbytes in sizes.items():
        starts[rank] = end
        end += nbytes
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile() as file:
        with explained("write", folder, end):
            check_space(folder, end)
            os.ftruncate(file.fileno(), end)
            yield lambda rank, offset, data: _write_at(file.fileno(), starts[rank] + offset, data)
        for rank, nbytes in sizes.items():
            pieces = _pieces_at(file.fileno(), starts[rank], nbytes)
            storage.write_pieces(pack_path(rank), nbytes, pieces)


def _pieces_at(descriptor: int, offset: int, nbytes: int) -> Iterator[memoryview]:
    for start in range(0, nbytes, _PIECE):
        yield memoryview(os.pread(descriptor, min(_PIECE, nbytes - start), offset + start))


def _write_at(descriptor: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        offset, data = offset + written, data[written:]
