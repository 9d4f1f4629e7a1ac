"""Which ranks hold which boxes of a tensor, as columns, and how the boxes are cut into chunks.

Tensors of one shape that are split in one way have one `Holders`, and if they are of one type, one `ChunkGrid`.
A model with a thousand tensors has ten or twenty of each, so the arithmetic here is done a few times only, each
time for all ranks at once.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shardckpt.errors import RankMismatchError
from shardckpt.format.box import Box, pieces_of_splits, tiles
from shardckpt.format.dtypes import itemsize
from shardckpt.format.layouts import Layout
from shardckpt.format.manifest import ArrayEntry, TensorEntry

__all__ = [
    "MAX_CHUNK",
    "ChunkGrid",
    "Holders",
    "Holding",
    "holders_of",
    "looks_whole",
    "ranks_with_elements",
    "sole_holders",
]

MAX_CHUNK = 16 << 20
"""Bytes above which a box is cut along its first dimension, if that keeps the grid regular.

Small enough that a rank of another world size reads few bytes that it does not need, and large enough for one
storage request per chunk.
"""

Ints = npt.NDArray[np.int64]
Ranks = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Holding:
    """What ranks that are alike hold of one tensor.

    Attributes:
        ranks: these ranks, ascending.
        layout: what each of them holds.
        coordinates: of each rank of the world in the layout's mesh; None without a mesh.
    """

    ranks: Ranks
    layout: Layout
    coordinates: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, eq=False)
class Holders:
    """The boxes of a tensor, and the ranks that hold each.

    Attributes:
        shape: the tensor's shape.
        grid: the shape of the cells of a regular grid, each of which is a box; None if there is no such grid.
        boxes: the boxes in order, where there is no grid. With one, they are its cells in C order.
        ranks: the holders of each box, ascending, one box after another.
        starts: by box, where its holders begin in `ranks`; then the number of all of them.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...] | None
    boxes: tuple[Box, ...]
    ranks: Ranks
    starts: Ints

    @cached_property
    def counts(self) -> Ints:
        """By box, the number of its holders."""
        return np.diff(self.starts)

    @cached_property
    def several(self) -> Ints:
        """The boxes that more than one rank holds."""
        return np.flatnonzero(self.counts > 1)

    @cached_property
    def table(self) -> Ranks:
        """A row of holders for each of `several`, filled up with -1."""
        counts = self.counts[self.several]
        width = int(counts.max(initial=0))
        column = np.arange(width)
        places = self.starts[self.several][:, None] + column
        return np.where(
            column < counts[:, None], self.ranks[np.minimum(places, len(self.ranks) - 1)], np.int32(-1)
        )

    @cached_property
    def are_disjoint(self) -> bool:
        """True if no rank holds two boxes that have several holders."""
        held = np.sort(self.table[self.table >= 0])
        return not (held[1:] == held[:-1]).any()  # np.unique would import numpy.ma, for 20 ms

    def box(self, number: int) -> Box:
        """The box of this number."""
        return (
            self.boxes[number]
            if self.grid is None
            else ArrayEntry((0,) * len(self.shape), self.shape, self.grid).cell(number)
        )

    def of(self, number: int) -> tuple[int, ...]:
        """The holders of a box, ascending."""
        return tuple(self.ranks[self.starts[number] : self.starts[number + 1]].tolist())

    def held_by(self, rank: int) -> list[int]:
        """The boxes that a rank holds."""
        places = np.flatnonzero(self.ranks == rank)
        return [int(box) for box in np.searchsorted(self.starts, places, side="right") - 1]

    def equals(self, other: Holders) -> bool:
        """True if the same ranks hold the same boxes of a tensor of the same shape."""
        return self is other or (
            (self.shape, self.grid, self.boxes) == (other.shape, other.grid, other.boxes)
            and np.array_equal(self.starts, other.starts)
            and np.array_equal(self.ranks, other.ranks)
        )


def sole_holders(shape: tuple[int, ...], rank: int) -> Holders:
    """The holders of a tensor that one rank holds whole. It must have elements."""
    return Holders(shape, shape, (), np.array([rank], dtype=np.int32), np.array([0, 1]))


def holders_of(name: str, shape: tuple[int, ...], held: Sequence[Holding], *, first_only: bool) -> Holders:
    """Find out who holds what of a tensor.

    Args:
        name: the tensor's name, for messages.
        shape: its shape.
        held: what ranks hold of it.
        first_only: True to count only the lowest of the ranks that hold a box.

    Raises RankMismatchError unless the ranks' boxes cover each element once, where equal boxes count as one.
    """
    parts = [_boxes(part, shape) for part in held]
    rank, offset, extent = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    found = _on_grid(shape, rank, offset, extent)
    if found is None:
        found = _off_grid(name, shape, rank, offset, extent)
    if first_only and len(found.several):
        count = len(found.starts) - 1
        return Holders(shape, found.grid, found.boxes, found.ranks[found.starts[:-1]], np.arange(count + 1))
    return found


def ranks_with_elements(part: Holding, /) -> Ranks:
    """The ranks that hold an element, each once or more often."""
    return _boxes(part, part.layout.shape)[0]


def _boxes(part: Holding, shape: tuple[int, ...]) -> tuple[Ranks, Ints, Ints]:
    """(rank, offsets, shape) of every box with elements, as columns."""
    ranks, layout, size = part.ranks, part.layout, len(shape)
    if part.coordinates is None:
        boxes = [box for box in layout.boxes if box.volume]
        offsets = np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), size)
        shapes = np.array([box.shape for box in boxes], dtype=np.int64).reshape(len(boxes), size)
        times = (len(ranks), 1)
        return np.repeat(ranks, len(boxes)), np.tile(offsets, times), np.tile(shapes, times)
    place = part.coordinates[ranks]
    is_inside = place[:, 0] >= 0
    ranks, place = ranks[is_inside], place[is_inside]
    if any(split.factor != 1 for split in layout.splits):
        return _strided_boxes(ranks, place, layout)
    start = np.zeros((len(ranks), size), dtype=np.int64)
    stop = np.tile(np.array(shape, dtype=np.int64), (len(ranks), 1))
    for dim, pieces, axis, _ in layout.splits:
        length = stop[:, dim] - start[:, dim]
        step = -(-length // pieces)
        low = np.minimum(step * place[:, axis], length)
        stop[:, dim] = start[:, dim] + np.minimum(low + step, length)
        start[:, dim] += low
    has_elements = (stop > start).all(axis=1)
    start = start[has_elements]
    return ranks[has_elements], start, stop[has_elements] - start


def _strided_boxes(ranks: Ranks, place: npt.NDArray[np.int32], layout: Layout) -> tuple[Ranks, Ints, Ints]:
    """As `_boxes`, for splits that give a rank several boxes: one rank after another."""
    held: list[tuple[int, Box]] = []
    for rank, own in zip(ranks.tolist(), place.tolist(), strict=True):
        splits = tuple((dim, parts, own[axis], factor) for dim, parts, axis, factor in layout.splits)
        held += [(rank, piece.box) for piece in pieces_of_splits(layout.shape, splits)]
    size = (len(held), len(layout.shape))
    offsets = np.array([box.offsets for _, box in held], dtype=np.int64).reshape(size)
    shapes = np.array([box.shape for _, box in held], dtype=np.int64).reshape(size)
    return np.array([rank for rank, _ in held], dtype=np.int32), offsets, shapes


def _on_grid(shape: tuple[int, ...], rank: Ranks, offset: Ints, extent: Ints) -> Holders | None:
    """The holders of boxes that are all the cells of a regular grid; None if they are not."""
    if not len(rank):
        if math.prod(shape):
            return None
        return Holders(shape, tuple(max(1, n) for n in shape), (), rank, np.zeros(1, dtype=np.int64))
    cell = extent.max(axis=0)
    counts = [-(-n // c) for n, c in zip(shape, cell.tolist(), strict=True)]
    total = math.prod(counts)
    if total > len(rank):
        return None  # some cells are in no box
    whole = np.array(shape, dtype=np.int64)
    if (offset % cell).any() or (extent != np.minimum(cell, whole - offset)).any():
        return None
    number = np.zeros(len(rank), dtype=np.int64)
    for dim, count in enumerate(counts):
        number = number * count + offset[:, dim] // cell[dim]
    per_cell = np.bincount(number, minlength=total)
    if not per_cell.all():
        return None
    order = np.lexsort((rank, number))
    starts = np.concatenate([[0], np.cumsum(per_cell)])
    return Holders(shape, tuple(cell.tolist()), (), rank[order], starts)


def _off_grid(name: str, shape: tuple[int, ...], rank: Ranks, offset: Ints, extent: Ints) -> Holders:
    """The holders of any other boxes. Raises RankMismatchError unless they cover each element once."""
    order = np.argsort(rank, kind="stable")
    holders: dict[Box, list[int]] = {}
    for number, offsets, lengths in zip(
        rank[order].tolist(), offset[order].tolist(), extent[order].tolist(), strict=True
    ):
        holders.setdefault(Box(tuple(offsets), tuple(lengths)), []).append(number)
    _check_tiling(name, shape, holders)
    boxes = tuple(sorted(holders))
    ranks = [holders[box] for box in boxes]
    starts = np.cumsum([0, *map(len, ranks)])
    return Holders(shape, None, boxes, np.array([*itertools.chain(*ranks)], dtype=np.int32), starts)


def _check_tiling(name: str, shape: tuple[int, ...], holders: dict[Box, list[int]]) -> None:
    """Raise RankMismatchError unless the boxes cover each element once."""
    if tiles(shape, list(holders)):
        return
    total = math.prod(shape)
    found = sum(box.volume for box in holders)
    places = "; ".join(
        f"rank {','.join(map(str, ranks))}: {list(box.offsets)} + {list(box.shape)}"
        for box, ranks in itertools.islice(holders.items(), 4)
    )
    raise RankMismatchError(
        f"state[{name!r}] of shape {list(shape)} has {total} elements, but the ranks' boxes have "
        f"{found}, or overlap in part ({places}{'; ...' if len(holders) > 4 else ''}). Every rank "
        "of the world must pass its shard, in one layout."
    )


@dataclass(frozen=True, eq=False)
class ChunkGrid:
    """How a tensor is cut into chunks. Its rows are its part of the chunk table.

    Attributes:
        dtype: the name of the tensor's element type.
        holders: of the tensor's boxes, none of which a chunk crosses.
        arrays: the tensor's Zarr arrays: one over the grid, or one for each box.
    """

    dtype: str
    holders: Holders
    arrays: tuple[ArrayEntry, ...]
    _known: dict[int, tuple[Box, tuple[int, ...], int]] = field(default_factory=dict)

    @classmethod
    def of(cls, dtype: str, holders: Holders) -> ChunkGrid:
        """Cut boxes of this element type."""
        size = itemsize(dtype)
        if holders.grid is not None:
            chunk = _cut(holders.grid, holders.shape, size)
            return cls(dtype, holders, (ArrayEntry((0,) * len(holders.shape), holders.shape, chunk),))
        arrays = (ArrayEntry(b.offsets, b.shape, _cut(b.shape, b.shape, size)) for b in holders.boxes)
        return cls(dtype, holders, tuple(arrays))

    @cached_property
    def first_rows(self) -> list[int]:
        """The first row of each array, then the number of all rows."""
        return [*itertools.accumulate((math.prod(array.grid) for array in self.arrays), initial=0)]

    @property
    def rows(self) -> int:
        """Number of chunks."""
        return self.first_rows[-1]

    @cached_property
    def array_bytes(self) -> list[int]:
        """By array, bytes of a chunk's elements, padding included."""
        return [math.prod(array.chunk) * itemsize(self.dtype) for array in self.arrays]

    @cached_property
    def nbytes(self) -> Ints:
        """By row, bytes of the chunk's elements, padding included."""
        return np.repeat(np.array(self.array_bytes, dtype=np.int64), np.diff(self.first_rows))

    @cached_property
    def box_of_row(self) -> Ints:
        """By row, the number of the box that the chunk lies in."""
        if self.holders.grid is None:
            return np.repeat(np.arange(len(self.arrays)), np.diff(self.first_rows))
        (array,) = self.arrays
        if array.chunk == self.holders.grid or not array.shape:
            return np.arange(self.rows)
        across = math.prod(array.grid[1:])
        first = np.arange(array.grid[0]) * array.chunk[0] // self.holders.grid[0]
        return (first[:, None] * across + np.arange(across)).reshape(-1)

    @cached_property
    def sole_writers(self) -> Ranks:
        """By row, the only rank that holds its box; any of them where there are several."""
        return self.holders.ranks[self.holders.starts[:-1]][self.box_of_row]

    def chunk(self, row: int) -> tuple[Box, tuple[int, ...], int]:
        """The part of the tensor that a chunk holds, and the chunk's shape and bytes, padding included."""
        if (known := self._known.get(row)) is None:
            number = bisect.bisect_right(self.first_rows, row) - 1
            array, nbytes = self.arrays[number], self.array_bytes[number]
            known = self._known[row] = array.cell(row - self.first_rows[number]), array.chunk, nbytes
        return known


def _cut(box: tuple[int, ...], shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The chunk shape for boxes of shape `box` in an array of this shape: at most MAX_CHUNK bytes if possible."""
    if not box or math.prod(box) * size <= MAX_CHUNK or box[0] == 1:
        return box
    rows = max(1, MAX_CHUNK // (math.prod(box[1:]) * size))
    if box[0] >= shape[0]:  # one box along the first dimension: any cut makes a regular grid
        pieces = -(-box[0] // rows)
        return (-(-box[0] // pieces), *box[1:])
    divisor = next(n for n in range(min(rows, box[0]), 0, -1) if box[0] % n == 0)
    return (divisor, *box[1:]) if divisor * 8 >= rows else box


def looks_whole(tensor: TensorEntry) -> bool:
    """True if the tensor is stored as one that each rank held whole. Large shards may be stored so, too."""
    grid = tuple(max(1, n) for n in tensor.shape)
    return tensor.is_array and tensor.arrays[0].chunk == _cut(grid, tensor.shape, itemsize(tensor.dtype))
