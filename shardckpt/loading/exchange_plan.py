"""Plan an exchange: which rank fetches a chunk that several ranks need, or that a rank cannot reach.

Pure: every rank computes the same plan from what all ranks need and can reach. No I/O, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardckpt.errors import CorruptError
from shardckpt.format.chunks import StoredChunk, content_bytes
from shardckpt.format.manifest import Manifest
from shardckpt.loading.limits import DEFAULT_LIMITS, LoadLimits
from shardckpt.loading.plan import REQUEST_GAP

__all__ = ["ExchangePlanner", "SharedRead"]


class SharedRead(NamedTuple):
    """Neighbouring chunks of one pack that the same ranks need: one request, then one message to each rank.

    Attributes:
        fetcher: the rank that reads and verifies them.
        needers: the ranks that need them, in ascending order.
        chunks: in the order of offsets.
    """

    fetcher: int
    needers: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes from the start of the first chunk to the end of the last one's checksum."""
        return self.chunks[-1].stop - self.chunks[0].offset

    @property
    def receivers(self) -> tuple[int, ...]:
        """The ranks that it is sent to."""
        return tuple(rank for rank in self.needers if rank != self.fetcher)


class ExchangePlanner:
    """Plans the exchange for one manifest.

    Each rank gathers the messages that `encode` makes on all ranks, and passes them to `plan`. In them a stored
    chunk has one number, although tied tensors have rows of their own in the chunk table for the same bytes.
    """

    def __init__(self, manifest: Manifest, limits: LoadLimits = DEFAULT_LIMITS) -> None:
        counts = np.diff(manifest.first_rows)
        lengths = [content_bytes(t.dtype, a.chunk) for t in manifest.tensors for a in t.arrays]
        self._manifest = manifest
        self._limits = limits
        self._pack = manifest.chunks.pack
        self._offset = manifest.chunks.offset
        self._nbytes = np.repeat(np.array(lengths, dtype=np.int64), counts)
        self._crc32c = manifest.chunks.crc32c
        order = np.lexsort((self._offset, self._pack))
        is_new = np.ones(len(order), dtype=bool)
        pack, offset = self._pack[order], self._offset[order]
        is_new[1:] = (pack[1:] != pack[:-1]) | (offset[1:] != offset[:-1])
        self._rows = order[is_new]  # by chunk number, the first row of each stored chunk
        self._number = np.empty(len(order), dtype=np.int64)  # by row
        self._number[order] = np.cumsum(is_new) - 1

    def first_row(self, row: int) -> int:
        """The row that stands for all rows of the same stored chunk."""
        return int(self._rows[self._number[row]])

    def encode(self, rows: Iterable[int], packs: Iterable[int]) -> bytes:
        """This rank's message: the rows of the chunk table that it needs, and the packs that it can read."""
        return _bits(self._number[list(rows)], len(self._rows)) + _bits(
            list(packs), len(self._manifest.packs)
        )

    def plan(self, messages: Sequence[bytes], url: str) -> list[list[SharedRead]]:
        """What ranks fetch for each other, in batches that are exchanged one after another.

        Args:
            messages: of all ranks, by rank.
            url: the checkpoint's name in messages.

        A chunk that only one rank needs, and can read, is not in the plan. Every other chunk is fetched once, by
        a rank that needs it if one of these can read it; all ranks fetch about as many bytes. In one batch a rank
        sends and receives up to `LoadLimits.batch` bytes, or one SharedRead. Raises CorruptError if no rank can
        read a pack.
        """
        chunks, packs = len(self._rows), len(self._manifest.packs)
        bits = np.frombuffer(b"".join(messages), dtype=np.uint8).reshape(len(messages), -1)
        needs = np.unpackbits(bits[:, : -(-chunks // 8)], axis=1, count=chunks).view(bool)
        reaches = np.unpackbits(bits[:, -(-chunks // 8) :], axis=1, count=packs).view(bool)
        size = self._nbytes[self._rows]
        is_alone = (needs.sum(axis=0) == 1) & (needs & reaches[:, self._pack[self._rows]]).any(axis=0)
        loads = (needs & is_alone).astype(np.int64) @ size
        shared = np.flatnonzero(needs.any(axis=0) & ~is_alone)
        groups = self._split(shared, needs)
        reads = self._assign(groups, needs, reaches, loads.tolist(), url)
        return _batches(reads, len(messages), self._limits.batch)

    def _split(
        self, chunks: npt.NDArray[np.int64], needs: npt.NDArray[np.bool_]
    ) -> list[npt.NDArray[np.int64]]:
        """Chunk numbers in groups: neighbours in one pack that the same ranks need, up to `shared_read` bytes."""
        if not len(chunks):
            return []
        rows = self._rows[chunks]
        pack, offset, end = self._pack[rows], self._offset[rows], self._offset[rows] + self._nbytes[rows]
        needers = np.packbits(needs[:, chunks], axis=0)
        cut = np.ones(len(rows), dtype=bool)
        cut[1:] = (
            (pack[1:] != pack[:-1])
            | (offset[1:] - end[:-1] > REQUEST_GAP)
            | (needers[:, 1:] != needers[:, :-1]).any(axis=0)
        )
        window = (offset - offset[cut][np.cumsum(cut) - 1]) // self._limits.shared_read
        cut[1:] |= window[1:] != window[:-1]
        return np.split(chunks, np.flatnonzero(cut)[1:])

    def _assign(
        self,
        groups: Sequence[npt.NDArray[np.int64]],
        needs: npt.NDArray[np.bool_],
        reaches: npt.NDArray[np.bool_],
        loads: list[int],
        url: str,
    ) -> list[SharedRead]:
        """Give each group to the rank that can read it and has the least to fetch; `loads` counts its bytes."""
        reads = []
        for group in groups:
            rows = self._rows[group]
            columns = self._pack[rows], self._offset[rows], rows, self._nbytes[rows], self._crc32c[rows]
            chunks = tuple(map(StoredChunk, *(column.tolist() for column in columns)))
            pack = chunks[0].pack
            needers = tuple(np.flatnonzero(needs[:, group[0]]).tolist())
            able = [r for r in needers if reaches[r, pack]] or np.flatnonzero(reaches[:, pack]).tolist()
            if not able:
                raise CorruptError(
                    f"{url}: no rank can read the pack {self._manifest.packs[pack].path}: the node that "
                    "held it is gone. Load a checkpoint from storage."
                )
            fetcher = min(able, key=lambda rank: (loads[rank], rank))
            reads.append(SharedRead(fetcher, needers, chunks))
            loads[fetcher] += reads[-1].nbytes
        return reads


def _bits(numbers: Sequence[int] | npt.NDArray[np.int64], count: int) -> bytes:
    """`count` bits, of which those with these numbers are set."""
    flags = np.zeros(count, dtype=bool)
    flags[numbers] = True
    return np.packbits(flags).tobytes()


def _batches(reads: Sequence[SharedRead], ranks: int, most: int) -> list[list[SharedRead]]:
    """The reads in batches in which no rank moves more than `most` bytes, and all ranks have one to fetch."""
    turns: Counter[int] = Counter()
    ordered = []
    for read in reads:
        ordered.append((turns[read.fetcher], read.fetcher, read))
        turns[read.fetcher] += 1
    batches: list[list[SharedRead]] = []
    moved = [0] * ranks
    for _, _, read in sorted(ordered, key=lambda item: item[:2]):
        involved = {read.fetcher, *read.needers}
        if not batches or any(moved[rank] and moved[rank] + read.nbytes > most for rank in involved):
            batches.append([])
            moved = [0] * ranks
        batches[-1].append(read)
        for rank in involved:
            moved[rank] += read.nbytes
    return batches
