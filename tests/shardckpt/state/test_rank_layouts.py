"""The layout of a rank: what its placements say is what it holds, and ranks that are alike say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardckpt.format.layouts import Layout, WorldLayout
from shardckpt.format.save_plan import SavePlan, plan_save
from shardckpt.ranks.world import current_ranks
from shardckpt.state.flatten import PerRank, flatten
from tests.kit.parallel import Training
from tests.kit.reference_plan import reference_plan
from tests.kit.worlds import run_processes


def _layouts(rank: int, name: str) -> tuple[SavePlan, WorldLayout, list[Layout]]:
    """On each rank: the plan, the world, and the boxes that this rank's memory really has."""
    training = Training.make(name)
    state = {"model": training.model, "optimizer": training.optimizer, "own": PerRank(torch.ones(3))}
    flat = flatten(state, rank)
    world = flat.layout(rank).share(rank, current_ranks().gather)
    boxes = [
        Layout(t.name, t.dtype, t.shape, tuple(p.box for p in t.pieces), None, t.first_holder)
        for t in flat.tensors
    ]
    return plan_save(world), world, boxes


def _columns(rank: int, name: str) -> tuple[Any, int, int, list[Layout]]:
    plan, world, boxes = _layouts(rank, name)
    columns = (plan.tensors, plan.writer.tolist(), plan.offset.tolist(), list(plan.pack_sizes))
    return columns, len(world.commons), len(world.owns), boxes


@pytest.mark.parametrize("name", ["plain", "fsdp", "tp", "hsdp", "fsdp_tp"])
def test_placements_tell_what_ranks_hold(name: str) -> None:
    """A plan that follows from placements is that of the boxes which the ranks' memory has."""
    found = run_processes(4, _columns, name)
    wanted = reference_plan([boxes for *_, boxes in found])
    for columns, _, _, _ in found:
        assert columns == (wanted.tensors, wanted.writer, wanted.offset, wanted.pack_sizes)
    commons, owns = found[0][1:3]
    assert (commons, owns) == (1, 1), "ranks of one model are alike"


def test_own_values_are_alike_on_all_ranks() -> None:
    """PerRank tensors have the rank in their names; that makes no layout of its own, but another shape does."""

    def layout(rank: int, size: int) -> Any:
        shared = torch.ones(2)
        state = {"a": torch.ones(4), "rng": PerRank({"x": torch.ones(size), "y": shared}), "z": shared}
        return flatten(state, rank).layout(rank)

    one, other, longer = layout(0, 3), layout(7, 3), layout(7, 4)
    assert one == other
    assert one.digest == other.digest
    assert one.common == longer.common
    assert one.own != longer.own
    world = WorldLayout.of([layout(rank, 3 + rank % 2) for rank in range(4)])
    assert (len(world.commons), len(world.owns)) == (1, 2)
    names = [tensor.name for tensor in plan_save(world).tensors]
    assert [name for name in names if name.startswith("rng")][2:4] == [
        "rng/rank-00001/x",
        "rng/rank-00001/y",
    ]
    alone = plan_save(WorldLayout.of([one]))
    assert [alone.tensors[number].name for number in alone.same_as] == ["z"], "tied on the only rank"
