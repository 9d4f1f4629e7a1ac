"""Who reads what: a pure function from the boxes that are wanted to the chunks that cover them.

No I/O, no clock, no torch.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from shardckpt.box import Box
from shardckpt.dtypes import itemsize
from shardckpt.manifest import Array, Manifest, Tensor

__all__ = ["ChunkIndex", "Copy", "Read", "index_chunks", "plan_reads"]


class Copy(NamedTuple):
    """A part of a chunk, and the part of a wanted box that it fills; slices in their own coordinates."""

    wanted: int
    source: tuple[slice, ...]
    target: tuple[slice, ...]


class Read(NamedTuple):
    """One chunk to fetch and verify, and where its content goes."""

    row: int
    tensor: Tensor
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

    def describe(self, manifest: Manifest) -> str:
        """The chunk in words: tensor, box, pack and place."""
        return (
            f"the chunk of {self.tensor.name!r} at {list(self.cell.offsets)}, shape "
            f"{list(self.cell.shape)} (pack {manifest.packs[self.pack].path}, byte {self.offset})"
        )


ChunkIndex = Mapping[str, tuple[Tensor, Sequence[int]]]
"""Tensor name -> the tensor, and for each of its arrays the number of its first chunk."""


def index_chunks(manifest: Manifest) -> ChunkIndex:
    """Where each tensor's chunks are in the chunk table. For many small reads, make it once."""
    first = manifest.first_chunks().tolist()
    index: dict[str, tuple[Tensor, Sequence[int]]] = {}
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
    chunks: dict[int, tuple[Tensor, Box, tuple[int, ...]]] = {}
    for number, (name, box) in enumerate(wanted):
        tensor, starts = index[name]
        for array, start in zip(tensor.arrays, starts, strict=True):
            if (part := box.intersect(array.box)) is None:
                continue
            for cell_number, cell in _cells_over(array, part):
                overlap = cell.intersect(box)
                assert overlap is not None
                row = start + cell_number
                chunks[row] = (tensor, cell, array.chunk)
                copies[row].append(
                    Copy(
                        number,
                        overlap.relative_to(cell.offsets).slices,
                        overlap.relative_to(box.offsets).slices,
                    )
                )
    table = manifest.chunks
    reads = [
        Read(row, *chunks[row], table.pack[row], table.offset[row], table.crc32c[row], tuple(copies[row]))
        for row in chunks
    ]
    return sorted(reads, key=lambda read: (read.pack, read.offset, read.row))


def _cells_over(array: Array, part: Box) -> Iterable[tuple[int, Box]]:
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
