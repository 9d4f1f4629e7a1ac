"""The arithmetic of boxes, against torch's own splitting and against NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import _StridedShard

from shardckpt.format.box import Box, Runs, pieces_of_runs, split_evenly, split_strided, tiles

_quick = settings(deadline=None, max_examples=150)
_shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def indices(runs: Runs) -> list[int]:
    return [i for start, stop in runs for i in range(start, stop)]


@st.composite
def _boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(offsets, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True)))


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, Box]:
    shape = draw(_shapes)
    return shape, draw(_boxes(shape)), draw(_boxes(shape))


@st.composite
def _runs(draw: st.DrawFn) -> Runs:
    ends = sorted(draw(st.sets(st.integers(0, 30), max_size=8)))
    return tuple(zip(ends[::2], ends[1::2], strict=False))


def elements(shape: tuple[int, ...], box: Box) -> set[int]:
    """The elements that a box covers, by their number in C order."""
    return set(np.arange(math.prod(shape)).reshape(shape)[box.slices].ravel().tolist())


@_quick
@given(st.integers(0, 40), st.integers(1, 9))
def test_split_evenly_is_torch_chunk(n: int, parts: int) -> None:
    """Part i is torch.chunk's, and empty where torch.chunk gives fewer."""
    chunks = [c.tolist() for c in torch.arange(n).chunk(parts)] if n else []
    chunks += [[]] * (parts - len(chunks))
    assert [indices(split_evenly(((0, n),), parts, i)) for i in range(parts)] == chunks


@_quick
@given(_runs(), st.integers(1, 5))
def test_split_evenly_splits_what_is_held(runs: Runs, parts: int) -> None:
    """Of several runs, the parts are the even split of what they spell out, in order."""
    split = [split_evenly(runs, parts, i) for i in range(parts)]
    expected = [c.tolist() for c in torch.tensor(indices(runs)).chunk(parts)]
    assert [indices(part) for part in split if part] == [c for c in expected if c]
    assert all(start < stop for part in split for start, stop in part)
    assert all(a[1] < b[0] for part in split for a, b in itertools.pairwise(part))


@_quick
@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 5))
def test_split_strided_is_torch_strided_shard(n: int, parts: int, split_factor: int) -> None:
    """Part i holds exactly what torch's _StridedShard gives to coordinate i, in its order."""
    placement = _StridedShard(0, split_factor=split_factor)
    shards, _ = placement._split_tensor(torch.arange(n), parts, with_padding=False)
    held = [indices(split_strided(((0, n),), parts, i, split_factor)) for i in range(parts)]
    assert held == [shard.tolist() for shard in shards]


@_quick
@given(st.lists(_runs(), max_size=3))
def test_pieces_are_the_shard(runs: list[Runs]) -> None:
    """Copied to their places, the pieces make up the shard; each element once."""
    shape = (31,) * len(runs)
    tensor = np.arange(math.prod(shape)).reshape(shape)
    shard = tensor[np.ix_(*map(indices, runs))] if runs else tensor
    local = np.full(shard.shape, -1)
    pieces = pieces_of_runs(runs)
    for piece in pieces:
        assert (local[piece.shard_slices] == -1).all()
        local[piece.shard_slices] = tensor[piece.box.slices]
    assert (local == shard).all()
    assert sum(piece.box.volume for piece in pieces) == shard.size


@_quick
@given(_shapes, st.data())
def test_cells_tile_the_box(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Cells cover the box, each element once, in C order, none larger than the chunk or empty."""
    box = data.draw(_boxes(shape))
    chunk = tuple(data.draw(st.integers(1, 4)) for _ in shape)
    cells = list(box.cells(chunk))
    assert len(cells) == math.prod(-(-n // c) for n, c in zip(box.shape, chunk, strict=True))
    covered = [element for cell in cells for element in elements(shape, cell)]
    assert sorted(covered) == sorted(elements(shape, box))
    assert all(0 < n <= c for cell in cells for n, c in zip(cell.shape, chunk, strict=True))
    assert [cell.offsets for cell in cells] == sorted(cell.offsets for cell in cells)


@_quick
@given(_pairs())
def test_intersection(pair: tuple[tuple[int, ...], Box, Box]) -> None:
    """What two boxes share is what NumPy says; the order does not matter, and nothing shared is None."""
    shape, a, b = pair
    both = a.intersect(b)
    assert both == b.intersect(a)
    assert (elements(shape, both) if both else set()) == elements(shape, a) & elements(shape, b)
    if both:
        assert both.intersect(a) == both
        inner = both.relative_to(a.offsets)
        assert inner.inside(a.shape)
        values = np.arange(math.prod(shape)).reshape(shape)
        assert (values[a.slices][inner.slices] == values[both.slices]).all()
    assert a.intersect(a) == (a if a.volume else None)
    assert Box.whole(shape).intersect(a) == (a if a.volume else None)
    assert a.inside(shape)


def test_inside() -> None:
    """A box that sticks out, that starts before zero, or of other rank is not inside."""
    assert Box((0, 2), (3, 2)).inside((3, 4))
    assert not Box((0, 3), (3, 2)).inside((3, 4))
    assert not Box((-1, 0), (1, 1)).inside((3, 4))
    assert not Box((0, 0), (1, -1)).inside((3, 4))
    assert not Box((0,), (1,)).inside((3, 4))
    assert not Box((0,), (1, 1)).inside((3, 4))
    assert Box((), ()).inside(())


@_quick
@given(_shapes, st.data())
def test_tiles_counts_each_element(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Boxes tile a tensor exactly if every element is in one of them and in no other."""
    boxes = data.draw(st.lists(_boxes(shape), max_size=4))
    if data.draw(st.booleans()):  # boxes that do tile, or nearly
        chunk = tuple(data.draw(st.integers(1, 3)) for _ in shape)
        boxes = data.draw(st.permutations(list(Box.whole(shape).cells(chunk))))
        if boxes and data.draw(st.booleans()):
            boxes[0] = data.draw(_boxes(shape))
    count = np.zeros(shape, int)
    for box in boxes:
        count[box.slices] += 1
    assert tiles(shape, boxes) == bool((count == 1).all())


@_quick
@given(st.lists(st.integers(1, 9), max_size=2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_shards_tile_the_tensor(shape: list[int], rows: int, columns: int, split_factor: int) -> None:
    """The pieces of all ranks of a 2-D mesh, strided in one dimension and even in another, tile."""
    boxes = []
    for i in range(rows):
        for j in range(columns):
            runs: list[Runs] = [((0, n),) for n in shape]
            if shape:
                runs[-1] = split_evenly(runs[-1], columns, j)
                runs[0] = split_strided(runs[0], rows, i, split_factor)
            elif i + j:
                continue  # a scalar is held by one rank
            boxes += [piece.box for piece in pieces_of_runs(runs)]
    assert tiles(shape, boxes)


def test_many_boxes_are_quick_to_check() -> None:
    """A tensor in 10^5 boxes is checked in time that grows with their number, not its square."""
    boxes = [Box((i, 0), (1, 3)) for i in range(100_000)]
    assert tiles((100_000, 3), boxes)
    assert not tiles((100_000, 3), [*boxes[:-1], boxes[0]])


def test_many_boxes_of_many_dimensions_are_quick_to_check() -> None:
    """So are boxes that cut all dimensions, as only a forger makes them: there are 2^64 corners in each."""
    n, dims = 4000, 64
    boxes = [Box((i, *[0] * (dims - 1)), (1, *[2] * (dims - 1))) for i in range(n)]
    for d in range(1, dims):  # one box each is two, cut along another dimension
        offsets, shape = boxes[d]
        half = (*shape[:d], 1, *shape[d + 1 :])
        boxes[d] = Box(offsets, half)
        boxes.append(Box((*offsets[:d], 1, *offsets[d + 1 :]), half))
    whole = (n, *[2] * (dims - 1))
    assert tiles(whole, boxes)
    moved = boxes[-1].offsets[0] + 1, *boxes[-1].offsets[1:]
    assert not tiles(whole, [*boxes[:-1], Box(moved, boxes[-1].shape)])
