"""Where packs are read from: mapped files, the memory of nodes, or remote storage. Free of torch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shardckpt.format.manifest import Manifest
from shardckpt.loading.limits import DEFAULT_LIMITS, LoadLimits
from shardckpt.memory import drop, populate
from shardckpt.run.places import Place
from shardckpt.storage import LocalStorage, Storage

__all__ = ["MemoryPacks", "PackReader", "Source", "open_packs"]


@dataclass(frozen=True)
class MemoryPacks:
    """The packs of a snapshot, as far as this rank can read them.

    Attributes:
        url: the snapshot's name in messages.
        packs: pack number in the manifest -> the pack's content, which must not change while it is read. Packs
            that only other nodes hold are absent.
        has_checksums: True if the manifest has the chunks' checksums. Without them nothing is verified.
    """

    url: str
    packs: Mapping[int, memoryview]
    has_checksums: bool


Source = Place | MemoryPacks
"""What a checkpoint is loaded from."""


class PackReader(Protocol):
    """Reads the packs of one checkpoint, by their number in the manifest. Safe to use from several threads.

    Attributes:
        url: the checkpoint's name in messages.
        has_checksums: True if what is read can be verified.
        is_near: True if reading twice is cheaper than holding what was read.
        request: bytes that are best asked for together.
    """

    url: str
    has_checksums: bool
    is_near: bool
    request: int

    def __contains__(self, number: int) -> bool:
        """True if this process can read the pack."""

    def size(self, number: int) -> int:
        """Bytes of the pack as it is found. Raises FileNotFoundError, StorageError."""

    def read(self, number: int, start: int, stop: int) -> memoryview:
        """The bytes [start, stop) of the pack: read-only, and to be released soon.

        Raises CorruptError if the pack ends earlier, FileNotFoundError, StorageError.
        """

    def read_again(self, number: int, start: int, stop: int) -> memoryview:
        """As `read`, past caches: from the disk itself, over another connection. For bytes that seem wrong."""

    def size_again(self, number: int) -> int:
        """As `size`, past caches."""

    def drop(self, number: int, start: int, stop: int) -> None:
        """Release what was read there: it is not needed again."""


def open_packs(source: Source, manifest: Manifest, limits: LoadLimits = DEFAULT_LIMITS) -> PackReader:
    """A reader of the packs of the checkpoint at `source`. Reads nothing yet."""
    if isinstance(source, MemoryPacks):
        return _MemoryReader(source, manifest, limits)
    if isinstance(source.root, LocalStorage):
        return _MappedReader(source.root, source, manifest, limits)
    return _RequestReader(source, manifest, limits)


class _MemoryReader:
    """Snapshots, whose memory is mapped already."""

    is_near = True

    def __init__(self, source: MemoryPacks, manifest: Manifest, limits: LoadLimits) -> None:
        self.url = source.url
        self.has_checksums = source.has_checksums
        self.request = limits.near_request
        self._packs = source.packs
        self._manifest = manifest

    def __contains__(self, number: int) -> bool:
        return number in self._packs

    def size(self, number: int) -> int:
        # The buffer may be larger than the pack in it.
        return min(self._packs[number].nbytes, self._manifest.packs[number].size)

    def read(self, number: int, start: int, stop: int) -> memoryview:
        content = np.frombuffer(self._packs[number], dtype=np.uint8)[start:stop]
        populate(content)  # in one call instead of page by page
        return content.data

    read_again = read
    size_again = size

    def drop(self, number: int, start: int, stop: int) -> None:
        pass  # the memory belongs to the saver


class _RequestReader:
    """Files or objects that are read by requests."""

    is_near = False
    has_checksums = True

    def __init__(self, place: Place, manifest: Manifest, limits: LoadLimits) -> None:
        self.url = place.url
        self.request = limits.far_request
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
        pass  # freed with the last reference to it


class _MappedReader(_RequestReader):
    """Local files. Where the kernel refuses to map one, it is read, which also tells what is wrong with it."""

    is_near = True

    def __init__(self, root: LocalStorage, place: Place, manifest: Manifest, limits: LoadLimits) -> None:
        super().__init__(place, manifest, limits)
        self.request = limits.near_request
        self._local = root
        self._most = limits.mapped_packs
        self._sizes = [pack.size for pack in manifest.packs]
        self._mapped: OrderedDict[int, npt.NDArray[np.uint8] | None] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, number: int, start: int, stop: int) -> memoryview:
        mapped = self._map(number)
        if mapped is not None and populate(mapped[start:stop]):
            return mapped[start:stop].data
        return super().read(number, start, stop)

    def read_again(self, number: int, start: int, stop: int) -> memoryview:
        self.drop(number, start, stop)  # mapped pages stay in the page cache
        return super().read_again(number, start, stop)

    def drop(self, number: int, start: int, stop: int) -> None:
        mapped = self._map(number)
        if mapped is not None:
            drop(mapped[start:stop])

    def _map(self, number: int) -> npt.NDArray[np.uint8] | None:
        """The mapped pack, or None where mapping is refused. It is unmapped with the last reference to it."""
        with self._lock:
            if number not in self._mapped:
                mapped = self._local.map(self._paths[number], self._sizes[number])
                self._mapped[number] = None if mapped is None else np.frombuffer(mapped, dtype=np.uint8)
            self._mapped.move_to_end(number)
            if len(self._mapped) > self._most:
                self._mapped.popitem(last=False)
            return self._mapped[number]
