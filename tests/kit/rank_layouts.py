"""Layouts of ranks as states have them: on meshes, in pipeline stages, with tensors of each rank's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from shardckpt.format.box import Box, pieces_of_splits
from shardckpt.format.layouts import OWN, Layout, RankLayout, Split

__all__ = ["boxes_of_ranks", "draw_ranks"]

_KINDS = ["fsdp", "hsdp", "2d", "nested", "strided", "tp", "whole", "first", "own", "ragged", "tied"]
_LENGTHS = [0, 1, 2, 3, 5, 8, 16, 24, 100, 4096]


@dataclass(frozen=True)
class _Drawn:
    """A tensor of the world: of every stage, or of one only."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    stage: int | None


@dataclass
class _Rank:
    """One rank on a mesh of two dimensions, in one of the stages."""

    rank: int
    grid: tuple[int, int]
    stages: int
    meshes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def layout(self, drawn: _Drawn, before: Layout | None) -> Layout:
        """What the rank holds of a tensor; `before` is the last one that is not tied."""
        name, dtype, shape = drawn.name, drawn.dtype, drawn.shape
        if drawn.kind == "tied" and before is not None:
            return replace(before, name=name, alias=before.name)
        if (found := self._splits(drawn)) is not None:
            mesh, splits = found
            return Layout(name, dtype, shape, (), mesh=mesh, splits=splits)
        whole = (Box.whole(shape),) if math.prod(shape) else ()
        return Layout(name, dtype, shape, whole, first_holder=drawn.kind == "first")

    def _splits(self, drawn: _Drawn) -> tuple[int, tuple[Split, ...]] | None:
        rows, columns = self.grid
        size = rows * columns
        row, column = divmod(self.rank, columns)
        last = len(drawn.shape) - 1
        if last < 0:
            return None
        if drawn.stage is not None:
            size //= self.stages
            is_split = drawn.kind in ("fsdp", "2d")
            return (
                (self._mesh("stage", (size,), (self.rank % size,)), (Split(0, size, 0),))
                if is_split
                else None
            )
        ways: dict[str, tuple[Split, ...]] = {
            "fsdp": (Split(0, size, 0),),
            "hsdp": (Split(0, columns, 1),),
            "2d": (Split(0, rows, 0), Split(last, columns, 1)),
            "nested": (Split(0, columns, 1), Split(0, rows, 0)),
            "strided": (Split(0, rows, 0, 2), Split(0, columns, 1)),
            "tp": (Split(last, columns, 0),),
        }
        if drawn.kind not in ways:
            return None
        if drawn.kind == "fsdp":
            mesh = self._mesh("world", (size,), (self.rank,))
        elif drawn.kind == "tp":
            mesh = self._mesh("tp", (columns,), (column,))
        else:
            mesh = self._mesh("grid", (rows, columns), (row, column))
        return mesh, ways[drawn.kind]

    def _mesh(self, name: str, shape: tuple[int, ...], place: tuple[int, ...]) -> int:
        self.meshes.setdefault(name, (shape, place))
        return list(self.meshes).index(name)


def draw_ranks(rng: np.random.Generator) -> list[RankLayout]:
    """The layouts of a random world of 1 to 96 ranks."""
    size = int(rng.choice([1, 2, 4, 6, 8, 12, 16, 80, 96]))
    rows = int(rng.choice([n for n in range(1, size + 1) if size % n == 0]))
    stages = 2 if size % 2 == 0 and rng.random() < 0.3 else 1
    tensors = [_draw(rng, number, stages) for number in range(rng.integers(1, 30))]
    ranks = [_Rank(rank, (rows, size // rows), stages) for rank in range(size)]
    return [_rank_layout(rank, rank.rank * stages // size, tensors) for rank in ranks]


def _draw(rng: np.random.Generator, number: int, stages: int) -> _Drawn:
    shape = tuple(int(n) for n in rng.choice(_LENGTHS, rng.integers(0, 4)))
    dtype = str(rng.choice(["float32", "bfloat16", "int8"]))
    if shape and rng.random() < 0.1:  # one that is cut into chunks
        shape, dtype = (
            (int(rng.choice([1 << 22, (1 << 21) + 3, 1 << 25])), *(2 for _ in shape[1:2])),
            "int8",
        )
    stage = int(rng.integers(stages)) if stages > 1 and rng.random() < 0.5 else None
    return _Drawn(f"model/t{number}", dtype, shape, str(rng.choice(_KINDS)), stage)


def _rank_layout(rank: _Rank, stage: int, tensors: Sequence[_Drawn]) -> RankLayout:
    common: list[Layout | None] = []
    own: list[Layout] = []
    before: Layout | None = None
    for drawn in tensors:
        if drawn.stage not in (None, stage):
            continue
        if drawn.kind in ("own", "ragged"):
            shape = (*drawn.shape, rank.rank % 3) if drawn.kind == "ragged" else drawn.shape
            whole = (Box.whole(shape),) if math.prod(shape) else ()
            own.append(Layout(f"{drawn.name}{OWN}/x", drawn.dtype, shape, whole))
            common.append(None)
            continue
        layout = rank.layout(drawn, before)
        common.append(layout)
        before = before if drawn.kind == "tied" else layout
    places = rank.meshes.values()
    return RankLayout(
        meshes=tuple(shape for shape, _ in places),
        coordinates=tuple(n for _, place in places for n in place),
        common=tuple(common),
        own=tuple(own),
    )


def boxes_of_ranks(ranks: Sequence[RankLayout]) -> list[list[Layout]]:
    """The same layouts, by rank, with the boxes of each rank instead of meshes, and its number in names."""
    return [
        [_with_boxes(layout, held, rank) for layout in _in_order(held)] for rank, held in enumerate(ranks)
    ]


def _in_order(held: RankLayout) -> list[Layout]:
    own = iter(held.own)
    return [layout if layout is not None else next(own) for layout in held.common]


def _with_boxes(layout: Layout, held: RankLayout, rank: int) -> Layout:
    boxes = layout.boxes
    if layout.mesh is not None:
        start = sum(map(len, held.meshes[: layout.mesh]))
        place = held.coordinates[start : start + len(held.meshes[layout.mesh])]
        splits = tuple((dim, parts, place[axis], factor) for dim, parts, axis, factor in layout.splits)
        boxes = (
            tuple(piece.box for piece in pieces_of_splits(layout.shape, splits)) if place[0] >= 0 else ()
        )
    folder = f"/rank-{rank:05d}"
    alias = layout.alias.replace(OWN, folder) if layout.alias is not None else None
    name = layout.name.replace(OWN, folder)
    return Layout(name, layout.dtype, layout.shape, boxes, alias, layout.first_holder)
