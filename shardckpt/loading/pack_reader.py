"""Where packs are read from: local files, the memory of nodes, or remote storage. Free of torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shardckpt.environment import local_world_size
from shardckpt.format.chunks import StoredChunk
from shardckpt.format.manifest import Manifest
from shardckpt.loading.file_reads import BlockPool, FileStream, OpenFiles
from shardckpt.loading.limits import DEFAULT_LIMITS, LoadLimits
from shardckpt.run.places import Place
from shardckpt.storage import LocalStorage, Storage
from shardckpt.storage.parallel import THREADS

__all__ = ["MemoryPacks", "PackReader", "PackStream", "Source", "open_packs"]


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

_SAMPLES = 16
"""Chunks of a load that are looked up in the page cache."""


class PackStream(Protocol):
    """Reads a range of a pack piece by piece. For one thread."""

    def read(self, offset: int, *buffers: memoryview) -> None:
        """Fill the buffers, one after another, with the bytes from `offset` of the pack on.

        They lie in the stream's range; offsets ascend from call to call, for speed. Raises CorruptError if the
        pack ends earlier, FileNotFoundError, StorageError.
        """


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

    def threads(self, chunks: Sequence[StoredChunk]) -> int:
        """The number of threads that read these chunks fastest. Raises StorageError."""

    def stream(
        self, number: int, start: int, stop: int, *, keep: bool = False
    ) -> AbstractContextManager[PackStream]:
        """Begin to read the bytes [start, stop) of the pack.

        Args:
            number: the pack's.
            start, stop: the range.
            keep: True if the same bytes will be read again, by this process or others of this machine.

        Raises FileNotFoundError, StorageError.
        """

    def read_again(self, number: int, start: int, stop: int) -> memoryview:
        """The bytes [start, stop), past caches: from the disk itself, over another connection.

        For bytes that seem wrong. Raises as `PackStream.read`.
        """

    def size_again(self, number: int) -> int:
        """As `size`, past caches."""


def open_packs(source: Source, manifest: Manifest, limits: LoadLimits = DEFAULT_LIMITS) -> PackReader:
    """A reader of the packs of the checkpoint at `source`. Reads nothing yet."""
    if isinstance(source, MemoryPacks):
        return _MemoryReader(source, manifest, limits)
    if isinstance(source.root, LocalStorage):
        return _FileReader(source.root, source, manifest, limits)
    return _RequestReader(source, manifest, limits)


class _MemoryReader:
    """Snapshots, whose memory is mapped and faulted in already."""

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

    def threads(self, chunks: Sequence[StoredChunk]) -> int:  # noqa: ARG002
        return _compute_threads()

    @contextmanager
    def stream(self, number: int, start: int, stop: int, *, keep: bool = False) -> Iterator[PackStream]:  # noqa: ARG002
        yield _MemoryStream(np.frombuffer(self._packs[number], dtype=np.uint8))

    def read_again(self, number: int, start: int, stop: int) -> memoryview:
        return self._packs[number][start:stop]

    size_again = size


class _MemoryStream:
    """Copies from memory."""

    def __init__(self, content: npt.NDArray[np.uint8]) -> None:
        self._content = content

    def read(self, offset: int, *buffers: memoryview) -> None:
        for buffer in buffers:
            target = np.frombuffer(buffer, dtype=np.uint8)
            np.copyto(target, self._content[offset : offset + len(target)])
            offset += len(target)


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

    def threads(self, chunks: Sequence[StoredChunk]) -> int:  # noqa: ARG002
        return THREADS

    @contextmanager
    def stream(self, number: int, start: int, stop: int, *, keep: bool = False) -> Iterator[PackStream]:  # noqa: ARG002
        yield _RequestStream(self._root, self._paths[number], start, stop, self.request)

    @cached_property
    def _fresh(self) -> Storage:
        return self._root.fresh()

    def read_again(self, number: int, start: int, stop: int) -> memoryview:
        content = np.empty(stop - start, dtype=np.uint8).data
        self._fresh.read_into(self._paths[number], start, content)
        return content

    def size_again(self, number: int) -> int:
        return self._fresh.size(self._paths[number])


class _RequestStream:
    """Reads by requests of `request` bytes, and holds one at a time."""

    def __init__(self, root: Storage, path: str, start: int, stop: int, request: int) -> None:
        self._root = root
        self._path = path
        self._stop = stop
        self._memory = np.empty(min(request, stop - start), dtype=np.uint8)
        self._start = self._end = start  # of what is held

    def read(self, offset: int, *buffers: memoryview) -> None:
        for buffer in buffers:
            target = np.frombuffer(buffer, dtype=np.uint8)
            while len(target):
                if not self._start <= offset < self._end:
                    self._request(offset)
                at = offset - self._start
                part = self._memory[at : min(at + len(target), self._end - self._start)]
                np.copyto(target[: len(part)], part)
                target, offset = target[len(part) :], offset + len(part)

    def _request(self, offset: int) -> None:
        end = min(offset + len(self._memory), self._stop)
        self._start = self._end = 0  # nothing is held after an error
        self._root.read_into(self._path, offset, self._memory[: end - offset].data)
        self._start, self._end = offset, end


class _FileReader(_RequestReader):
    """Local files: what is in the page cache is read from there, other bytes past it.

    Reads past the page cache take a third of the time of cold reads through it, and an eighth of their CPU time
    (4 processes on 2 processors, ext4). Several threads wait for the disk, but only as many as there are
    processors for this rank handle at the same time what they have read.
    """

    is_near = True

    def __init__(self, root: LocalStorage, place: Place, manifest: Manifest, limits: LoadLimits) -> None:
        super().__init__(place, manifest, limits)
        self.request = limits.near_request
        self._files = OpenFiles(root, self._paths, limits.open_files)
        self._blocks = BlockPool(limits.direct)
        self._turn = threading.Semaphore(_compute_threads())

    def threads(self, chunks: Sequence[StoredChunk]) -> int:
        """More of them where the disk has to be waited for: a sample of the chunks tells."""
        byte = memoryview(bytearray(1))
        try:
            for chunk in chunks[:: len(chunks) // _SAMPLES + 1]:
                if not self._files.open(chunk.pack).read_cached(chunk.offset, [byte]):
                    return THREADS
        except FileNotFoundError:
            return THREADS
        return _compute_threads()

    @contextmanager
    def stream(self, number: int, start: int, stop: int, *, keep: bool = False) -> Iterator[PackStream]:
        file = self._files.open(number)
        if keep:
            file.read_ahead(start, stop - start)
        with self._turn, FileStream(file, stop, self._turn, None if keep else self._blocks) as stream:
            yield stream


def _compute_threads() -> int:
    """Threads of a rank for work that only computes: more than its share of processors slow each other down."""
    share = 2 * len(os.sched_getaffinity(0)) // local_world_size()
    return max(1, min(THREADS, share))
