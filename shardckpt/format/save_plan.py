"""Plan a save: from the layouts of all ranks to what each rank writes where.

Pure: every rank computes the same plan from the same layouts, so that the plan itself is never sent. No I/O, no
clock, no torch. Chunks are rows of columns; Python objects are made of the chunks of one rank only.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from shardckpt.errors import FormatError
from shardckpt.format.box import Box
from shardckpt.format.chunks import CRC_BYTES, ChunkLocation
from shardckpt.format.holders import ChunkGrid
from shardckpt.format.layouts import Layout, WorldLayout
from shardckpt.format.manifest import TensorEntry
from shardckpt.format.merged_layouts import MergedTensor, merge
from shardckpt.format.packing import pack_offsets, spread

__all__ = ["ChunkWrite", "SavePlan", "SharedBoxes", "decode_plan", "encode_plan", "plan_save"]


class ChunkWrite(NamedTuple):
    """One chunk that a rank writes.

    Attributes:
        location: where it goes in the rank's pack.
        name: the tensor's name.
        dtype: the name of the tensor's element type.
        box: the part of the tensor that the chunk holds.
        chunk: the chunk's shape; larger than the box where the chunk is padded.
    """

    location: ChunkLocation
    name: str
    dtype: str
    box: Box
    chunk: tuple[int, ...]


class SharedBoxes(NamedTuple):
    """Boxes that the same ranks hold, which must be equal on all of them.

    Attributes:
        holders: these ranks, ascending.
        boxes: (tensor name, box) of each.
    """

    holders: tuple[int, ...]
    boxes: tuple[tuple[str, Box], ...]


@dataclass(frozen=True, eq=False)
class SavePlan:
    """What each rank writes where. The same on every rank.

    What concerns all ranks is computed when it is asked for: only the process that commits needs `offset` and
    `pack_sizes`.

    Attributes:
        world: the layouts that it is a plan for.
        tensors: the tensors of the manifest.
        writer: by row of the chunk table, the rank that writes it. Read-only, as all columns are.
        same_as: number of a tied tensor -> the number of the tensor whose chunks it shares.
    """

    world: WorldLayout
    tensors: tuple[TensorEntry, ...]
    writer: npt.NDArray[np.int32]
    same_as: dict[int, int]
    _merged: Sequence[MergedTensor]
    _grids: Sequence[ChunkGrid]
    _first_rows: npt.NDArray[np.int64]
    """By tensor, its first row; then the number of rows."""
    _written: dict[int, tuple[ChunkWrite, ...]] = field(default_factory=dict)
    """What `writes` has returned last."""

    @cached_property
    def offset(self) -> npt.NDArray[np.int64]:
        """By row, the chunk's first byte in its pack."""
        return self._table[0]

    @cached_property
    def pack_sizes(self) -> tuple[int, ...]:
        """By rank, bytes of its pack."""
        return tuple(self._table[1].tolist())

    @cached_property
    def tied_rows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The rows of tied tensors, and of each the row whose chunk it shares."""
        first = self._first_rows
        rows = [np.arange(first[tied], first[tied + 1]) for tied in self.same_as]
        sources = [
            np.arange(first[source], first[source] + len(own))
            for source, own in zip(self.same_as.values(), rows, strict=True)
        ]
        none = [np.zeros(0, dtype=np.int64)]
        return np.concatenate(none + rows), np.concatenate(none + sources)

    def writes(self, rank: int) -> tuple[ChunkWrite, ...]:
        """The chunks that `rank` writes, in the order of its pack."""
        if rank not in self._written:
            self._written.clear()
            self._written[rank] = self._writes(rank)
        return self._written[rank]

    def locations(self, rank: int) -> list[ChunkLocation]:
        """Where these chunks lie in the rank's pack, in the same order."""
        return [write.location for write in self.writes(rank)]

    def pack_size(self, rank: int) -> int:
        """Bytes of the rank's pack."""
        writes = self.writes(rank)
        return writes[-1].location.offset + writes[-1].location.nbytes + CRC_BYTES if writes else 0

    @cached_property
    def has_shared(self) -> bool:
        """True if any ranks hold the same boxes, which must be equal on all of them."""
        return any(map(self._is_shared, range(len(self._merged))))

    def shared_by(self, rank: int) -> list[SharedBoxes]:
        """What the rank holds and others, too, by the set of ranks that hold it."""
        found: defaultdict[tuple[int, ...], list[tuple[str, Box]]] = defaultdict(list)
        known: dict[int, list[tuple[tuple[int, ...], Box]]] = {}
        for number, tensor in enumerate(self._merged):
            if not self._is_shared(number):
                continue
            holders = tensor.holders
            if (shared := known.get(id(holders))) is None:
                held = [box for box in holders.held_by(rank) if holders.counts[box] > 1]
                shared = known[id(holders)] = [(holders.of(box), holders.box(box)) for box in held]
            for ranks, box in shared:
                found[ranks].append((tensor.name, box))
        return [SharedBoxes(ranks, tuple(boxes)) for ranks, boxes in found.items()]

    def _is_shared(self, number: int) -> bool:
        tensor = self._merged[number]
        return number not in self.same_as and not tensor.first_holder and len(tensor.holders.several) > 0

    @cached_property
    def fingerprint(self) -> int:
        """A 62-bit hash of the plan, by which ranks find out whether they have the same one."""
        digest = hashlib.blake2b(self.world.encode(), digest_size=8)
        digest.update(self.writer.data)
        return int.from_bytes(digest.digest(), "big") >> 2

    def _writes(self, rank: int) -> tuple[ChunkWrite, ...]:
        rows = np.flatnonzero(self.writer == rank)
        if self.same_as:
            rows = rows[~np.isin(rows, self.tied_rows[0])]
        numbers = np.searchsorted(self._first_rows, rows, side="right") - 1
        in_tensor = (rows - self._first_rows[numbers]).tolist()
        chunks = [
            (self.tensors[number], *self._grids[number].chunk(row))
            for number, row in zip(numbers.tolist(), in_tensor, strict=True)
        ]
        nbytes = np.array([size for *_, size in chunks], dtype=np.int64)
        offset = pack_offsets(nbytes, np.zeros(min(1, len(rows)), dtype=np.int64))
        return tuple(
            ChunkWrite(ChunkLocation(row, start, size), tensor.name, tensor.dtype, box, shape)
            for row, start, (tensor, box, shape, size) in zip(
                rows.tolist(), offset.tolist(), chunks, strict=True
            )
        )

    @cached_property
    def rows_by_rank(self) -> npt.NDArray[np.int64]:
        """The rows that ranks write: those of rank 0 in the order of its pack, then those of rank 1, ..."""
        writer = self.writer.astype(np.uint16) if self.world.size <= 1 << 16 else self.writer
        if not self.same_as:
            return np.argsort(writer, kind="stable")  # quicker for 16 bits
        rows = np.delete(np.arange(len(writer)), self.tied_rows[0])
        return rows[np.argsort(writer[rows], kind="stable")]

    @cached_property
    def _table(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """By row, its offset; by rank, the size of its pack."""
        size = self.world.size
        nbytes = np.concatenate([np.zeros(0, dtype=np.int64), *(grid.nbytes for grid in self._grids)])
        order = self.rows_by_rank
        counts = np.bincount(self.writer[order], minlength=size)
        starts = (np.cumsum(counts) - counts)[counts > 0]
        in_packs = pack_offsets(nbytes[order], starts)
        sizes = np.zeros(size, dtype=np.int64)
        last = starts + counts[counts > 0] - 1
        sizes[counts > 0] = in_packs[last] + nbytes[order[last]] + CRC_BYTES
        offset = np.empty(len(self.writer), dtype=np.int64)
        offset[order] = in_packs
        tied, sources = self.tied_rows
        offset[tied] = offset[sources]
        return offset, sizes


class _Encoded(msgspec.Struct, frozen=True, array_like=True):
    world: bytes
    fingerprint: int


def encode_plan(plan: SavePlan) -> bytes:
    """The plan for another process, as the layouts that it follows from: some bytes for each rank and tensor."""
    return msgspec.msgpack.encode(_Encoded(plan.world.encode(), plan.fingerprint))


def decode_plan(data: bytes) -> SavePlan:
    """The plan that `encode_plan` encoded. Raises FormatError if another version of the planner made it."""
    encoded = msgspec.msgpack.decode(data, type=_Encoded)
    plan = plan_save(WorldLayout.decode(encoded.world))
    if plan.fingerprint != encoded.fingerprint:
        raise FormatError("the plan of this save was made by another version of shardckpt")
    return plan


def plan_save(layouts: WorldLayout | Sequence[Sequence[Layout]]) -> SavePlan:
    """Plan a save.

    Args:
        layouts: what ranks hold of each tensor: of all ranks together, or by rank.

    A box that several ranks hold is stored once; its chunks are spread so that all ranks write about as many
    bytes. Raises RankMismatchError if ranks disagree about the type or the shape of a tensor, or if together they
    do not hold each of its elements.

    >>> halves = [[Layout("w", "float32", (4, 3), (Box((2 * rank, 0), (2, 3)),))] for rank in range(2)]
    >>> plan = plan_save(halves)
    >>> plan.writer.tolist(), [location.nbytes for location in plan.locations(1)], plan.tensors[0].arrays[0].chunk
    ([0, 1], [24], (2, 3))
    """
    world = layouts if isinstance(layouts, WorldLayout) else WorldLayout.of_boxes(layouts)
    merged = merge(world)
    known: dict[tuple[str, int], ChunkGrid] = {}
    grids, tensors = [], []
    for tensor in merged:
        key = (tensor.dtype, id(tensor.holders))
        if (grid := known.get(key)) is None:
            grid = known[key] = ChunkGrid.of(tensor.dtype, tensor.holders)
        grids.append(grid)
        tensors.append(TensorEntry(tensor.name, tensor.dtype, tensor.shape, grid.arrays))
    first_rows = np.cumsum([0, *(grid.rows for grid in grids)])
    numbers = {tensor.name: number for number, tensor in enumerate(merged)}
    same_as = {
        number: numbers[tensor.alias] for number, tensor in enumerate(merged) if tensor.alias is not None
    }
    writer = _writers(grids, first_rows, same_as, world.size)
    return SavePlan(world, tuple(tensors), writer, same_as, merged, grids, first_rows)


def _writers(
    grids: Sequence[ChunkGrid], first_rows: npt.NDArray[np.int64], same_as: dict[int, int], world: int
) -> npt.NDArray[np.int32]:
    """By row, the rank that writes it."""
    none = [np.zeros(0, dtype=np.int32)]
    writer = np.concatenate([*none, *(grid.sole_writers for grid in grids)])
    own = [number for number in range(len(grids)) if number not in same_as]
    counts: defaultdict[int, int] = defaultdict(int)
    for number in own:
        counts[id(grids[number])] += 1
    load = np.zeros(world, dtype=np.int64)
    for grid in {id(grids[number]): grids[number] for number in own}.values():
        is_sole = grid.holders.counts[grid.box_of_row] == 1
        nbytes = (grid.nbytes[is_sole] + CRC_BYTES) * counts[id(grid)]
        np.add.at(load, grid.sole_writers[is_sole], nbytes)
    firsts = first_rows.tolist()
    spread([grids[number] for number in own], [firsts[number] for number in own], writer, world, load)
    for number, source in same_as.items():
        rows = slice(firsts[source], firsts[source + 1])
        writer[firsts[number] : firsts[number + 1]] = writer[rows]
    return writer
