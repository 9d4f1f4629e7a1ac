"""Where packs are read from: mapped files, the memory of nodes, or remote storage. Free of torch."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shardckpt.format.manifest import Manifest
from shardckpt.memory import drop, populate
from shardckpt.run.places import Place
from shardckpt.storage import LocalStorage, Storage

__all__ = ["MemoryPacks", "Packs", "Source", "open_packs"]

_MAPPED = 64  # packs at a time: each takes a file descriptor


@dataclass(frozen=True)
class MemoryPacks:
    """A snapshot in the memory of this node, and perhaps of others.

    Attributes:
        url: what messages call it.
        packs: by its number in the manifest, the content of each pack that this rank can read; those that
            are held on other nodes are absent. They must not change while they are read.
        has_checksums: whether the manifest's checksums are known. If not, nothing is verified.
    """

    url: str
    packs: Mapping[int, memoryview]
    has_checksums: bool


Source = Place | MemoryPacks
"""What a checkpoint is loaded from."""


class Packs(Protocol):
    """The packs of one checkpoint, by their number in the manifest. Safe to use from several threads.

    Attributes:
        url: what messages call the checkpoint.
        has_checksums: whether what is read can be verified.
        is_near: whether reading twice is cheaper than holding what was read.
        request: bytes that are best asked for together.
    """

    url: str
    has_checksums: bool
    is_near: bool
    request: int

    def __contains__(self, number: int) -> bool:
        """Whether this process can read the pack."""

    def size(self, number: int) -> int:
        """Bytes of the pack as it is found. Raises FileNotFoundError, StorageError."""

    def read(self, number: int, start: int, stop: int) -> memoryview:
        """The bytes [start, stop) of the pack: not to be written to, and not to be kept for long.

        Raises CorruptError if the pack ends earlier, FileNotFoundError, StorageError.
        """

    def read_again(self, number: int, start: int, stop: int) -> memoryview:
        """As `read`, past caches: from the disk itself, over another connection. For what seems to be wrong."""

    def size_again(self, number: int) -> int:
        """As `size`, past caches."""

    def drop(self, number: int, start: int, stop: int) -> None:
        """Tell that what was read there is not needed any more."""


def open_packs(source: Source, manifest: Manifest) -> Packs:
    """The packs of the checkpoint at `source`. Touches nothing yet."""
    if isinstance(source, MemoryPacks):
        return _Memory(source, manifest)
    if isinstance(source.root, LocalStorage):
        return _MappedFiles(source.root, source, manifest)
    return _Files(source, manifest)


class _Memory:
    """Snapshots: memory that is mapped already."""

    is_near = True
    request = 8 << 20

    def __init__(self, source: MemoryPacks, manifest: Manifest) -> None:
        self.url = source.url
        self.has_checksums = source.has_checksums
        self._packs = source.packs
        self._manifest = manifest

    def __contains__(self, number: int) -> bool:
        return number in self._packs

    def size(self, number: int) -> int:
        # The memory may be larger than what is in it.
        return min(self._packs[number].nbytes, self._manifest.packs[number].size)

    def read(self, number: int, start: int, stop: int) -> memoryview:
        content = np.frombuffer(self._packs[number], dtype=np.uint8)[start:stop]
        populate(content)  # at once, and not page by page
        return content.data

    read_again = read
    size_again = size

    def drop(self, number: int, start: int, stop: int) -> None:
        pass  # the memory is another's


class _Files:
    """Files or objects that are read by requests."""

    is_near = False
    request = 16 << 20
    has_checksums = True

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self.url = place.url
        self._root = place.root
        self._paths = [place.pack(pack) for pack in manifest.packs]

    def __contains__(self, number: int) -> bool:
        return True

    def size(self, number: int) -> int:
        return self._root.size(self._paths[number])

    def read(self, number: int, start: int, stop: int) -> memoryview:
        return self._read(self._root, number, start, stop)

    @cached_property
    def _fresh(self) -> Storage:
        return self._root.fresh()

    def read_again(self, number: int, start: int, stop: int) -> memoryview:
        return self._read(self._fresh, number, start, stop)

    def size_again(self, number: int) -> int:
        return self._fresh.size(self._paths[number])

    def _read(self, root: Storage, number: int, start: int, stop: int) -> memoryview:
        content = np.empty(stop - start, dtype=np.uint8).data
        root.read_into(self._paths[number], start, content)
        return content

    def drop(self, number: int, start: int, stop: int) -> None:
        pass  # what was read is gone with its last reference


class _MappedFiles(_Files):
    """Local files. What the kernel does not map is read: that also says what is wrong with it."""

    is_near = True
    request = 8 << 20

    def __init__(self, root: LocalStorage, place: Place, manifest: Manifest) -> None:
        super().__init__(place, manifest)
        self._local = root
        self._sizes = [pack.size for pack in manifest.packs]
        self._mapped: OrderedDict[int, npt.NDArray[np.uint8] | None] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, number: int, start: int, stop: int) -> memoryview:
        mapped = self._map(number)
        if mapped is not None and populate(mapped[start:stop]):
            return mapped[start:stop].data
        return super().read(number, start, stop)

    def read_again(self, number: int, start: int, stop: int) -> memoryview:
        self.drop(number, start, stop)  # what is mapped stays in the page cache
        return super().read_again(number, start, stop)

    def drop(self, number: int, start: int, stop: int) -> None:
        mapped = self._map(number)
        if mapped is not None:
            drop(mapped[start:stop])

    def _map(self, number: int) -> npt.NDArray[np.uint8] | None:
        """The mapped pack, or None where that is refused. It is unmapped when nobody refers to it."""
        with self._lock:
            if number not in self._mapped:
                self._mapped[number] = _map_file(
                    partial(self._local.opened, self._paths[number]), self._sizes[number]
                )
            self._mapped.move_to_end(number)
            if len(self._mapped) > _MAPPED:
                self._mapped.popitem(last=False)
            return self._mapped[number]


def _map_file(
    opened: Callable[[], AbstractContextManager[tuple[int, str]]], size: int
) -> npt.NDArray[np.uint8] | None:
    try:
        with opened() as (fd, _):
            return np.frombuffer(mmap.mmap(fd, size, prot=mmap.PROT_READ), dtype=np.uint8)
    except (OSError, ValueError):  # a file that has become too short is a ValueError
        return None
