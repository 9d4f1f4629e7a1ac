"""Boxes: axis-aligned parts of a tensor, and the arithmetic of sharding. Pure, and free of torch.

box        a part of a tensor: offsets and shape in the tensor's global coordinates
piece      a box, and where it lies in the shard that a rank holds
runs       the ranges of one dimension that a rank holds, in the order of its shard
"""

from __future__ import annotations

import itertools
import math
import random
import secrets
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

__all__ = [
    "Box",
    "Piece",
    "Runs",
    "pieces_of_runs",
    "pieces_of_splits",
    "split_evenly",
    "split_strided",
    "tiles",
]

_FIELD_BITS = 127
_FIELD = (1 << _FIELD_BITS) - 1  # a prime

Runs = tuple[tuple[int, int], ...]
"""Half-open ranges `(start, stop)` of one dimension, in the order in which they follow each other in a shard."""


class Box(NamedTuple):
    """The part `offsets[d] : offsets[d] + shape[d]` of a tensor, for every dimension d.

    >>> Box((2, 0), (2, 4)).intersect(Box((3, 1), (5, 2)))
    Box(offsets=(3, 1), shape=(1, 2))
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def volume(self) -> int:
        """Number of elements; 1 for the box of a scalar."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that selects this box from the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The part that both boxes cover; None if they have no element in common."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        shape = tuple(
            min(a + n, b + m) - o
            for a, n, b, m, o in zip(
                self.offsets, self.shape, other.offsets, other.shape, offsets, strict=True
            )
        )
        return Box(offsets, shape) if all(n > 0 for n in shape) else None

    def relative_to(self, origin: Sequence[int]) -> Box:
        """The same box in coordinates that begin at `origin`."""
        return Box(tuple(o - z for o, z in zip(self.offsets, origin, strict=True)), self.shape)

    def inside(self, shape: Sequence[int]) -> bool:
        """True if this box lies inside a tensor of this shape."""
        return len(self.offsets) == len(self.shape) == len(shape) and all(
            o >= 0 and n >= 0 and o + n <= size
            for o, n, size in zip(self.offsets, self.shape, shape, strict=True)
        )

    def cells(self, chunk: Sequence[int]) -> Iterator[Box]:
        """Cut this box into boxes of shape `chunk`, in C order; those at the far edges are clipped to it.

        Offsets are in the tensor's global coordinates. A box without elements has no cells.
        """
        if 0 in self.shape:
            return  # however many there would be along the other dimensions
        axes = [
            [(o + i, min(c, n - i)) for i in range(0, n, c)]
            for o, n, c in zip(self.offsets, self.shape, chunk, strict=True)
        ]
        for cell in itertools.product(*axes):
            yield Box(tuple(o for o, _ in cell), tuple(n for _, n in cell))


class Piece(NamedTuple):
    """A box, and the offsets of its first element in the shard that a rank holds."""

    box: Box
    at: tuple[int, ...]

    @property
    def shard_slices(self) -> tuple[slice, ...]:
        """The index that selects the piece from the shard."""
        return tuple(slice(o, o + n) for o, n in zip(self.at, self.box.shape, strict=True))


def split_evenly(runs: Runs, parts: int, index: int) -> Runs:
    """The runs of part `index` of `parts`, when a dimension is split as `torch.chunk` splits it.

    Each part has ceil(n / parts) elements, except the last ones, which may have fewer or none.

    >>> [split_evenly(((0, 5),), 4, index) for index in range(4)]
    [((0, 2),), ((2, 4),), ((4, 5),), ()]
    """
    length = sum(stop - start for start, stop in runs)
    size = -(-length // parts) if length else 0
    return _cut(runs, min(size * index, length), min(size * (index + 1), length))


def split_strided(runs: Runs, parts: int, index: int, split_factor: int) -> Runs:
    """The runs of part `index`, when a dimension is split in `split_factor` parts, and each of them in `parts`.

    This is how a dimension is placed that FSDP shards after tensor parallelism: the right mesh dimension splits
    first.
    """
    held: list[tuple[int, int]] = []
    for block in range(split_factor):
        held.extend(split_evenly(split_evenly(runs, split_factor, block), parts, index))
    return _joined(held)


def pieces_of_runs(runs: Sequence[Runs]) -> tuple[Piece, ...]:
    """The boxes of a shard that has `runs[d]` of each dimension d, each with its place in the shard.

    A shard without elements has no piece; a scalar has one.
    """
    axes = []
    for dimension in runs:
        starts = itertools.accumulate((stop - start for start, stop in dimension), initial=0)
        axes.append(
            [
                (start, stop - start, at)
                for (start, stop), at in zip(dimension, starts, strict=False)
                if stop > start
            ]
        )
    return tuple(
        Piece(Box(tuple(o for o, _, _ in p), tuple(n for _, n, _ in p)), tuple(a for _, _, a in p))
        for p in itertools.product(*axes)
    )


@lru_cache(maxsize=1 << 16)
def pieces_of_splits(
    shape: tuple[int, ...], splits: tuple[tuple[int, int, int, int], ...]
) -> tuple[Piece, ...]:
    """The boxes of a tensor that a rank has after splits of (dimension, parts, own part, split factor)."""
    runs: list[Runs] = [((0, n),) for n in shape]
    for dim, parts, index, split_factor in splits:
        runs[dim] = split_strided(runs[dim], parts, index, split_factor)
    return pieces_of_runs(runs)


def tiles(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """True if `boxes`, which lie inside a tensor of this shape, cover each of its elements exactly once.

    Takes time in proportion to the number of boxes times the number of dimensions.
    """
    if sum(box.volume for box in boxes) != math.prod(shape):
        return False
    # Each coordinate of a dimension at which a box begins or ends gets a random number, and a box gets the
    # product, over the dimensions, of the difference between the numbers at its end and its start. Where boxes
    # meet, their numbers are equal and cancel in the sum: the sum over boxes that tile is the product of the
    # whole tensor. The sum over other boxes equals it with a chance below 2^-120 (Schwartz-Zippel lemma).
    draw = random.Random(secrets.randbits(128)).getrandbits
    ends: list[dict[int, int]] = [{} for _ in shape]

    def measure(box: Box) -> int:
        product = 1
        for known, offset, n in zip(ends, box.offsets, box.shape, strict=True):
            start = known.get(offset) or known.setdefault(offset, draw(_FIELD_BITS))
            stop = known.get(offset + n) or known.setdefault(offset + n, draw(_FIELD_BITS))
            product = product * (stop - start) % _FIELD
        return product

    return sum(map(measure, boxes)) % _FIELD == measure(Box.whole(shape))


def _cut(runs: Runs, start: int, stop: int) -> Runs:
    """Elements `start:stop` of the sequence of indices that `runs` stand for."""
    held = []
    position = 0
    for first, last in runs:
        low = max(first, first + start - position)
        high = min(last, first + stop - position)
        if low < high:
            held.append((low, high))
        position += last - first
    return _joined(held)


def _joined(runs: Sequence[tuple[int, int]]) -> Runs:
    """The same runs with neighbouring ranges merged."""
    merged: list[tuple[int, int]] = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif stop > start:
            merged.append((start, stop))
    return tuple(merged)
