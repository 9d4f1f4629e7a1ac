"""Boxes: axis-aligned parts of a tensor, and the arithmetic of sharding. Pure, and free of torch.

box        offsets and shape in the tensor's global coordinates
piece      a box together with where it lies in the tensor that a rank holds
runs       the ranges of one dimension that a rank holds, in the order in which it holds them
"""

from __future__ import annotations

import itertools
import math
import random
import secrets
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = [
    "Box",
    "Piece",
    "Runs",
    "pieces_of_runs",
    "split_evenly",
    "split_strided",
    "tiles",
]

_FIELD_BITS = 127
_FIELD = (1 << _FIELD_BITS) - 1  # a prime

Runs = tuple[tuple[int, int], ...]
"""Half-open ranges `(start, stop)` of one dimension, as they follow one another in the local tensor."""


class Box(NamedTuple):
    """The part `offsets[d] : offsets[d] + shape[d]` of a tensor, for every dimension d."""

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
        """What selects this box from an array in global coordinates."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The part that both cover, or None if they have no element in common."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        shape = tuple(
            min(a + n, b + m) - o
            for a, n, b, m, o in zip(
                self.offsets, self.shape, other.offsets, other.shape, offsets, strict=True
            )
        )
        return Box(offsets, shape) if all(n > 0 for n in shape) else None

    def relative_to(self, origin: Sequence[int]) -> Box:
        """The same box in coordinates whose zero is at `origin`."""
        return Box(tuple(o - z for o, z in zip(self.offsets, origin, strict=True)), self.shape)

    def inside(self, shape: Sequence[int]) -> bool:
        """Whether this box lies within a tensor of this shape."""
        return len(self.offsets) == len(self.shape) == len(shape) and all(
            o >= 0 and n >= 0 and o + n <= size
            for o, n, size in zip(self.offsets, self.shape, shape, strict=True)
        )

    def cells(self, chunk: Sequence[int]) -> Iterator[Box]:
        """This box cut into a grid of `chunk`-shaped boxes in C order, the last ones clipped.

        Offsets stay in the tensor's global coordinates. A box without elements has no cells.
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
    """A box, and the offsets at which the tensor that a rank holds has its first element."""

    box: Box
    at: tuple[int, ...]

    @property
    def shard_slices(self) -> tuple[slice, ...]:
        """What selects the piece from the rank's own tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.at, self.box.shape, strict=True))


def split_evenly(runs: Runs, parts: int, index: int) -> Runs:
    """What part `index` of `parts` holds when a dimension is split as `torch.chunk` does.

    All parts have ceil(n / parts) elements but the last ones, which may be shorter or empty.
    """
    length = sum(stop - start for start, stop in runs)
    size = -(-length // parts) if length else 0
    return _cut(runs, min(size * index, length), min(size * (index + 1), length))


def split_strided(runs: Runs, parts: int, index: int, split_factor: int) -> Runs:
    """What part `index` holds when a dimension is first split in `split_factor`, then each in `parts`.

    That is the placement of a dimension that FSDP shards after tensor parallelism has: the later
    (right) mesh dimension splits first.
    """
    held: list[tuple[int, int]] = []
    for block in range(split_factor):
        held.extend(split_evenly(split_evenly(runs, split_factor, block), parts, index))
    return _joined(held)


def pieces_of_runs(runs: Sequence[Runs]) -> tuple[Piece, ...]:
    """The boxes of a shard that holds `runs[d]` of dimension d, each with its place in the shard.

    A shard without elements has no pieces; a scalar has one.
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


def tiles(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether `boxes`, which lie inside a tensor of this shape, cover each of its elements exactly once.

    Takes time in proportion to the number of boxes and of dimensions.
    """
    if sum(box.volume for box in boxes) != math.prod(shape):
        return False
    # Give each end of a range along a dimension a number of its own, and a box the product of what its ends
    # differ by, over all dimensions. Where boxes meet, their ends have the same number, and fall out of the sum:
    # so that of boxes that tile is the whole's. With numbers drawn at random, in a field, that of any others
    # is not (by Schwartz and Zippel, but for a chance below 2^-120).
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
    """Elements `start:stop` of the sequence that `runs` spell out."""
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
    """The same elements with neighbouring ranges merged."""
    merged: list[tuple[int, int]] = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif stop > start:
            merged.append((start, stop))
    return tuple(merged)
