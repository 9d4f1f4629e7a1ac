"""Fetch and verify chunks. Free of torch.

Chunks for memory that is not yet a part of the user's state are handed over as they are verified. Chunks for live
tensors are all verified first and applied later. Near ones (mapped files, memory) are read a second time for
that, which saves a second copy of the state; far ones are fetched once and held.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt

from shardckpt.environment import local_world_size
from shardckpt.errors import LOAD_ANOTHER, CorruptError
from shardckpt.format.box import Box
from shardckpt.format.chunks import StoredChunk
from shardckpt.format.dtypes import numpy_dtype
from shardckpt.format.manifest import Manifest
from shardckpt.loading.limits import DEFAULT_LIMITS, LoadLimits
from shardckpt.loading.pack_reader import Source, open_packs
from shardckpt.loading.plan import ChunkRead, coalesced, describe, plan_reads
from shardckpt.progress import alive
from shardckpt.storage.parallel import THREADS, in_parallel
from shardckpt.storage.rereading import warn_misread
from shardckpt.storage.work import Interruption

__all__ = ["Fetcher"]

_THREADS_AHEAD = 6

Take = Callable[[ChunkRead], object]
"""Called with a verified chunk, which can be read with `Fetcher.chunk` or `Fetcher.content` during the call."""


class Fetcher:
    """Reads and verifies the chunks of one checkpoint. Safe to use from several threads.

    Attributes:
        url: the checkpoint's name in messages.
        is_near: True if verified chunks are read again instead of held.
    """

    def __init__(self, source: Source, manifest: Manifest, limits: LoadLimits = DEFAULT_LIMITS) -> None:
        self._packs = open_packs(source, manifest, limits)
        self._manifest = manifest
        self._ahead = limits.ahead
        self._held: dict[int, memoryview] = {}
        self._sized: set[int] = set()
        self.url = self._packs.url
        self.is_near = self._packs.is_near
        self._threads = _near_threads() if self.is_near else THREADS

    def __contains__(self, pack: int) -> bool:
        """True if this process can read the pack of this number."""
        return pack in self._packs

    def verify(
        self,
        reads: Iterable[ChunkRead],
        take: Take | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Compare these chunks with their checksums.

        Args:
            reads: in the order of packs and offsets.
            take: called with each verified chunk, which is released afterwards; from several threads. Without it
                the chunks can be read until they are released.
            progress: called with the bytes of each finished request; from several threads.

        Raises CorruptError, which names the first bad chunk and its pack, or a pack that is missing or has
        another size; StorageError.
        """

        def verify(group: list[ChunkRead]) -> None:
            self._verify(group)
            if take is not None:
                self._hand_over(take, group)
            if progress is not None:
                progress(sum(read.stored.nbytes for read in group))

        groups = list(self._requests(reads))
        self.check_sizes(read.stored for group in groups for read in group)
        in_parallel(verify, groups, self._threads)

    def check_all_sizes(self) -> None:
        """Compare the size of every pack with the manifest's. Raises CorruptError, StorageError."""
        reads = plan_reads(self._manifest, [(t.name, Box.whole(t.shape)) for t in self._manifest.tensors])
        self.check_sizes(read.stored for read in reads)

    def check_sizes(self, chunks: Iterable[StoredChunk]) -> None:
        """Compare the sizes of the packs that have these chunks with the manifest's, each pack once.

        A pack that is cut short is so found before anything is read from it. Raises CorruptError, StorageError.
        """
        of_packs: dict[int, list[StoredChunk]] = {}
        for chunk in chunks:
            if chunk.pack not in self._sized:
                of_packs.setdefault(chunk.pack, []).append(chunk)
        in_parallel(self._check_size, list(of_packs.values()), self._threads)

    def hand_over(self, reads: Iterable[ChunkRead], take: Take) -> None:
        """Call `take` with each of these chunks, which `verify` has verified, and release them."""
        in_parallel(partial(self._hand_over, take), list(self._requests(reads)), self._threads)

    def fetch(self, chunks: Sequence[StoredChunk]) -> memoryview:
        """The bytes from the first to the last of these neighbours in one pack, verified. Raises as `verify`."""
        self.check_sizes(chunks)
        return self._read_right(chunks)[0]

    def fetch_ahead(self, groups: Iterable[Sequence[StoredChunk]]) -> Generator[memoryview]:
        """What `fetch` returns for each group of neighbours, in order, while the next ones are being fetched.

        Up to `LoadLimits.ahead` bytes, or one group, are fetched ahead. Close the generator if you leave it
        early.
        """
        waiting = deque((group, group[-1].offset + group[-1].nbytes - group[0].offset) for group in groups)
        running: deque[tuple[int, Future[memoryview]]] = deque()
        interruption = Interruption()

        def fetch(group: Sequence[StoredChunk]) -> memoryview:
            with interruption.joined():
                return self.fetch(group)

        with ThreadPoolExecutor(_THREADS_AHEAD, thread_name_prefix="shardckpt") as pool:
            try:
                while waiting or running:
                    ahead = sum(nbytes for nbytes, _ in running)
                    while waiting and (not running or ahead + waiting[0][1] <= self._ahead):
                        group, nbytes = waiting.popleft()
                        running.append((nbytes, pool.submit(fetch, group)))
                        ahead += nbytes
                    yield running.popleft()[1].result()
            finally:
                interruption.set()
                pool.shutdown(cancel_futures=True)

    def drop(self, chunks: Sequence[StoredChunk]) -> None:
        """Release the memory of these neighbours, which `fetch` has returned: they are not needed again."""
        self._packs.drop(chunks[0].pack, chunks[0].offset, chunks[-1].stop)

    def hold(self, row: int, content: memoryview) -> None:
        """Take the bytes of the chunk of this row, verified by another rank, without a check."""
        self._held[row] = content

    def chunk(self, read: ChunkRead) -> npt.NDArray[Any]:
        """A verified chunk as a read-only array of the chunk's full, padded shape."""
        return self.content(read).view(numpy_dtype(read.tensor.dtype)).reshape(read.chunk)

    def content(self, read: ChunkRead) -> npt.NDArray[np.uint8]:
        """The bytes of a verified chunk, read-only."""
        pack, offset, row, nbytes, _ = read.stored
        held = self._held.get(row)
        if held is None:
            held = self._packs.read(pack, offset, offset + nbytes)
        return np.frombuffer(held, dtype=np.uint8)

    def release(self, row: int) -> None:
        """Free what is held of the chunk of this row."""
        self._held.pop(row, None)

    def _requests(self, reads: Iterable[ChunkRead]) -> Iterator[list[ChunkRead]]:
        reads = list(reads)
        ordered = iter(reads)
        for group in coalesced((read.stored for read in reads), self._packs.request):
            yield list(islice(ordered, len(group)))

    def _hand_over(self, take: Take, group: Sequence[ChunkRead]) -> None:
        alive()
        for read in group:
            take(read)
            self.release(read.stored.row)
        self.drop([group[0].stored, group[-1].stored])

    def _verify(self, group: list[ChunkRead]) -> None:
        """Read and verify neighbouring chunks in one request. Far ones are held, and those that were misread."""
        chunks = [read.stored for read in group]
        content, repaired = self._read_right(chunks)
        for chunk in repaired if self.is_near else chunks:
            start = chunk.offset - chunks[0].offset
            self.hold(chunk.row, content[start : start + chunk.nbytes])

    def _read_right(self, chunks: Sequence[StoredChunk]) -> tuple[memoryview, list[StoredChunk]]:
        """The bytes of neighbouring chunks, verified, and those of the chunks that were wrong at first.

        A chunk that is wrong is read again, past caches. One that is wrong twice is corrupt.
        """
        alive()
        content = self._read(chunks)
        wrong = [chunk for chunk in chunks if self._difference(chunk, _part(content, chunks[0], chunk))]
        if wrong:
            content = memoryview(bytearray(content))
        for chunk in wrong:
            part = _part(content, chunks[0], chunk)
            first = self._difference(chunk, part)
            part[:] = self._read_again(chunk)
            if difference := self._difference(chunk, part):
                raise CorruptError(
                    f"{self._packs.url}: {describe(self._manifest, chunk.row)} is corrupt, also when it is read "
                    f"again: {difference}. {LOAD_ANOTHER}"
                )
            warn_misread(
                f"{self._packs.url}: {describe(self._manifest, chunk.row)} was read wrongly: {first}."
            )
        return content, wrong

    def _read(self, chunks: Sequence[StoredChunk]) -> memoryview:
        span = chunks[0].pack, chunks[0].offset, chunks[-1].stop
        try:
            return self._packs.read(*span)
        except (FileNotFoundError, CorruptError):  # the pack ends too early, or seems to
            pass
        try:
            return self._packs.read_again(*span)
        except FileNotFoundError as error:
            raise self._missing(chunks[0].pack) from error

    def _read_again(self, chunk: StoredChunk) -> memoryview:
        try:
            return self._packs.read_again(chunk.pack, chunk.offset, chunk.stop)
        except FileNotFoundError as error:
            raise self._missing(chunk.pack) from error

    def _difference(self, chunk: StoredChunk, content: memoryview) -> str:
        """How a chunk and its checksum differ from what was written; an empty string if they do not."""
        if not self._packs.has_checksums:
            return ""
        found = crc32c.crc32c(content[: chunk.nbytes])
        stored = int.from_bytes(content[chunk.nbytes :], "little")
        if found == stored == chunk.crc32c:
            return ""
        return (
            f"its checksum is {found:08x}, the one stored with it {stored:08x}, the manifest's "
            f"{chunk.crc32c:08x}"
        )

    def _check_size(self, chunks: Sequence[StoredChunk]) -> None:
        """Compare the size of the pack that has these chunks."""
        number = chunks[0].pack
        pack = self._manifest.packs[number]
        found = _size(number, self._packs.size)
        if found != pack.size:
            found = _size(number, self._packs.size_again)
        if found is None:
            raise self._missing(number)
        if found != pack.size:
            lost = next((chunk for chunk in chunks if chunk.stop > found), None)
            names = describe(self._manifest, lost.row) if lost else ""
            raise CorruptError(
                f"{self._packs.url}: the pack {pack.path} has {found} bytes and should have "
                f"{pack.size}: it was changed after it was written"
                + (f"; the first chunk that is lost is {names}" if lost else "")
            )
        self._sized.add(number)

    def _missing(self, number: int) -> CorruptError:
        pack = self._manifest.packs[number]
        return CorruptError(
            f"{self._packs.url}: the pack {pack.path} is missing; it should have {pack.size} bytes"
        )


def _near_threads() -> int:
    """Threads of a rank for work that only computes: more than its share of processors slow each other down."""
    share = 2 * len(os.sched_getaffinity(0)) // local_world_size()
    return max(1, min(THREADS, share))


def _size(number: int, ask: Callable[[int], int]) -> int | None:
    """The size that `ask` finds; None if the pack is missing."""
    try:
        return ask(number)
    except FileNotFoundError:
        return None


def _part(content: memoryview, first: StoredChunk, chunk: StoredChunk) -> memoryview:
    """The bytes of a chunk and its checksum, in content that begins with the chunk `first`."""
    return content[chunk.offset - first.offset : chunk.stop - first.offset]
