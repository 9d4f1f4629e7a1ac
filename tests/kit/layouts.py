"""Layouts of tensors over ranks, of every kind, and the manifests that plans of them make."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import strategies as st

from shardckpt.format.box import Box, pieces_of_runs, split_evenly, split_strided
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.layouts import Layout
from shardckpt.format.manifest import Chunks, Manifest, Pack, pack_path
from shardckpt.format.save_plan import SavePlan

__all__ = [
    "by_rank",
    "fsdp",
    "fsdp_tp",
    "layouts",
    "manifest_of",
    "partitions",
    "replicated",
    "rows_of",
    "worlds",
]


def fsdp(shape: Sequence[int], world: int) -> list[tuple[Box, ...]]:
    """The boxes of each rank when the first dimension is split as torch.chunk does."""
    rest = [((0, n),) for n in shape[1:]]
    split = [split_evenly(((0, shape[0]),), world, rank) for rank in range(world)]
    return [tuple(p.box for p in pieces_of_runs([first, *rest])) for first in split]


def fsdp_tp(shape: Sequence[int], fsdp_size: int, tp: int) -> list[tuple[Box, ...]]:
    """The first dimension split for tensor parallelism, then each part for FSDP: strided shards."""
    rest = [((0, n),) for n in shape[1:]]
    boxes = []
    for i in range(fsdp_size):
        for j in range(tp):
            mine = split_evenly(split_strided(((0, shape[0]),), fsdp_size, i, tp), tp, j)
            boxes.append(tuple(p.box for p in pieces_of_runs([mine, *rest])))
    return boxes


def replicated(shape: Sequence[int], world: int) -> list[tuple[Box, ...]]:
    whole = (Box.whole(shape),) if math.prod(shape) else ()
    return [whole] * world


def layouts(
    name: str, dtype: str, shape: Sequence[int], held: Sequence[Sequence[Box]], **other: bool
) -> list[Layout]:
    """One tensor on each rank."""
    return [Layout(name, dtype, tuple(shape), tuple(boxes), **other) for boxes in held]


def by_rank(*tensors: Sequence[Layout]) -> list[list[Layout]]:
    """The tensors' layouts, one list for each rank."""
    return [list(layout) for layout in zip(*tensors, strict=True)]


def manifest_of(plan: SavePlan) -> Manifest:
    """What a commit makes of a plan, with arbitrary checksums."""
    world = len(plan.pack_sizes)
    return Manifest(
        id="test",
        step=1,
        attempt=1,
        world_size=world,
        created=0.0,
        writer="test",
        metrics={},
        values={f"v{number}": {"$tensor": t.name} for number, t in enumerate(plan.tensors)},
        per_rank=[{}] * world,
        packs=tuple(Pack(pack_path(rank), size) for rank, size in enumerate(plan.pack_sizes)),
        tensors=plan.tensors,
        chunks=Chunks(plan.writer, plan.offset, [0] * len(plan.writer)),
    )


def rows_of(plan: SavePlan) -> list[tuple[str, Box]]:
    """(tensor, box) of each row of the chunk table."""
    return [(t.name, cell) for t in plan.tensors for array in t.arrays for cell in array.cells()]


_shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that tile a shape: it is halved at random places, a few times."""
    boxes = [Box.whole(shape)] if math.prod(shape) else []
    for _ in range(draw(st.integers(0, 4))):
        cuttable = [(b, d) for b in boxes for d in range(len(shape)) if b.shape[d] > 1]
        if not cuttable:
            break
        box, dim = draw(st.sampled_from(cuttable))
        at = draw(st.integers(1, box.shape[dim] - 1))
        low = (*box.shape[:dim], at, *box.shape[dim + 1 :])
        high = (*box.shape[:dim], box.shape[dim] - at, *box.shape[dim + 1 :])
        start = (*box.offsets[:dim], box.offsets[dim] + at, *box.offsets[dim + 1 :])
        boxes.remove(box)
        boxes += [Box(box.offsets, low), Box(start, high)]
    return boxes


@st.composite
def worlds(draw: st.DrawFn) -> list[list[Layout]]:
    """A few tensors over a world: sharded in any way, each box on one or several ranks."""
    world = draw(st.integers(1, 5))
    tensors = []
    for number in range(draw(st.integers(0, 4))):
        shape, dtype = draw(_shapes), draw(st.sampled_from(sorted(DTYPES)))
        kind = draw(st.sampled_from(["any", "fsdp", "strided", "replicated"]))
        held: list[list[Box]] = [[] for _ in range(world)]
        if kind == "fsdp" and shape:
            held = [list(boxes) for boxes in fsdp(shape, world)]
        elif kind == "strided" and shape and world == 4:
            held = [list(boxes) for boxes in fsdp_tp(shape, 2, 2)]
        elif kind == "any":
            for box in draw(partitions(shape)):
                ranks = st.sets(st.integers(0, world - 1), min_size=1, max_size=world)
                for rank in draw(ranks):
                    held[rank].append(box)
        else:
            held = [list(boxes) for boxes in replicated(shape, world)]
        tensors.append(layouts(f"t{number}", dtype, shape, held, first_holder=draw(st.booleans())))
    return by_rank(*tensors) if tensors else [[] for _ in range(world)]
