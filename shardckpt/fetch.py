"""Fetch and verify chunks. Free of torch.

What goes into memory that is not yet a part of the user's state is read in one pass (`fetch`). What goes
into live tensors is verified first (`verify`) and applied later: a local chunk is read twice for that,
once in pieces that stay in the processor's cache, and once, from the page cache, straight to where it
belongs, so that no second copy of the state is held. Remote chunks are fetched once and held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import crc32c
import numpy as np
import numpy.typing as npt

from shardckpt.dtypes import numpy_dtype
from shardckpt.errors import CorruptError
from shardckpt.manifest import CRC_BYTES, Manifest
from shardckpt.reads import Read
from shardckpt.runs import Place
from shardckpt.storage import LocalStorage

__all__ = ["Fetcher", "in_parallel"]

_PIECE = 1 << 20
_REQUEST = 32 << 20
_GAP = 64 << 10
_THREADS = 4

T = TypeVar("T")


class Fetcher:
    """Reads the chunks of one checkpoint."""

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self._place = place
        self._manifest = manifest
        self._twice = isinstance(place.root, LocalStorage)
        self._held: dict[int, npt.NDArray[np.uint8]] = {}

    def verify(self, reads: Sequence[Read], progress: Callable[[int], object] | None = None) -> None:
        """Check the bytes of all these chunks against their checksums.

        Raises CorruptError, which names the first bad chunk and its pack; FileNotFoundError cannot
        happen, a missing pack is corruption. `progress` is called with the bytes done, from any thread.
        """
        self._check_sizes(reads)
        work = [[read] for read in reads] if self._twice else list(_coalesced(reads))
        verify = self._verify_local if self._twice else self._verify_remote
        for done in in_parallel(verify, work):
            if progress is not None:
                progress(done)

    def fetch(
        self,
        reads: Sequence[Read],
        memory: Callable[[Read], memoryview | None],
        take: Callable[[Read], object],
    ) -> None:
        """Read and verify chunks in one pass, and hand each one over.

        A local chunk is read straight into `memory(read)`, if that is not None; content that fails
        verification may be in there afterwards. For any other chunk `take(read)` is called, which may
        use `chunk` and `read_into`; then it is released. Both are called from several threads. Raises as
        `verify` does.
        """
        self._check_sizes(reads)

        def fetch_local(group: Sequence[Read]) -> None:
            (read,) = group
            straight = memory(read)
            content = np.empty(read.nbytes, dtype=np.uint8).data if straight is None else straight
            path = self._place.pack(self._manifest.packs[read.pack])
            stored = bytearray(CRC_BYTES)
            self._place.root.read_into(path, read.offset, content)
            self._place.root.read_into(path, read.offset + read.nbytes, memoryview(stored))
            self._compare(read, crc32c.crc32c(content), bytes(stored))
            if straight is None:
                self._held[read.row] = np.frombuffer(content, dtype=np.uint8)
                hand_over(group)

        def fetch_remote(group: Sequence[Read]) -> None:
            self._verify_remote(group)
            hand_over(group)

        def hand_over(group: Sequence[Read]) -> None:
            for read in group:
                take(read)
                self.release(read)

        if self._twice:
            in_parallel(fetch_local, [[read] for read in reads])
        else:
            in_parallel(fetch_remote, _coalesced(reads))

    def read_into(self, read: Read, start: int, target: memoryview) -> None:
        """Fill `target` with the verified chunk's bytes from `start` on."""
        if read.row in self._held:
            source = self._held[read.row][start : start + len(target)]
            np.frombuffer(target, dtype=np.uint8)[:] = source
        else:
            path = self._place.pack(self._manifest.packs[read.pack])
            self._place.root.read_into(path, read.offset + start, target)

    def chunk(self, read: Read) -> npt.NDArray[Any]:
        """The verified chunk as an array of its full, padded shape."""
        content = self._held.get(read.row)
        if content is None:
            content = np.empty(read.nbytes, dtype=np.uint8)
            self.read_into(read, 0, content.data)
        return content.view(numpy_dtype(read.tensor.dtype)).reshape(read.chunk)

    def release(self, read: Read) -> None:
        """Forget what is held of the chunk."""
        self._held.pop(read.row, None)

    def _check_sizes(self, reads: Sequence[Read]) -> None:
        for number in sorted({read.pack for read in reads}):
            pack = self._manifest.packs[number]
            try:
                found = self._place.root.size(self._place.pack(pack))
            except FileNotFoundError as error:
                raise CorruptError(
                    f"{self._place.url}: the pack {pack.path} is missing; it should have {pack.size} bytes"
                ) from error
            if found != pack.size:
                ends = ((r, r.offset + r.nbytes + CRC_BYTES) for r in reads if r.pack == number)
                lost = next((r for r, end in ends if end > found), None)
                chunk = f"; the first chunk that is lost is {lost.describe(self._manifest)}" if lost else ""
                raise CorruptError(
                    f"{self._place.url}: the pack {pack.path} has {found} bytes and should have "
                    f"{pack.size}: it was changed after it was written{chunk}"
                )

    def _verify_local(self, reads: Sequence[Read]) -> int:
        (read,) = reads
        path = self._place.pack(self._manifest.packs[read.pack])
        piece = memoryview(bytearray(min(_PIECE, read.nbytes + CRC_BYTES)))
        checksum, done = 0, 0
        while done < read.nbytes:
            part = piece[: min(len(piece), read.nbytes - done)]
            self._place.root.read_into(path, read.offset + done, part)
            checksum = crc32c.crc32c(part, checksum)
            done += len(part)
        self._place.root.read_into(path, read.offset + done, piece[:CRC_BYTES])
        self._compare(read, checksum, bytes(piece[:CRC_BYTES]))
        return read.nbytes

    def _verify_remote(self, reads: Sequence[Read]) -> int:
        """One request for neighbouring chunks, which are then held."""
        start = reads[0].offset
        content = np.empty(reads[-1].offset + reads[-1].nbytes + CRC_BYTES - start, dtype=np.uint8)
        path = self._place.pack(self._manifest.packs[reads[0].pack])
        self._place.root.read_into(path, start, content.data)
        for read in reads:
            begin = read.offset - start
            end = begin + read.nbytes
            chunk = content[begin:end]
            self._compare(read, crc32c.crc32c(chunk.data), bytes(content[end : end + CRC_BYTES]))
            self._held[read.row] = chunk
        return sum(read.nbytes for read in reads)

    def _compare(self, read: Read, found: int, stored: bytes) -> None:
        if found == read.crc32c and int.from_bytes(stored, "little") == found:
            return
        raise CorruptError(
            f"{self._place.url}: {read.describe(self._manifest)} is corrupt: its checksum is {found:08x}, "
            f"the one stored with it {int.from_bytes(stored, 'little'):08x}, the manifest's "
            f"{read.crc32c:08x}. "
            "Load another checkpoint of this run (shardckpt ls), and have the storage checked."
        )


def in_parallel(function: Callable[[Any], T], work: Sequence[Any]) -> list[T]:
    """The function's results in order; the first error is raised once everything under way has ended."""
    if len(work) < 2:
        return [function(item) for item in work]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="shardckpt") as pool:
        futures = [pool.submit(function, item) for item in work]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _coalesced(reads: Sequence[Read]) -> list[list[Read]]:
    """Reads grouped into requests: neighbours of one pack, up to the size of a request."""
    groups: list[list[Read]] = []
    for read in reads:
        last = groups[-1] if groups else None
        if (
            last is not None
            and last[-1].pack == read.pack
            and read.offset - (last[-1].offset + last[-1].nbytes) <= _GAP
            and read.offset + read.nbytes - last[0].offset <= _REQUEST
        ):
            last.append(read)
        else:
            groups.append([read])
    return groups
