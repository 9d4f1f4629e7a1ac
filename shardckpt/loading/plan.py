"""Who reads what: a pure function from the boxes that are wanted to the chunks that cover them.

No I/O, no clock, no torch.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from shardckpt.format.box import Box
from shardckpt.format.dtypes import itemsize
from shardckpt.format.manifest import ArrayEntry, Manifest, TensorEntry

__all__ = [
    "REQUEST_GAP",
    "ChunkIndex",
    "Copy",
    "Read",
    "Stored",
    "coalesced",
    "describe",
    "index_chunks",
    "plan_reads",
]

REQUEST_GAP = 64 << 10
"""Bytes that are read for nothing rather than to begin another request."""


class Stored(Protocol):
    """Where the bytes of a chunk are.

    Attributes:
        row: its row in the chunk table.
        pack: number of its pack.
        offset: its first byte there.
        nbytes: bytes of its elements, padding included; its checksum follows them.
        crc32c: the checksum by the manifest.
    """

    @property
    def row(self) -> int: ...
    @property
    def pack(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def crc32c(self) -> int: ...


S = TypeVar("S", bound=Stored)


class Copy(NamedTuple):
    """A part of a chunk, and the part of a wanted box that it fills; slices in their own coordinates."""

    wanted: int
    source: tuple[slice, ...]
    target: tuple[slice, ...]


class Read(NamedTuple):
    """One chunk to fetch and verify, and where its content goes. Is `Stored`."""

    row: int
    tensor: TensorEntry
    cell: Box
    chunk: tuple[int, ...]
    pack: int
    offset: int
    crc32c: int
    copies: tuple[Copy, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the chunk's elements, padding included; its checksum follows them."""
        return math.prod(self.chunk) * itemsize(self.tensor.dtype)


ChunkIndex = Mapping[str, tuple[TensorEntry, Sequence[int]]]
"""Tensor name -> the tensor, and for each of its arrays the number of its first chunk."""


def index_chunks(manifest: Manifest) -> ChunkIndex:
    """Where each tensor's chunks are in the chunk table. For many small reads, make it once."""
    first = manifest.first_chunks().tolist()
    index: dict[str, tuple[TensorEntry, Sequence[int]]] = {}
    arrays = 0
    for tensor in manifest.tensors:
        index[tensor.name] = (tensor, first[arrays : arrays + len(tensor.arrays)])
        arrays += len(tensor.arrays)
    return index


def plan_reads(
    manifest: Manifest, wanted: Sequence[tuple[str, Box]], index: ChunkIndex | None = None
) -> list[Read]:
    """The chunks that cover the wanted boxes, each once, in the order of packs and places.

    Raises KeyError for a name that the checkpoint does not have; boxes must lie inside their tensors.
    """
    index = index_chunks(manifest) if index is None else index
    copies: dict[int, list[Copy]] = defaultdict(list)
    chunks: dict[int, tuple[TensorEntry, Box, tuple[int, ...]]] = {}
    for number, (name, box) in enumerate(wanted):
        tensor, starts = index[name]
        for array, start in zip(tensor.arrays, starts, strict=True):
            for cell_number, cell, source, target in _covering(array, box):
                row = start + cell_number
                chunks[row] = (tensor, cell, array.chunk)
                copies[row].append(Copy(number, source, target))
    table = manifest.chunks
    reads = [
        Read(row, *chunks[row], table.pack[row], table.offset[row], table.crc32c[row], tuple(copies[row]))
        for row in chunks
    ]
    return sorted(reads, key=lambda read: (read.pack, read.offset, read.row))


Slices = tuple[slice, ...]


@lru_cache(maxsize=1 << 14)
def _covering(array: ArrayEntry, box: Box) -> tuple[tuple[int, Box, Slices, Slices], ...]:
    """The array's cells that a box needs: number, cell, and the slices of the cell and of the box that meet.

    The layers of a model are alike, so most of a load's questions have been asked before.
    """
    if (part := box.intersect(array.box)) is None:
        return ()
    found = []
    for number, cell in _cells_over(array, part):
        overlap = cell.intersect(box)
        assert overlap is not None
        source, target = overlap.relative_to(cell.offsets), overlap.relative_to(box.offsets)
        found.append((number, cell, source.slices, target.slices))
    return tuple(found)


def _cells_over(array: ArrayEntry, part: Box) -> Iterable[tuple[int, Box]]:
    """The array's cells that intersect `part`, with their numbers in C order."""
    axes = [
        range((o - z) // c, (o - z + n - 1) // c + 1)
        for o, n, z, c in zip(part.offsets, part.shape, array.offset, array.chunk, strict=True)
    ]
    grid = array.grid
    for index in itertools.product(*axes):
        number = 0
        for i, n in zip(index, grid, strict=True):
            number = number * n + i
        offsets = tuple(z + i * c for z, i, c in zip(array.offset, index, array.chunk, strict=True))
        shape = tuple(
            min(c, z + n - o)
            for o, c, z, n in zip(offsets, array.chunk, array.offset, array.shape, strict=True)
        )
        yield number, Box(offsets, shape)


def coalesced(chunks: Iterable[S], limit: int) -> Iterator[list[S]]:
    """Chunks, in the order of packs and places, grouped into requests of about `limit` bytes.

    Neighbours of one pack are read together; a chunk that is larger than the limit is on its own.
    """
    group: list[S] = []
    for chunk in chunks:
        end = chunk.offset + chunk.nbytes
        if group and not (
            group[-1].pack == chunk.pack
            and chunk.offset - (group[-1].offset + group[-1].nbytes) <= REQUEST_GAP
            and end - group[0].offset <= limit
        ):
            yield group
            group = []
        group.append(chunk)
    if group:
        yield group


def describe(manifest: Manifest, row: int) -> str:
    """The chunk of this row in words: tensor, box, pack and place."""
    first = manifest.first_chunks()
    number = int(np.searchsorted(first, row, side="right")) - 1
    tensor, array = manifest.arrays[number]
    cell = array.cell(row - int(first[number]))
    pack, offset = manifest.chunks.pack[row], manifest.chunks.offset[row]
    return (
        f"the chunk of {tensor.name!r} at {list(cell.offsets)}, shape {list(cell.shape)} "
        f"(pack {manifest.packs[pack].path}, byte {offset})"
    )
