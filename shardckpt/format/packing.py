"""Which rank writes a chunk that several hold, and where chunks lie in packs: arithmetic on columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shardckpt.format.chunks import CRC_BYTES
from shardckpt.format.holders import ChunkGrid

__all__ = ["pack_offsets", "spread"]

_ALIGN = 64
_ALIGN_LARGE = 4096
_LARGE = 1 << 20

_SMALL_WORLD = 64
"""Ranks up to which a loop over the holders of a chunk is faster than a call of NumPy (bench/scale)."""

_NEVER = np.int64(1 << 62)

Ints = npt.NDArray[np.int64]
Ranks = npt.NDArray[np.int32]


def spread(
    grids: Sequence[ChunkGrid], first_rows: Sequence[int], writer: Ranks, world: int, load: Ints
) -> None:
    """Choose who writes the chunks that several ranks hold: of its holders the one with the least to write.

    Chunks are given away in the order of their size, large ones first, and of rows. So all ranks write equally
    many bytes, up to one chunk, if all of them hold something in common.

    Args:
        grids: of the tensors that are not tied to another one.
        first_rows: by tensor, its first row in the chunk table.
        writer: by row, the rank; written for chunks with several holders.
        world: number of ranks.
        load: by rank, the bytes of the chunks that no other rank holds.
    """
    units = [
        (-nbytes, first + grid.first_rows[array], grid, array)
        for grid, first in zip(grids, first_rows, strict=True)
        if len(grid.holders.several)
        for array, nbytes in enumerate(grid.array_bytes)
    ]
    units.sort(key=lambda unit: unit[:2])
    turns = _turns_of(units)
    if world <= _SMALL_WORLD:
        _spread_in_loops(units, turns, writer, load.tolist())
    else:
        _spread_in_columns(units, turns, writer, load)


_Unit = tuple[int, int, ChunkGrid, int]
"""One array's chunks: (-bytes of each, first row in the chunk table, the tensor's grid, number of the array)."""


@dataclass(frozen=True)
class _Turn:
    """Chunks of one array that no two have a holder in common, so that their order makes no difference.

    Attributes:
        rows: of the chunks, counted from the array's first.
        holders: of each chunk, a row of ranks, ascending; then -1s.
    """

    rows: Ints
    holders: Ranks

    @cached_property
    def listed(self) -> list[tuple[int, list[int]]]:
        """The same as lists, without the -1s."""
        return [
            (row, [rank for rank in ranks if rank >= 0])
            for row, ranks in zip(self.rows.tolist(), self.holders.tolist(), strict=True)
        ]


def _turns_of(units: Sequence[_Unit]) -> dict[tuple[int, int], list[_Turn]]:
    """The turns of each grid's arrays: by the grid's id and the array's number."""
    found: dict[tuple[int, int], list[_Turn]] = {}
    for _, _, grid, array in units:
        if (id(grid), array) not in found:
            found[id(grid), array] = _turns(grid, array)
    return found


def _turns(grid: ChunkGrid, array: int) -> list[_Turn]:
    """Every chunk of an array that has several holders, in turns in which they are given away."""
    start, stop = grid.first_rows[array : array + 2]
    box = grid.box_of_row[start:stop]
    index = np.searchsorted(grid.holders.several, box)
    index = np.minimum(index, len(grid.holders.several) - 1)
    rows = np.flatnonzero(grid.holders.several[index] == box)
    index = index[rows]
    if not grid.holders.are_disjoint:
        return [_Turn(rows[i : i + 1], grid.holders.table[index[i : i + 1]]) for i in range(len(rows))]
    # The n-th chunk of every box in turn n: boxes have no holder in common.
    order = np.argsort(index, kind="stable")
    counts = np.bincount(index, minlength=len(grid.holders.several))
    turn = np.empty(len(rows), dtype=np.int64)
    turn[order] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    by_turn = np.argsort(turn, kind="stable")
    ends = np.cumsum(np.bincount(turn)).tolist()
    return [_Turn(rows[part], grid.holders.table[index[part]]) for part in np.split(by_turn, ends)[:-1]]


def _spread_in_loops(
    units: Sequence[_Unit], turns: dict[tuple[int, int], list[_Turn]], writer: Ranks, load: list[int]
) -> None:
    least = load.__getitem__
    for size, first, grid, array in units:
        nbytes = CRC_BYTES - size
        for turn in turns[id(grid), array]:
            for row, holders in turn.listed:
                rank = min(holders, key=least)
                load[rank] += nbytes
                writer[first + row] = rank


def _spread_in_columns(
    units: Sequence[_Unit], turns: dict[tuple[int, int], list[_Turn]], writer: Ranks, load: Ints
) -> None:
    load = np.append(load, _NEVER)  # found by the number -1
    for size, first, grid, array in units:
        nbytes = CRC_BYTES - size
        for turn in turns[id(grid), array]:
            least = load[turn.holders].argmin(axis=1)
            rank = turn.holders[np.arange(len(least)), least]
            load[rank] += nbytes
            writer[first + turn.rows] = rank


def pack_offsets(nbytes: Ints, starts: Ints) -> Ints:
    """The offset of each chunk in its pack: one chunk after another, aligned to 4096 bytes from 1 MiB on.

    Args:
        nbytes: of each chunk's elements, one pack after another, in the order of the pack.
        starts: the first chunk of each pack that has any, ascending.
    """
    if not len(nbytes):
        return nbytes
    lines = -(-(nbytes + CRC_BYTES) // _ALIGN)
    before = np.cumsum(lines) - lines
    # Large chunks begin at a multiple of 64 lines. How many lines are left free before one follows from the
    # number of lines since the last that did, which is the large chunk before, or the pack's beginning.
    is_aligned = nbytes >= _LARGE
    is_aligned[starts] = True
    aligned = np.flatnonzero(is_aligned)
    free = np.zeros(len(nbytes), dtype=np.int64)
    free[aligned[1:]] = -np.diff(before[aligned]) % (_ALIGN_LARGE // _ALIGN)
    free[starts] = 0
    before += np.cumsum(free)
    return (before - np.repeat(before[starts], np.diff(np.append(starts, len(nbytes))))) * _ALIGN
