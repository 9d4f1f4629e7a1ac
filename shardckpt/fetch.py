"""Fetch and verify chunks. Free of torch.

What goes into memory that is not yet a part of the user's state is handed over as it is verified. What
goes into live tensors is verified first and applied later: chunks that are near (mapped files, memory) are
looked at twice for that, so that no second copy of the state is held; remote ones are fetched once and held.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import crc32c
import numpy as np
import numpy.typing as npt

from shardckpt.dtypes import numpy_dtype
from shardckpt.errors import CorruptError
from shardckpt.manifest import CRC_BYTES, Manifest
from shardckpt.packs import Source, open_packs
from shardckpt.progress import alive
from shardckpt.reads import Read, Stored, coalesced, describe

__all__ = ["Fetcher", "in_parallel"]

_THREADS = 4

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
        self._check_sizes(groups)
        in_parallel(verify, groups, self._threads)

    def check_sizes(self, reads: Iterable[Read]) -> None:
        """Compare the sizes of the chunks' packs with the manifest's, before memory is made for them.

        Each is asked for once. Raises CorruptError, StorageError.
        """
        self._check_sizes([[read] for read in reads])

    def hand_over(self, reads: Iterable[Read], take: Callable[[Read], object]) -> None:
        """Hand verified chunks to `take`, and release them, as `verify` does."""
        groups = list(coalesced(reads, self._packs.request))
        in_parallel(partial(self._hand_over, take), groups, self._threads)

    def fetch(self, chunks: Sequence[Stored]) -> memoryview:
        """The bytes from the first to the last of these neighbours in a pack, verified. Raises as `verify`."""
        self._check_sizes([chunks])
        content = self._read(chunks)
        self._compare(chunks, content)
        return content

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
        self._packs.drop(group[0].pack, group[0].offset, group[-1].offset + group[-1].nbytes + CRC_BYTES)

    def _verify(self, group: list[Read]) -> None:
        """One request for neighbouring chunks, which are then held if they are far."""
        content = self._read(group)
        self._compare(group, content)
        if not self.is_near:
            for read in group:
                start = read.offset - group[0].offset
                self.hold(read, content[start : start + read.nbytes])

    def _read(self, chunks: Sequence[Stored]) -> memoryview:
        first, last = chunks[0], chunks[-1]
        try:
            return self._packs.read(first.pack, first.offset, last.offset + last.nbytes + CRC_BYTES)
        except FileNotFoundError as error:
            raise self._missing(first.pack) from error

    def _compare(self, chunks: Sequence[Stored], content: memoryview) -> None:
        alive()
        if not self._packs.has_checksums:
            return
        for chunk in chunks:
            begin = chunk.offset - chunks[0].offset
            end = begin + chunk.nbytes
            found = crc32c.crc32c(content[begin:end])
            stored = int.from_bytes(content[end : end + CRC_BYTES], "little")
            if not found == stored == chunk.crc32c:
                raise CorruptError(
                    f"{self._packs.url}: {describe(self._manifest, chunk.row)} is corrupt: its checksum is "
                    f"{found:08x}, the one stored with it {stored:08x}, the manifest's {chunk.crc32c:08x}. "
                    "Load another checkpoint of this run (shardckpt ls), and have the storage checked."
                )

    def _check_sizes(self, groups: Sequence[Sequence[Stored]]) -> None:
        """Compare each pack's size with the manifest's, once, which is quicker than to come upon its end."""
        for number in sorted({group[0].pack for group in groups} - self._sized):
            pack = self._manifest.packs[number]
            try:
                found = self._packs.size(number)
            except FileNotFoundError as error:
                raise self._missing(number) from error
            if found != pack.size:
                chunks = (chunk for group in groups for chunk in group if chunk.pack == number)
                lost = next((c for c in chunks if c.offset + c.nbytes + CRC_BYTES > found), None)
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
    """Threads of a rank for what needs no waiting: more than there are processors hinder each other."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    share = 2 * len(os.sched_getaffinity(0)) // max(1, int(ranks) if ranks.isdigit() else 1)
    return max(1, min(_THREADS, share))


def in_parallel(function: Callable[[Any], T], work: Sequence[Any], threads: int = _THREADS) -> list[T]:
    """The function's results in order; the first error is raised once everything under way has ended."""
    if len(work) < 2 or threads == 1:
        return [function(item) for item in work]
    with ThreadPoolExecutor(threads, thread_name_prefix="shardckpt") as pool:
        futures = [pool.submit(function, item) for item in work]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
