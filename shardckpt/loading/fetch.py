"""Fetch and verify chunks. Free of torch.

What goes into memory that is not yet a part of the user's state is handed over as it is verified. What
goes into live tensors is verified first and applied later: chunks that are near (mapped files, memory) are
looked at twice for that, so that no second copy of the state is held; remote ones are fetched once and held.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import crc32c
import numpy as np
import numpy.typing as npt

from shardckpt.environment import local_world_size
from shardckpt.errors import LOAD_ANOTHER, CorruptError
from shardckpt.format.box import Box
from shardckpt.format.chunks import CRC_BYTES
from shardckpt.format.dtypes import numpy_dtype
from shardckpt.format.manifest import Manifest
from shardckpt.loading.pack_reader import Source, open_packs
from shardckpt.loading.plan import Read, Stored, coalesced, describe, plan_reads
from shardckpt.progress import alive
from shardckpt.storage.rereading import warn_misread
from shardckpt.storage.work import Interruption

__all__ = ["Fetcher", "in_parallel"]

_THREADS = 4
_THREADS_AHEAD = 6
_AHEAD = 48 << 20
"""Bytes that are fetched ahead of those in use."""

S = TypeVar("S", bound=Stored)
T = TypeVar("T")


class Fetcher:
    """Reads the chunks of one checkpoint. Safe to use from several threads.

    Attributes:
        url: what messages call the checkpoint.
        is_near: whether verified chunks are read again rather than held.
    """

    def __init__(self, source: Source, manifest: Manifest) -> None:
        self._packs = open_packs(source, manifest)
        self._manifest = manifest
        self._held: dict[int, memoryview] = {}
        self._sized: set[int] = set()
        self.url = self._packs.url
        self.is_near = self._packs.is_near
        self._threads = _near_threads() if self.is_near else _THREADS

    def __contains__(self, pack: int) -> bool:
        """Whether this process can read the pack of this number."""
        return pack in self._packs

    def verify(
        self,
        reads: Iterable[Read],
        take: Callable[[Read], object] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Check the bytes of these chunks, in the order of packs and places, against their checksums.

        Each verified chunk is handed to `take`, if there is one, which may use `chunk`, and released.
        Without it the chunks can be used until they are released. Both `take` and `progress`, which is
        called with the bytes done, are called from several threads. Raises CorruptError, which names the
        first bad chunk and its pack; a missing pack is corruption, too. Raises StorageError.
        """

        def verify(group: list[Read]) -> None:
            self._verify(group)
            if take is not None:
                self._hand_over(take, group)
            if progress is not None:
                progress(sum(read.nbytes for read in group))

        groups = list(coalesced(reads, self._packs.request))
        self.check_sizes(read for group in groups for read in group)
        in_parallel(verify, groups, self._threads)

    def check_all_sizes(self) -> None:
        """Compare the size of every pack with the manifest's. Raises CorruptError, StorageError."""
        reads = plan_reads(self._manifest, [(t.name, Box.whole(t.shape)) for t in self._manifest.tensors])
        self.check_sizes(reads)

    def check_sizes(self, chunks: Iterable[Stored]) -> None:
        """Compare the sizes of the chunks' packs with the manifest's, which is quicker than to come upon an end.

        Each is asked for once. Raises CorruptError, StorageError.
        """
        of_packs: dict[int, list[Stored]] = {}
        for chunk in chunks:
            if chunk.pack not in self._sized:
                of_packs.setdefault(chunk.pack, []).append(chunk)
        in_parallel(self._check_size, list(of_packs.values()), self._threads)

    def hand_over(self, reads: Iterable[Read], take: Callable[[Read], object]) -> None:
        """Hand verified chunks to `take`, and release them, as `verify` does."""
        groups = list(coalesced(reads, self._packs.request))
        in_parallel(partial(self._hand_over, take), groups, self._threads)

    def fetch(self, chunks: Sequence[Stored]) -> memoryview:
        """The bytes from the first to the last of these neighbours in a pack, verified. Raises as `verify`."""
        self.check_sizes(chunks)
        return self._read_right(chunks)[0]

    def fetch_ahead(self, groups: Iterable[Sequence[Stored]]) -> Generator[memoryview]:
        """What `fetch` returns for each group of neighbours, in order; the next ones are fetched meanwhile.

        What is fetched ahead is 48 MiB, or one group. Close the generator when it is not needed to its end.
        """
        waiting = deque((group, group[-1].offset + group[-1].nbytes - group[0].offset) for group in groups)
        running: deque[tuple[int, Future[memoryview]]] = deque()
        interruption = Interruption()

        def fetch(group: Sequence[Stored]) -> memoryview:
            with interruption.joined():
                return self.fetch(group)

        with ThreadPoolExecutor(_THREADS_AHEAD, thread_name_prefix="shardckpt") as pool:
            try:
                while waiting or running:
                    ahead = sum(nbytes for nbytes, _ in running)
                    while waiting and (not running or ahead + waiting[0][1] <= _AHEAD):
                        group, nbytes = waiting.popleft()
                        running.append((nbytes, pool.submit(fetch, group)))
                        ahead += nbytes
                    yield running.popleft()[1].result()
            finally:
                interruption.set()
                pool.shutdown(cancel_futures=True)

    def drop(self, chunks: Sequence[Stored]) -> None:
        """Tell that these neighbours, which `fetch` has returned, are not needed any more."""
        self._packs.drop(
            chunks[0].pack, chunks[0].offset, chunks[-1].offset + chunks[-1].nbytes + CRC_BYTES
        )

    def hold(self, read: Read, content: memoryview) -> None:
        """Take the bytes of a chunk, verified elsewhere, as they are."""
        self._held[read.row] = content

    def chunk(self, read: Read) -> npt.NDArray[Any]:
        """The verified chunk as an array of its full, padded shape, not to be written to."""
        return self.content(read).view(numpy_dtype(read.tensor.dtype)).reshape(read.chunk)

    def content(self, read: Read) -> npt.NDArray[np.uint8]:
        """The bytes of the verified chunk, not to be written to."""
        held = self._held.get(read.row)
        if held is None:
            held = self._packs.read(read.pack, read.offset, read.offset + read.nbytes)
        return np.frombuffer(held, dtype=np.uint8)

    def release(self, read: Read) -> None:
        """Forget what is held of the chunk."""
        self._held.pop(read.row, None)

    def _hand_over(self, take: Callable[[Read], object], group: Sequence[Read]) -> None:
        alive()
        for read in group:
            take(read)
            self.release(read)
        self.drop(group)

    def _verify(self, group: list[Read]) -> None:
        """One request for neighbouring chunks; held are those that are far, or were not right at first."""
        content, repaired = self._read_right(group)
        for read in repaired if self.is_near else group:
            start = read.offset - group[0].offset
            self.hold(read, content[start : start + read.nbytes])

    def _read_right(self, chunks: Sequence[S]) -> tuple[memoryview, list[S]]:
        """The bytes of neighbouring chunks, verified, and those of the chunks that were wrong at first.

        A chunk that is wrong is read again, past caches: what is wrong twice is corrupt.
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

    def _read(self, chunks: Sequence[Stored]) -> memoryview:
        first, last = chunks[0], chunks[-1]
        span = first.pack, first.offset, last.offset + last.nbytes + CRC_BYTES
        try:
            return self._packs.read(*span)
        except (FileNotFoundError, CorruptError):  # it ends too early, or seems to
            pass
        try:
            return self._packs.read_again(*span)
        except FileNotFoundError as error:
            raise self._missing(first.pack) from error

    def _read_again(self, chunk: Stored) -> memoryview:
        try:
            return self._packs.read_again(chunk.pack, chunk.offset, chunk.offset + chunk.nbytes + CRC_BYTES)
        except FileNotFoundError as error:
            raise self._missing(chunk.pack) from error

    def _difference(self, chunk: Stored, content: memoryview) -> str:
        """How the chunk's bytes, with the checksum behind them, differ from what was written; empty if not."""
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

    def _check_size(self, chunks: Sequence[Stored]) -> None:
        """Compare the size of the one pack that these chunks are in."""
        number = chunks[0].pack
        pack = self._manifest.packs[number]
        found = self._size(number, self._packs.size)
        if found != pack.size:
            found = self._size(number, self._packs.size_again)
        if found is None:
            raise self._missing(number)
        if found != pack.size:
            lost = next((c for c in chunks if c.offset + c.nbytes + CRC_BYTES > found), None)
            names = describe(self._manifest, lost.row) if lost else ""
            raise CorruptError(
                f"{self._packs.url}: the pack {pack.path} has {found} bytes and should have "
                f"{pack.size}: it was changed after it was written"
                + (f"; the first chunk that is lost is {names}" if lost else "")
            )
        self._sized.add(number)

    def _size(self, number: int, ask: Callable[[int], int]) -> int | None:
        try:
            return ask(number)
        except FileNotFoundError:
            return None

    def _missing(self, number: int) -> CorruptError:
        pack = self._manifest.packs[number]
        return CorruptError(
            f"{self._packs.url}: the pack {pack.path} is missing; it should have {pack.size} bytes"
        )


def _near_threads() -> int:
    """Threads of a rank for what needs no waiting: more than there are processors hinder each other."""
    share = 2 * len(os.sched_getaffinity(0)) // local_world_size()
    return max(1, min(_THREADS, share))


def in_parallel(function: Callable[[Any], T], work: Sequence[Any], threads: int = _THREADS) -> list[T]:
    """The function's results in order. The first error is raised once everything under way has ended.

    What is under way by then is not waited for in storages: such waits end at once.
    """
    if len(work) < 2 or threads == 1:
        return [function(item) for item in work]
    interruption = Interruption()

    def run(item: Any) -> T:
        with interruption.joined():
            return function(item)

    with ThreadPoolExecutor(threads, thread_name_prefix="shardckpt") as pool:
        try:
            futures = [pool.submit(run, item) for item in work]
            wait(futures, return_when=FIRST_EXCEPTION)
            ended = [future for future in futures if future.done()]
            return [future.result() for future in ended]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            interruption.set()
            raise


def _part(content: memoryview, first: Stored, chunk: Stored) -> memoryview:
    """The bytes of a chunk and its checksum, in those that begin with the first one's."""
    start = chunk.offset - first.offset
    return content[start : start + chunk.nbytes + CRC_BYTES]
