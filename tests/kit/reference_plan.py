"""The planner as it was before it worked on columns: one Python object per chunk, and no arithmetic to get wrong.

What `shardckpt.format.save_plan` computes is compared with it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardckpt.errors import RankMismatchError
from shardckpt.format.box import Box, tiles
from shardckpt.format.chunks import CRC_BYTES, ChunkLocation, chunk_bytes, content_bytes
from shardckpt.format.dtypes import itemsize
from shardckpt.format.holders import MAX_CHUNK
from shardckpt.format.layouts import Layout
from shardckpt.format.manifest import ArrayEntry, TensorEntry
from shardckpt.format.save_plan import ChunkWrite

__all__ = ["ReferencePlan", "reference_plan"]


@dataclass(frozen=True)
class ReferencePlan:
    """As SavePlan: `same_as` is by row, `replicas` are (ranks, boxes), `writes` are by rank."""

    tensors: tuple[TensorEntry, ...]
    writer: list[int]
    offset: list[int]
    pack_sizes: list[int]
    same_as: dict[int, int]
    replicas: list[tuple[tuple[int, ...], tuple[tuple[str, Box], ...]]]
    writes: list[list[ChunkWrite]]


def reference_plan(layouts: Sequence[Sequence[Layout]]) -> ReferencePlan:
    """Plan a save of ranks that hold these boxes."""
    merged = _merge(layouts)
    tensors: list[TensorEntry] = []
    rows: list[_Row] = []
    shared: dict[tuple[int, ...], list[tuple[str, Box]]] = defaultdict(list)
    aliases: list[tuple[int, str]] = []
    first_row: dict[str, int] = {}
    for name, tensor in merged.items():
        arrays = _arrays(tensor)
        tensors.append(TensorEntry(name, tensor.dtype, tensor.shape, arrays))
        first_row[name] = len(rows)
        if tensor.alias is not None:
            aliases.append((len(tensors) - 1, tensor.alias))
        elif not tensor.first_holder:
            for box, ranks in tensor.holders.items():
                if len(ranks) > 1:
                    shared[tuple(ranks)].append((name, box))
        for array in arrays:
            for cell in array.cells():
                rows.append(_Row(len(tensors) - 1, array, cell, _holders_of(cell, tensor)))

    same_as = {}
    for index, alias in aliases:
        count = sum(math.prod(a.grid) for a in tensors[index].arrays)
        start = first_row[tensors[index].name]
        same_as.update({start + i: first_row[alias] + i for i in range(count)})
    writer = _spread(rows, tensors, same_as, len(layouts))
    offset, sizes, writes = _pack(rows, tensors, same_as, writer, len(layouts))
    return ReferencePlan(
        tensors=tuple(tensors),
        writer=writer,
        offset=offset,
        pack_sizes=sizes,
        same_as=same_as,
        replicas=[(ranks, tuple(boxes)) for ranks, boxes in shared.items()],
        writes=writes,
    )


@dataclass
class _MergedTensor:
    """One tensor over all ranks."""

    dtype: str
    shape: tuple[int, ...]
    first_rank: int
    alias: str | None
    first_holder: bool
    holders: dict[Box, list[int]]
    grid: tuple[int, ...] | None = None


class _Row(NamedTuple):
    """One row of the chunk table: number of its tensor, its array, the part of the tensor, and who holds it."""

    tensor: int
    array: ArrayEntry
    cell: Box
    holders: Sequence[int]


def _merge(layouts: Sequence[Sequence[Layout]]) -> dict[str, _MergedTensor]:
    """The layouts of all ranks by tensor name. Raises RankMismatchError if they do not fit together."""
    merged: dict[str, _MergedTensor] = {}
    for rank, layout in enumerate(layouts):
        for item in layout:
            boxes = [box for box in item.boxes if box.volume]
            tensor = merged.get(item.name)
            if tensor is None:
                tensor = merged[item.name] = _MergedTensor(
                    item.dtype, item.shape, rank, item.alias, item.first_holder, {}
                )
            elif (tensor.dtype, tensor.shape) != (item.dtype, item.shape):
                raise RankMismatchError(
                    f"state[{item.name!r}] is {tensor.dtype} of shape {list(tensor.shape)} on rank "
                    f"{tensor.first_rank} and {item.dtype} of shape {list(item.shape)} on rank {rank}. "
                    "Wrap values that every rank has its own of in shardckpt.PerRank."
                )
            if boxes:
                if tensor.holders and tensor.alias != item.alias:
                    tensor.alias = None
                elif not tensor.holders:
                    tensor.alias = item.alias
            for box in boxes:
                tensor.holders.setdefault(box, []).append(rank)
    for name, tensor in merged.items():
        tensor.grid = _grid(tensor.shape, list(tensor.holders))
        if tensor.grid is None or len(tensor.holders) != _count_cells(tensor.shape, tensor.grid):
            _check_tiling(name, tensor)
        if tensor.first_holder:
            tensor.holders = {box: ranks[:1] for box, ranks in tensor.holders.items()}
    for tensor in merged.values():
        other = merged.get(tensor.alias) if tensor.alias is not None else None
        same = other is not None and (other.dtype, other.shape, other.holders) == (
            tensor.dtype,
            tensor.shape,
            tensor.holders,
        )
        if other is None or other.alias is not None or not same:
            tensor.alias = None
    return merged


def _check_tiling(name: str, tensor: _MergedTensor) -> None:
    """Raise RankMismatchError unless the boxes of all ranks cover each element once."""
    if tiles(tensor.shape, list(tensor.holders)):
        return
    total = math.prod(tensor.shape)
    found = sum(box.volume for box in tensor.holders)
    places = "; ".join(
        f"rank {','.join(map(str, ranks))}: {list(box.offsets)} + {list(box.shape)}"
        for box, ranks in itertools.islice(tensor.holders.items(), 4)
    )
    raise RankMismatchError(
        f"state[{name!r}] of shape {list(tensor.shape)} has {total} elements, but the ranks' boxes have "
        f"{found}, or overlap in part ({places}{'; ...' if len(tensor.holders) > 4 else ''}). Every rank "
        "of the world must pass its shard, in one layout."
    )


def _grid(shape: tuple[int, ...], boxes: Sequence[Box]) -> tuple[int, ...] | None:
    """The chunk shape of a regular grid of which each box is a cell; None if there is none."""
    if not boxes:
        return tuple(max(1, n) for n in shape)
    chunk = tuple(max(box.shape[d] for box in boxes) for d in range(len(shape)))
    for box in boxes:
        for o, n, c, size in zip(box.offsets, box.shape, chunk, shape, strict=True):
            if o % c or n != min(c, size - o):
                return None
    return chunk


def _count_cells(shape: tuple[int, ...], grid: tuple[int, ...]) -> int:
    return math.prod(-(-n // c) for n, c in zip(shape, grid, strict=True))


def _arrays(tensor: _MergedTensor) -> tuple[ArrayEntry, ...]:
    """The tensor's Zarr arrays: one over the grid, or one for each box."""
    size = itemsize(tensor.dtype)
    if tensor.grid is not None:
        chunk = _cut(tensor.grid, tensor.shape, size)
        return (ArrayEntry((0,) * len(tensor.shape), tensor.shape, chunk),)
    return tuple(
        ArrayEntry(box.offsets, box.shape, _cut(box.shape, box.shape, size))
        for box in sorted(tensor.holders)
    )


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


def _holders_of(cell: Box, tensor: _MergedTensor) -> Sequence[int]:
    """The ranks that hold a cell; it lies in exactly one of the tensor's boxes."""
    if tensor.grid is not None:
        offsets = tuple(o - o % c for o, c in zip(cell.offsets, tensor.grid, strict=True))
        shape = tuple(min(c, n - o) for o, c, n in zip(offsets, tensor.grid, tensor.shape, strict=True))
        return tensor.holders[Box(offsets, shape)]
    return next(ranks for box, ranks in tensor.holders.items() if box.intersect(cell) is not None)


def _spread(
    rows: Sequence[_Row], tensors: Sequence[TensorEntry], same_as: dict[int, int], world: int
) -> list[int]:
    """By row, the rank that writes it: of its holders the one with the least to write, large chunks first."""
    load = [0] * world
    writer = [0] * len(rows)
    several = []
    for number, row in enumerate(rows):
        if number in same_as:
            continue
        nbytes = chunk_bytes(tensors[row.tensor].dtype, row.array.chunk)
        if len(row.holders) == 1:
            writer[number] = row.holders[0]
            load[row.holders[0]] += nbytes
        else:
            several.append((-nbytes, number))
    for nbytes, number in sorted(several):
        rank = min(rows[number].holders, key=lambda holder: (load[holder], holder))
        writer[number] = rank
        load[rank] -= nbytes
    for number, source in same_as.items():
        writer[number] = writer[source]
    return writer


def _pack(
    rows: Sequence[_Row],
    tensors: Sequence[TensorEntry],
    same_as: dict[int, int],
    writer: Sequence[int],
    world: int,
) -> tuple[list[int], list[int], list[list[ChunkWrite]]]:
    """By row, its offset in its pack; by rank, the size of its pack, and its writes."""
    offset = [0] * len(rows)
    sizes = [0] * world
    writes: list[list[ChunkWrite]] = [[] for _ in range(world)]
    for number, row in enumerate(rows):
        if number in same_as:
            continue
        rank, tensor = writer[number], tensors[row.tensor]
        nbytes = content_bytes(tensor.dtype, row.array.chunk)
        align = 4096 if nbytes >= 1 << 20 else 64
        offset[number] = -(-sizes[rank] // align) * align
        sizes[rank] = offset[number] + nbytes + CRC_BYTES
        location = ChunkLocation(number, offset[number], nbytes)
        writes[rank].append(ChunkWrite(location, tensor.name, tensor.dtype, row.cell, row.array.chunk))
    for number, source in same_as.items():
        offset[number] = offset[source]
    return offset, sizes, writes
