"""Who fetches for whom: what several ranks need is fetched by one, and what a rank cannot reach by another.

A pure function of what every rank needs and can reach, so that all ranks come to the same plan. No I/O, no
torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardckpt.errors import CorruptError
from shardckpt.format.chunks import CRC_BYTES, chunk_bytes
from shardckpt.format.manifest import Manifest
from shardckpt.loading.plan import REQUEST_GAP

__all__ = ["Chunk", "ExchangePlanner", "SharedRead"]

_UNIT = 8 << 20
_BATCH = 16 << 20


class Chunk(NamedTuple):
    """A stored chunk. Is `Stored`."""

    row: int
    pack: int
    offset: int
    nbytes: int
    crc32c: int


class SharedRead(NamedTuple):
    """Neighbouring chunks of one pack that the same ranks need: one request, then one message to each.

    Attributes:
        fetcher: the rank that reads and verifies them.
        needers: the ranks that need them, by number.
        chunks: in the order of places.
    """

    fetcher: int
    needers: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """From the first byte of the first chunk to the last one's checksum."""
        first, last = self.chunks[0], self.chunks[-1]
        return last.offset + last.nbytes + CRC_BYTES - first.offset

    @property
    def others(self) -> tuple[int, ...]:
        """The ranks that it is sent to."""
        return tuple(rank for rank in self.needers if rank != self.fetcher)


class ExchangePlanner:
    """The chunk table of a manifest, and what ranks want of it, as compact messages."""

    def __init__(self, manifest: Manifest) -> None:
        counts = np.diff(manifest.first_chunks())
        lengths = [chunk_bytes(t.dtype, a.chunk) - CRC_BYTES for t in manifest.tensors for a in t.arrays]
        self._manifest = manifest
        self._pack = np.array(manifest.chunks.pack, dtype=np.int64)
        self._offset = np.array(manifest.chunks.offset, dtype=np.int64)
        self._nbytes = np.repeat(np.array(lengths, dtype=np.int64), counts)
        self._crc32c = np.array(manifest.chunks.crc32c, dtype=np.int64)
        order = np.lexsort((self._offset, self._pack))
        new = np.ones(len(order), dtype=bool)
        pack, offset = self._pack[order], self._offset[order]
        new[1:] = (pack[1:] != pack[:-1]) | (offset[1:] != offset[:-1])
        self._ordered = order[new]
        """The first row of each stored chunk: tied tensors have rows of their own for the same bytes."""
        self._number = np.empty(len(order), dtype=np.int64)
        self._number[order] = np.cumsum(new) - 1

    def first_row(self, row: int) -> int:
        """The row that stands for all rows of the same stored bytes."""
        return int(self._ordered[self._number[row]])

    def encode(self, rows: Iterable[int], packs: Iterable[int]) -> bytes:
        """What a rank tells the others: the rows that it needs, and the packs that it can reach."""
        return _bits(self._number[list(rows)], len(self._ordered)) + _bits(
            list(packs), len(self._manifest.packs)
        )

    def plan(self, told: Sequence[bytes], url: str) -> list[list[SharedRead]]:
        """What is passed on between ranks, by what each of them told, in batches to be done one by one.

        A chunk that only one rank needs, which can reach it, is not in the plan. The others are each
        fetched once: by one that needs it if such a rank can, all fetching about as much. A batch is no
        more than 16 MiB for any rank, or one unit. Raises CorruptError if no rank can reach a pack.
        """
        number, pack_number = len(self._ordered), len(self._manifest.packs)
        bits = np.frombuffer(b"".join(told), dtype=np.uint8).reshape(len(told), -1)
        needs = np.unpackbits(bits[:, : -(-number // 8)], axis=1, count=number).view(bool)
        reaches = np.unpackbits(bits[:, -(-number // 8) :], axis=1, count=pack_number).view(bool)
        size = self._nbytes[self._ordered]
        alone = (needs.sum(axis=0) == 1) & (needs & reaches[:, self._pack[self._ordered]]).any(axis=0)
        loads = (needs & alone).astype(np.int64) @ size
        shared = np.flatnonzero(needs.any(axis=0) & ~alone)
        parts = self._split(shared, needs)
        return _batches(self._assign(parts, needs, reaches, loads.tolist(), url), len(told))

    def _split(
        self, chunks: npt.NDArray[np.int64], needs: npt.NDArray[np.bool_]
    ) -> list[npt.NDArray[np.int64]]:
        """Chunks cut into neighbours of one pack that the same ranks need, of about 8 MiB."""
        if not len(chunks):
            return []
        rows = self._ordered[chunks]
        pack, offset, end = self._pack[rows], self._offset[rows], self._offset[rows] + self._nbytes[rows]
        needers = np.packbits(needs[:, chunks], axis=0)
        cut = np.ones(len(rows), dtype=bool)
        cut[1:] = (
            (pack[1:] != pack[:-1])
            | (offset[1:] - end[:-1] > REQUEST_GAP)
            | (needers[:, 1:] != needers[:, :-1]).any(axis=0)
        )
        window = (offset - offset[cut][np.cumsum(cut) - 1]) // _UNIT
        cut[1:] |= window[1:] != window[:-1]
        return np.split(chunks, np.flatnonzero(cut)[1:])

    def _assign(
        self,
        parts: Sequence[npt.NDArray[np.int64]],
        needs: npt.NDArray[np.bool_],
        reaches: npt.NDArray[np.bool_],
        loads: list[int],
        url: str,
    ) -> list[SharedRead]:
        units = []
        for part in parts:
            rows = self._ordered[part]
            columns = (rows, *(c[rows] for c in (self._pack, self._offset, self._nbytes, self._crc32c)))
            chunks = tuple(map(Chunk, *(column.tolist() for column in columns)))
            pack = chunks[0].pack
            needers = tuple(np.flatnonzero(needs[:, part[0]]).tolist())
            able = [r for r in needers if reaches[r, pack]] or np.flatnonzero(reaches[:, pack]).tolist()
            if not able:
                raise CorruptError(
                    f"{url}: no rank can read the pack {self._manifest.packs[pack].path}: the node that "
                    "held it is gone. Load a checkpoint from storage."
                )
            fetcher = min(able, key=lambda rank: (loads[rank], rank))
            units.append(SharedRead(fetcher, needers, chunks))
            loads[fetcher] += units[-1].nbytes
        return units


def _bits(numbers: Sequence[int] | npt.NDArray[np.int64], count: int) -> bytes:
    flags = np.zeros(count, dtype=bool)
    flags[numbers] = True
    return np.packbits(flags).tobytes()


def _batches(units: Sequence[SharedRead], ranks: int) -> list[list[SharedRead]]:
    """Units in turns, so that in each batch all ranks have something to fetch."""
    turns: Counter[int] = Counter()
    ordered = []
    for unit in units:
        ordered.append((turns[unit.fetcher], unit.fetcher, unit))
        turns[unit.fetcher] += 1
    batches: list[list[SharedRead]] = []
    moved = [0] * ranks
    for _, _, unit in sorted(ordered, key=lambda item: item[:2]):
        at = {unit.fetcher, *unit.needers}
        if not batches or any(moved[rank] and moved[rank] + unit.nbytes > _BATCH for rank in at):
            batches.append([])
            moved = [0] * ranks
        batches[-1].append(unit)
        for rank in at:
            moved[rank] += unit.nbytes
    return batches
