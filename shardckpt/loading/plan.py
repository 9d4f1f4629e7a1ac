"""Plan a load: from the boxes that are wanted to the chunks that cover them.

Pure: no I/O, no clock, no torch.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from shardckpt.format.box import Box
from shardckpt.format.chunks import StoredChunk, content_bytes
from shardckpt.format.manifest import ArrayEntry, Manifest, TensorEntry

__all__ = [
    "REQUEST_GAP",
    "ChunkIndex",
    "ChunkRead",
    "Copy",
    "coalesced",
    "describe",
    "index_chunks",
    "plan_reads",
]

REQUEST_GAP = 64 << 10
"""Bytes between two chunks up to which both are read in one request, which costs less than a second request."""


class Copy(NamedTuple):
    """A part of a chunk and the part of a wanted box that it fills.

    Attributes:
        wanted: number of the box in the list of wanted boxes.
        source: selects the part from the chunk.
        target: selects it from the box.
    """

    wanted: int
    source: tuple[slice, ...]
    target: tuple[slice, ...]


class ChunkRead(NamedTuple):
    """One chunk to fetch and verify, and where its content goes.

    Attributes:
        stored: where the chunk lies.
        tensor: the entry of its tensor.
        cell: the part of the tensor that it holds.
        chunk: the chunk's shape; larger than the cell where the chunk is padded.
        copies: what of it is wanted.
    """

    stored: StoredChunk
    tensor: TensorEntry
    cell: Box
    chunk: tuple[int, ...]
    copies: tuple[Copy, ...]


ChunkIndex = Mapping[str, tuple[TensorEntry, Sequence[int]]]
"""Tensor name -> the tensor's entry, and the first row of each of its arrays in the chunk table."""


def index_chunks(manifest: Manifest) -> ChunkIndex:
    """Find each tensor's rows in the chunk table. Make it once where many small reads are planned."""
    first = manifest.first_rows.tolist()
    index: dict[str, tuple[TensorEntry, Sequence[int]]] = {}
    arrays = 0
    for tensor in manifest.tensors:
        index[tensor.name] = (tensor, first[arrays : arrays + len(tensor.arrays)])
        arrays += len(tensor.arrays)
    return index


def plan_reads(
    manifest: Manifest, wanted: Sequence[tuple[str, Box]], index: ChunkIndex | None = None
) -> list[ChunkRead]:
    """The chunks that cover the wanted boxes, each row once, in the order of packs and offsets.

    Args:
        manifest: of the checkpoint.
        wanted: (tensor name, box) pairs; a box is in the tensor's coordinates and lies inside the tensor.
        index: what `index_chunks` returns for this manifest; None: it is made.

    Raises KeyError for a name that the checkpoint does not have.
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
    rows = np.fromiter(chunks, dtype=np.int64, count=len(chunks))
    columns = (table.pack[rows].tolist(), table.offset[rows].tolist(), table.crc32c[rows].tolist())
    reads = []
    for (row, (tensor, cell, chunk)), pack, offset, checksum in zip(chunks.items(), *columns, strict=True):
        stored = StoredChunk(pack, offset, row, content_bytes(tensor.dtype, chunk), checksum)
        reads.append(ChunkRead(stored, tensor, cell, chunk, tuple(copies[row])))
    return sorted(reads, key=attrgetter("stored"))


Slices = tuple[slice, ...]


@lru_cache(maxsize=1 << 14)
def _covering(array: ArrayEntry, box: Box) -> tuple[tuple[int, Box, Slices, Slices], ...]:
    """The array's cells that a box needs: (number, cell, slices of the cell, slices of the box).

    Cached, since the layers of a model are alike: most calls of a load repeat an earlier one.
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
    """The array's cells that intersect `part`, each with its number in C order."""
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


def coalesced(chunks: Iterable[StoredChunk], limit: int) -> Iterator[list[StoredChunk]]:
    """Group chunks into requests of up to `limit` bytes each.

    `chunks` come in the order of packs and offsets. Chunks of one pack with at most REQUEST_GAP bytes between
    them are read together; a chunk of more than `limit` bytes is a group of its own.
    """
    group: list[StoredChunk] = []
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
    """The chunk of this row of the chunk table in words: its tensor, box, pack and offset."""
    first = manifest.first_rows
    number = int(np.searchsorted(first, row, side="right")) - 1
    tensor, array = manifest.arrays[number]
    cell = array.cell(row - int(first[number]))
    pack, offset = int(manifest.chunks.pack[row]), int(manifest.chunks.offset[row])
    return (
        f"the chunk of {tensor.name!r} at {list(cell.offsets)}, shape {list(cell.shape)} "
        f"(pack {manifest.packs[pack].path}, byte {offset})"
    )
