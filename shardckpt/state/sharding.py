"""Sharding: how a DTensor is split, and which boxes of it this rank holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import _StridedShard

from shardckpt.errors import UnsupportedValueError
from shardckpt.format.box import Piece, pieces_of_splits
from shardckpt.format.layouts import Split

__all__ = ["MeshPlace", "Sharding", "sharding_of"]


_PARTS = (Replicate, Shard, _StridedShard)
"""Placements of which it is known what part of a tensor a rank holds. Their subclasses may differ."""


class MeshPlace(NamedTuple):
    """A mesh, and this rank's place in it.

    Attributes:
        names: of its dimensions; None if they have none.
        shape: of the mesh.
        coordinate: the rank's; None if it is not in the mesh.
    """

    names: tuple[str, ...] | None
    shape: tuple[int, ...]
    coordinate: tuple[int, ...] | None


@dataclass(frozen=True)
class Sharding:
    """How a DTensor is split, and which part this rank has.

    Attributes:
        place: its mesh, and the rank's place there.
        splits: each split, in order.
        pieces: the boxes of the rank's part, each with its place in the rank's memory.
    """

    place: MeshPlace
    splits: tuple[Split, ...]
    pieces: tuple[Piece, ...]

    @property
    def ways(self) -> tuple[tuple[int, int, int], ...]:
        """(dimension, parts, split factor) of each split, in order."""
        return tuple((split.dim, split.parts, split.factor) for split in self.splits)

    @property
    def count(self) -> int:
        """The number of different parts: replicas of a part count once."""
        return math.prod(split.parts for split in self.splits)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of this rank's memory, if it has a part of the tensor."""
        dims = range(len(self.pieces[0].at)) if self.pieces else ()
        return tuple(max(piece.at[d] + piece.box.shape[d] for piece in self.pieces) for d in dims)

    @cached_property
    def volume(self) -> int:
        """The number of elements that this rank has."""
        return sum(piece.box.volume for piece in self.pieces)

    @property
    def index(self) -> int | None:
        """The number of this rank's part, from 0; None if it is not in the DTensor's mesh."""
        if self.place.coordinate is None:
            return None
        index = 0
        for split in self.splits:
            index = index * split.parts + self.place.coordinate[split.axis]
        return index


def sharding_of(tensor: DTensor, name: str) -> Sharding:
    """How a DTensor is split according to its placements, which apply from the left mesh dimension to the right.

    torch's own helper returns the first offset only, which is not enough for a strided shard of a dimension that
    does not divide evenly. Raises UnsupportedValueError, which names `name`, for other placements.
    """
    mesh = tensor.device_mesh
    for placement in tensor.placements:
        if type(placement) not in _PARTS:
            remedy = (
                "call redistribute() first" if isinstance(placement, Partial) else "replicate or shard it"
            )
            raise UnsupportedValueError(
                f"state[{name!r}] is a DTensor with the placement {placement!r}, which is not a part of the "
                f"tensor that is known here; {remedy}."
            )
    if not _is_default_order(tensor._spec):
        raise UnsupportedValueError(
            f"state[{name!r}] is a DTensor with placements {tensor.placements} in the explicit order "
            f"{tensor._spec.shard_order}, which is not supported; redistribute() it to the default order, in "
            "which mesh dimensions split from the left to the right."
        )
    coordinate = mesh.get_coordinate()
    own = tuple(coordinate) if coordinate is not None else None
    place = MeshPlace(mesh.mesh_dim_names, tuple(mesh.shape), own)
    return _sharding(tuple(tensor.shape), tensor.placements, place)


@lru_cache(maxsize=1 << 14)
def _sharding(shape: tuple[int, ...], placements: tuple[Placement, ...], place: MeshPlace) -> Sharding:
    splits = _splits(placements, place.shape)
    own = place.coordinate
    if own is None:
        return Sharding(place, splits, ())
    parts = tuple((dim, count, own[axis], factor) for dim, count, axis, factor in splits)
    return Sharding(place, splits, pieces_of_splits(shape, parts))


def _is_default_order(spec: DTensorSpec) -> bool:
    """True if the placements alone tell how the tensor is split: torch 2.10 may have an order besides."""
    order = getattr(spec, "shard_order", None)
    if order is None or spec.use_strided_shard_as_shard_order:
        return True
    return bool(order == _default_order(spec.placements))


@lru_cache(maxsize=1 << 10)
def _default_order(placements: tuple[Placement, ...]) -> Any:
    return DTensorSpec.compute_default_shard_order(placements)


@lru_cache(maxsize=1 << 12)
def _splits(placements: tuple[Placement, ...], sizes: tuple[int, ...]) -> tuple[Split, ...]:
    """The splits of a tensor on a mesh of these sizes, in order.

    Mesh dimensions split from the left to the right; but a strided shard is split last, after the mesh dimensions
    to its right that make up its split factor, as FSDP does after tensor parallelism. Only this order is right
    where a dimension does not divide evenly. A factor that is no product of those dimensions' sizes is used as it
    is.
    """
    order: list[tuple[int, int]] = []
    dims = [getattr(placement, "dim", None) for placement in placements]
    for mesh_dim in reversed(range(len(dims))):
        factor = int(getattr(placements[mesh_dim], "split_factor", 1))
        left, at = factor, 0
        while left > 1 and at < len(order):
            other, parts = order[at][0], sizes[order[at][0]]
            if dims[other] == dims[mesh_dim]:
                left = left // parts if left % parts == 0 else 0
            at += 1
        order.insert(at if left == 1 else 0, (mesh_dim, 1 if left == 1 else factor))
    return tuple(
        Split(dim, sizes[mesh_dim], mesh_dim, factor)
        for mesh_dim, factor in order
        if (dim := dims[mesh_dim]) is not None
    )
