"""What ranks hold, told once for all that are alike: the plan that follows from it is that of all their boxes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from shardckpt.errors import FormatError, RankMismatchError
from shardckpt.format.box import Box
from shardckpt.format.layouts import OWN, Layout, RankLayout, Split, WorldLayout
from shardckpt.format.save_plan import SavePlan, decode_plan, encode_plan, plan_save
from tests.kit.rank_layouts import boxes_of_ranks, draw_ranks
from tests.kit.reference_plan import reference_plan
from tests.kit.worlds import ThreadRanks, run_threads


@pytest.mark.parametrize("first", range(0, 120, 12))
def test_the_plan_is_that_of_all_boxes(first: int) -> None:
    """Meshes of every kind, stages, uneven and strided splits, ties, own tensors: chunk by chunk the same."""
    for seed in range(first, first + 12):
        ranks = draw_ranks(np.random.default_rng(seed))
        boxes = boxes_of_ranks(ranks)
        try:
            wanted = reference_plan(boxes)
        except RankMismatchError as error:
            with pytest.raises(RankMismatchError) as caught:
                plan_save(WorldLayout.of(ranks))
            assert str(caught.value) == str(error), seed
            continue
        plan = plan_save(WorldLayout.of(ranks))
        assert plan.tensors == wanted.tensors, seed
        assert plan.writer.tolist() == wanted.writer, seed
        assert plan.offset.tolist() == wanted.offset, seed
        assert list(plan.pack_sizes) == wanted.pack_sizes, seed
        rows, sources = plan.tied_rows
        assert dict(zip(rows.tolist(), sources.tolist(), strict=True)) == wanted.same_as, seed
        assert plan.has_shared == bool(wanted.replicas), seed
        for rank in range(len(ranks)):
            assert list(plan.writes(rank)) == wanted.writes[rank], seed
            assert plan.pack_size(rank) == wanted.pack_sizes[rank], seed
            shared = [(holders, held) for holders, held in wanted.replicas if rank in holders]
            assert sorted(plan.shared_by(rank)) == sorted(shared), seed


def _same_plan(one: SavePlan, other: SavePlan) -> bool:
    columns = [(plan.writer, plan.offset) for plan in (one, other)]
    return one.tensors == other.tensors and all(map(np.array_equal, *columns))


def _small_worlds(count: int) -> Iterator[tuple[list[RankLayout], SavePlan]]:
    """Worlds of 2 to 16 ranks that fit together, and the plan of all their boxes."""
    for seed in itertools.count():
        ranks = draw_ranks(np.random.default_rng(seed))
        if 2 <= len(ranks) <= 16 and count:
            with contextlib.suppress(RankMismatchError):
                yield ranks, plan_save(boxes_of_ranks(ranks))
                count -= 1
        if not count:
            return


@pytest.mark.parametrize(("ranks", "wanted"), list(_small_worlds(6)))
def test_ranks_find_out_what_all_hold(ranks: list[RankLayout], wanted: SavePlan) -> None:
    """Each rank passes its digest; then one rank of each kind what it holds. All make the same plan of it."""
    told: list[list[int]] = []

    def share(world: ThreadRanks) -> SavePlan:
        def gather(data: bytes) -> list[bytes]:
            gathered = world.gather(data)
            if world.rank == 0:
                told.append([len(each) for each in gathered])
            return gathered

        return plan_save(ranks[world.rank].share(world.rank, gather))

    plans = run_threads(len(ranks), share)
    assert all(_same_plan(plan, wanted) for plan in plans)
    assert len({plan.fingerprint for plan in plans}) == 1
    digests, contents = told
    assert max(digests) <= 32 + 4 * 8
    kinds = len({(rank.meshes, rank.common) for rank in ranks}) + len({rank.own for rank in ranks})
    assert sum(length > 0 for length in contents) <= kinds


def _fsdp(size: int) -> list[RankLayout]:
    weight = Layout("model/w", "float32", (4 * size, 3), (), mesh=0, splits=(Split(0, size, 0),))
    state = Layout(f"rng{OWN}", "uint8", (5,), (Box.whole((5,)),))
    return [RankLayout(((size,),), (rank,), (weight, None), (state,)) for rank in range(size)]


def test_ranks_that_differ_by_their_place_are_alike() -> None:
    """A thousand ranks with shards and a value of their own each: one of them tells what it holds."""
    ranks = _fsdp(1000)
    world = WorldLayout.of(ranks)
    assert (len(world.commons), len(world.owns)) == (1, 1)
    assert len(world.encode()) < 20 * len(ranks)
    plan = plan_save(world)
    assert len(plan.tensors) == 1001
    assert [write.name for write in plan.writes(999)] == ["model/w", "rng/rank-00999"]


def test_a_plan_for_another_process() -> None:
    """It makes the same plan from the layouts, and refuses what another planner had made of them."""
    plan = plan_save(WorldLayout.of(_fsdp(5)))
    data = encode_plan(plan)
    again = decode_plan(data)
    assert _same_plan(plan, again)
    assert again.fingerprint == plan.fingerprint
    other = plan_save(WorldLayout.of(_fsdp(5)))
    other.writer[0] = 1
    with pytest.raises(FormatError, match="another version"):
        decode_plan(encode_plan(other))


def test_a_rank_outside_a_mesh_holds_nothing() -> None:
    """Ranks of which only some are in a tensor's mesh."""
    layout = Layout("t", "int8", (6,), (), mesh=0, splits=(Split(0, 2, 0),))
    world = WorldLayout.of([RankLayout(((2,),), (place,), (layout,)) for place in (-1, 0, 1, -1)])
    assert plan_save(world).writer.tolist() == [1, 2]
