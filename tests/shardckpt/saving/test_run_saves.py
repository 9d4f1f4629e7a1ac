"""How much memory a run's first save is expected to take, before it is planned."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shardckpt.format.save_plan import Layout, plan_save
from shardckpt.saving.run_saves import expected_pack
from tests.kit.layouts import by_rank, fsdp, layouts, replicated

MIB = 1 << 20
RANKS = 4


def data_parallel(rows: int) -> list[list[Layout]]:
    """Every rank holds all; large enough that one chunk more or less matters little."""
    shape = (100 * rows, 1024)
    return by_rank(layouts("t", "float32", shape, replicated(shape, RANKS)))


def sharded(rows: int) -> list[list[Layout]]:
    """Every rank holds a quarter of a matrix, and all of a vector."""
    shape = (rows, 1024)
    matrix = layouts("t", "float32", shape, fsdp(shape, RANKS))
    return by_rank(matrix, layouts("v", "float32", (1000,), replicated((1000,), RANKS)))


@pytest.mark.parametrize("world_of", [data_parallel, sharded])
@pytest.mark.parametrize("rows", [4000, 40_000])
def test_a_buffer_of_the_expected_size_serves_the_pack(
    world_of: Callable[[int], list[list[Layout]]], rows: int
) -> None:
    """It is as large as the pack, and no more than an eighth and 4 MiB larger."""
    world = world_of(rows)
    plan = plan_save(world)
    total = sum(tensor.nbytes for tensor in plan.tensors)
    held = [sum(4 * box.volume for layout in own for box in layout.boxes) for own in world]
    for rank, pack in enumerate(plan.pack_sizes):
        size = expected_pack(min(held[rank], -(-total // RANKS)))
        assert pack <= -(-size // (2 * MIB)) * 2 * MIB <= pack + pack // 8 + 4 * MIB
