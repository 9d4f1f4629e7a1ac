"""The tensors of a world: one list out of what all ranks hold."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from shardckpt.errors import RankMismatchError
from shardckpt.format.box import Box
from shardckpt.format.holders import Holders, Holding, holders_of, ranks_with_elements, sole_holders
from shardckpt.format.layouts import OWN, Layout, WorldLayout

__all__ = ["MergedTensor", "merge"]


@dataclass(slots=True)
class MergedTensor:
    """One tensor of a world.

    Attributes:
        name, dtype, shape: as all of its ranks have them.
        first_holder: see `Layout`.
        held: what ranks hold of it, by group: the number of their common part, or -1 - rank for a rank's own.
        first_rank: the first rank that has it.
        alias: name of the tensor whose chunks it shares; None if there is none.
        holders: who holds which box of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    first_holder: bool
    first_rank: int
    held: list[tuple[int, Layout]] = field(default_factory=list)
    alias: str | None = None
    holders: Holders = field(init=False)


def merge(world: WorldLayout) -> list[MergedTensor]:
    """The tensors of all ranks, in the order in which the ranks, one after another, name them.

    Raises RankMismatchError if ranks disagree about the type or the shape of a tensor, or if together they do not
    hold each of its elements.
    """
    merged = _by_name(world)
    groups = _Groups(world)
    for tensor in merged.values():
        tensor.holders = groups.holders(tensor)
        tensor.alias = groups.alias(tensor)
    for tensor in merged.values():
        if tensor.alias is None:
            continue
        other = merged.get(tensor.alias)
        same = other is not None and other.dtype == tensor.dtype and other.holders.equals(tensor.holders)
        if other is None or other.alias is not None or not same:
            tensor.alias = None
    return list(merged.values())


def _by_name(world: WorldLayout) -> dict[str, MergedTensor]:
    """The tensors by name, each with what ranks hold of it."""
    merged: dict[str, MergedTensor] = {}
    seen: set[int] = set()
    for rank, (common, own) in enumerate(zip(world.common_of.tolist(), world.own_of.tolist(), strict=True)):
        own_layouts = (_named(layout, rank) for layout in world.owns[own])
        if common not in seen:
            seen.add(common)
            for layout in world.commons[common].layouts:
                if layout is None:
                    _add(merged, rank, -1 - rank, next(own_layouts))
                else:
                    _add(merged, rank, common, layout)
        for layout in own_layouts:
            _add(merged, rank, -1 - rank, layout)
    return merged


def _add(merged: dict[str, MergedTensor], rank: int, group: int, layout: Layout) -> None:
    tensor = merged.get(layout.name)
    if tensor is None:
        tensor = MergedTensor(layout.name, layout.dtype, layout.shape, layout.first_holder, rank)
        merged[layout.name] = tensor
    elif (tensor.dtype, tensor.shape) != (layout.dtype, layout.shape):
        raise RankMismatchError(
            f"state[{layout.name!r}] is {tensor.dtype} of shape {list(tensor.shape)} on rank "
            f"{tensor.first_rank} and {layout.dtype} of shape {list(layout.shape)} on rank {rank}. "
            "Wrap values that every rank has its own of in shardckpt.PerRank."
        )
    tensor.held.append((group, layout))


def _named(layout: Layout, rank: int) -> Layout:
    """The layout of a rank's own tensor, with the rank in its names."""
    name, alias = layout.name, layout.alias
    if OWN in name or OWN in (alias or ""):
        name = _of_rank(name, rank)
        alias = _of_rank(alias, rank) if alias is not None else None
        return msgspec.structs.replace(layout, name=name, alias=alias)
    return layout


def _of_rank(name: str, rank: int) -> str:
    return name.replace(OWN, f"/rank-{rank:05d}")


class _Groups:
    """The groups of ranks that are alike. Finds who holds what, once for all tensors that are alike."""

    def __init__(self, world: WorldLayout) -> None:
        self._world = world
        self._ranks = [world.ranks_of(common) for common in range(len(world.commons))]
        self._known: dict[Hashable, Holders] = {}

    def holders(self, tensor: MergedTensor) -> Holders:
        """Who holds what of a tensor. Raises RankMismatchError."""
        if len(tensor.held) == 1:
            ((group, layout),) = tensor.held
            key: Hashable = (
                group,
                layout.mesh,
                layout.splits,
                layout.boxes,
                layout.shape,
                tensor.first_holder,
            )
            whole = Box.whole(layout.shape)
            if group < 0 and layout.boxes == (whole,) and whole.volume and key not in self._known:
                self._known[key] = sole_holders(layout.shape, -1 - group)
        else:
            parts = [(group, part.mesh, part.splits, part.boxes) for group, part in tensor.held]
            key = (tensor.shape, tensor.first_holder, *parts)
        if (known := self._known.get(key)) is None:
            held = [self._holding(group, layout) for group, layout in tensor.held]
            known = holders_of(tensor.name, tensor.shape, held, first_only=tensor.first_holder)
            self._known[key] = known
        return known

    def alias(self, tensor: MergedTensor) -> str | None:
        """The name that all ranks with elements of the tensor give to the same memory; None if they differ."""
        aliases = {layout.alias for _, layout in tensor.held}
        if aliases == {None}:
            return None
        found = [(ranks_with_elements(self._holding(g, part)), part.alias) for g, part in tensor.held]
        if not any(len(ranks) for ranks, _ in found):
            return tensor.held[0][1].alias
        if len({alias for ranks, alias in found if len(ranks)}) > 1:
            return None
        alias = next(alias for ranks, alias in found if len(ranks))
        if alias is not None and OWN in alias:  # which is another name on each rank
            every = np.unique(np.concatenate([ranks for ranks, _ in found]))
            return _of_rank(alias, int(every[0])) if len(every) == 1 else None
        return alias

    def _holding(self, group: int, layout: Layout) -> Holding:
        ranks = self._ranks[group] if group >= 0 else np.array([-1 - group], dtype=np.int32)
        coordinates = None
        if layout.mesh is not None:
            common = group if group >= 0 else int(self._world.common_of[-1 - group])
            coordinates = self._world.coordinates_in(common, layout.mesh)
        return Holding(ranks, layout, coordinates)
