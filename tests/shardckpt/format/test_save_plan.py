"""The plan of a save: properties of it, over layouts of every kind."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.errors import RankMismatchError
from shardckpt.format import holders as plan_module
from shardckpt.format.box import Box
from shardckpt.format.chunks import CRC_BYTES
from shardckpt.format.dtypes import itemsize
from shardckpt.format.holders import MAX_CHUNK
from shardckpt.format.layouts import Layout
from shardckpt.format.manifest_codec import decode_manifest, encode_record
from shardckpt.format.save_plan import SavePlan, plan_save
from tests.kit.layouts import (
    by_rank,
    fsdp,
    fsdp_tp,
    layouts,
    manifest_of,
    replicated,
    rows_of,
    worlds,
)

_settings = settings(deadline=None, max_examples=100)
_MIB = 1 << 20


@_settings
@given(worlds())
def test_every_element_is_planned_exactly_once(world: list[list[Layout]]) -> None:
    """The chunks of each tensor cover each element once, and each is written by a rank that holds it."""
    plan = plan_save(world)
    count = {t.name: np.zeros(t.shape, dtype=np.int64) for t in plan.tensors}
    held = {(rank, t.name): t.boxes for rank, layout in enumerate(world) for t in layout}
    for (name, box), writer in zip(rows_of(plan), plan.writer, strict=True):
        count[name][box.slices] += 1
        holds = [b for b in held[writer, name] if b.intersect(box) is not None or not b.shape]
        assert len(holds) == 1
        assert box.relative_to(holds[0].offsets).inside(holds[0].shape), "a chunk crosses a shard's edge"
    assert all(np.all(n == 1) for n in count.values())
    assert {t.name for t in plan.tensors} == {t.name for layout in world for t in layout}


@_settings
@given(worlds())
def test_packs_are_aligned_and_without_overlap(world: list[list[Layout]]) -> None:
    """Chunks follow one another in the pack, aligned; the pack ends with the last checksum."""
    plan = plan_save(world)
    rows = Counter(write.location.row for rank in range(len(world)) for write in plan.writes(rank))
    assert rows == Counter(range(len(plan.writer)))
    for rank in range(len(world)):
        end = 0
        for write in plan.writes(rank):
            assert plan.writer[write.location.row] == rank
            assert plan.offset[write.location.row] == write.location.offset
            assert write.location.offset % (4096 if write.location.nbytes >= _MIB else 64) == 0
            assert end <= write.location.offset < end + 4096
            end = write.location.offset + write.location.nbytes + CRC_BYTES
        assert plan.pack_sizes[rank] == end


@_settings
@given(worlds())
def test_a_manifest_made_from_a_plan_is_valid(world: list[list[Layout]]) -> None:
    """What a commit writes for any plan passes the reader's own checks."""
    manifest = manifest_of(plan_save(world))
    assert decode_manifest(encode_record(manifest), "/somewhere") == manifest


@_settings
@given(worlds())
def test_all_ranks_make_the_same_plan(world: list[list[Layout]]) -> None:
    """Planning is a function of the layouts alone; another layout has another fingerprint."""
    one, other = plan_save(world), plan_save(world)
    assert one.tensors == other.tensors
    assert np.array_equal(one.writer, other.writer)
    assert np.array_equal(one.offset, other.offset)
    assert one.fingerprint == other.fingerprint
    more = plan_save([[*layout, Layout("more", "int8", (), (Box((), ()),))] for layout in world])
    assert more.fingerprint != one.fingerprint
    assert 0 <= one.fingerprint < 1 << 62


def test_a_large_chunk_is_aligned_to_a_page() -> None:
    """A chunk of 1 MiB or more begins at a multiple of 4096, a smaller one at a multiple of 64."""
    tensors = [
        layouts("a", "uint8", (3,), replicated((3,), 1)),
        layouts("b", "uint8", (_MIB,), replicated((_MIB,), 1)),
        layouts("c", "uint8", (_MIB - 1,), replicated((_MIB - 1,), 1)),
        layouts("d", "uint8", (_MIB,), replicated((_MIB,), 1)),
    ]
    plan = plan_save(by_rank(*tensors))
    after_b = 4096 + _MIB + CRC_BYTES
    assert tuple(plan.offset[:3]) == (0, 4096, -(-after_b // 64) * 64)
    assert plan.offset[3] % 4096 == 0


@pytest.mark.parametrize(
    ("shape", "held", "chunk"),
    [
        ((), replicated((), 3), ()),
        ((8, 3), fsdp((8, 3), 4), (2, 3)),
        ((10, 3), fsdp((10, 3), 4), (3, 3)),
        ((2, 3), fsdp((2, 3), 4), (1, 3)),
        ((5,), fsdp((5,), 4), (2,)),
        ((0, 3), fsdp((0, 3), 4), (1, 3)),
        ((3, 0), replicated((3, 0), 2), (3, 1)),
        ((4, 6), [(Box((0, 3 * j), (4, 3)),) for j in range(2)], (4, 3)),
        ((4, 6), [(Box((2 * i, 3 * j), (2, 3)),) for i in range(2) for j in range(2)], (2, 3)),
        ((8, 2), fsdp_tp((8, 2), 2, 2), (2, 2)),
        ((7,), replicated((7,), 2), (7,)),
    ],
)
def test_a_regular_grid_is_one_array(
    shape: tuple[int, ...], held: list[tuple[Box, ...]], chunk: tuple[int, ...]
) -> None:
    """Boxes that form a chunk grid, the last ones shorter, become one Zarr array with these chunks."""
    (tensor,) = plan_save(by_rank(layouts("t", "float32", shape, held))).tensors
    assert tensor.is_array
    assert tensor.arrays[0].chunk == chunk


@pytest.mark.parametrize(
    ("shape", "held"),
    [
        ((5,), [(Box((0,), (2,)),), (Box((2,), (3,)),)]),
        ((6,), [(Box((0,), (1,)),), (Box((1,), (2,)),), (Box((3,), (3,)),)]),
        ((9, 2), fsdp_tp((9, 2), 2, 2)),
        ((4, 4), [(Box((0, 0), (2, 4)), Box((2, 0), (2, 2))), (Box((2, 2), (2, 2)),)]),
    ],
)
def test_irregular_boxes_are_a_group(shape: tuple[int, ...], held: list[tuple[Box, ...]]) -> None:
    """Boxes that form no grid become one array each, with their places."""
    (tensor,) = plan_save(by_rank(layouts("t", "float32", shape, held))).tensors
    assert not tensor.is_array
    assert sorted(a.box for a in tensor.arrays) == sorted(box for boxes in held for box in boxes)


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("hybrid", [False, True])
def test_replicated_boxes_are_spread(world: int, hybrid: bool) -> None:
    """DDP and HSDP: each box is written by one holder, and all ranks write equally much, +-1 chunk."""
    rng = np.random.default_rng(world)
    tensors = []
    for number, rows in enumerate(rng.integers(1, 5000, size=60)):
        shape = (int(rows) * world, 7)
        held = fsdp(shape, world) * 2 if hybrid else replicated(shape, world)
        tensors.append(layouts(f"t{number:02d}", "float32", shape, held))
    ranks = 2 * world if hybrid else world
    plan = plan_save(by_rank(*tensors))
    written = [sum(w.location.nbytes for w in plan.writes(rank)) for rank in range(ranks)]
    largest = max(w.location.nbytes for rank in range(ranks) for w in plan.writes(rank))
    assert sum(written) == sum(t.nbytes for t in plan.tensors)
    groups = [[written[r], written[r + world]] for r in range(world)] if hybrid else [written]
    for group in groups:
        assert max(group) - min(group) <= largest


def test_a_large_replicated_tensor_is_shared_out() -> None:
    """One tensor of several chunks is written by all its holders together."""
    shape = (256, _MIB)
    plan = plan_save(by_rank(layouts("t", "uint8", shape, replicated(shape, 4))))
    assert [sum(w.location.nbytes for w in plan.writes(rank)) for rank in range(4)] == [64 * _MIB] * 4


def test_the_lowest_holder_writes_what_may_differ() -> None:
    """Buffers of DDP, which may differ between ranks, come from rank 0, and are no replicas to compare."""
    plan = plan_save(by_rank(layouts("t", "float32", (4,), replicated((4,), 3), first_holder=True)))
    assert plan.writer.tolist() == [0]
    assert not plan.has_shared


def test_replicas_name_what_must_be_equal() -> None:
    """For each set of holders, the boxes that they share; sharded boxes are in none."""
    plan = plan_save(
        by_rank(
            layouts("all", "float32", (4,), replicated((4,), 3)),
            layouts("none", "float32", (3,), fsdp((3,), 3)),
            layouts("two", "int8", (2,), [(), (Box((0,), (2,)),), (Box((0,), (2,)),)]),
        )
    )
    all_ranks = ((0, 1, 2), (("all", Box((0,), (4,))),))
    two_ranks = ((1, 2), (("two", Box((0,), (2,))),))
    assert [plan.shared_by(rank) for rank in range(3)] == [
        [all_ranks],
        [all_ranks, two_ranks],
        [all_ranks, two_ranks],
    ]


@_settings
@given(
    rows=st.integers(1, 400),
    width=st.integers(1, 2 * _MIB),
    world=st.integers(1, 9),
    dtype=st.sampled_from(["uint8", "bfloat16", "float32", "complex128"]),
    whole=st.booleans(),
)
def test_large_boxes_are_cut_along_the_first_dimension(
    rows: int, width: int, world: int, dtype: str, whole: bool
) -> None:
    """Chunks have at most MAX_CHUNK bytes wherever a cut along the first dimension keeps the grid regular."""
    shape = (rows, width)
    held = replicated(shape, world) if whole else fsdp(shape, world)
    plan = plan_save(by_rank(layouts("t", dtype, shape, held)))
    (tensor,) = plan.tensors
    assert tensor.is_array
    (array,) = tensor.arrays
    box = rows if whole or world == 1 else -(-rows // world)
    row = width * itemsize(dtype)
    assert array.chunk[1] == width
    if array.chunk[0] * row > MAX_CHUNK:
        # A row is too large by itself, or no divisor of the box gives chunks of a useful size.
        most = max(1, MAX_CHUNK // row)
        divisors = [n for n in range(1, box) if box % n == 0 and n * row <= MAX_CHUNK]
        assert array.chunk[0] == 1 or (box < rows and max(divisors, default=0) * 8 < most)
    if box < rows:
        assert box % array.chunk[0] == 0, "a cut crosses the edge between two shards"
    if box * row <= MAX_CHUNK:
        assert array.chunk[0] == box, "what is small enough is not cut"


def test_the_limit_of_chunks_is_what_the_format_says() -> None:
    """MAX_CHUNK is no more than the 64 MiB that docs/format.md allows."""
    assert MAX_CHUNK <= 64 * _MIB
    assert "MAX_CHUNK" in plan_module.__all__


def test_tied_tensors_share_chunks() -> None:
    """Two names of one memory on all ranks: stored once, both readable; a name tied on one rank only is not."""
    held = fsdp((6, 2), 3)
    layout = by_rank(
        layouts("a", "float32", (6, 2), held),
        [Layout("b", "float32", (6, 2), boxes, "a") for boxes in held],
        [Layout("c", "float32", (6, 2), boxes, "a" if r == 0 else None) for r, boxes in enumerate(held)],
    )
    plan = plan_save(layout)
    assert tied(plan) == {3: 0, 4: 1, 5: 2}
    assert np.array_equal(plan.offset[3:6], plan.offset[0:3])
    assert np.array_equal(plan.writer[3:6], plan.writer[0:3])
    assert {w.name for rank in range(3) for w in plan.writes(rank)} == {"a", "c"}
    manifest = manifest_of(plan)
    assert decode_manifest(encode_record(manifest), "/somewhere") == manifest


def test_ranks_without_elements_do_not_untie() -> None:
    """A rank that holds nothing of two tied tensors cannot tell that they are, and need not."""
    held = fsdp((2,), 3)
    layout = by_rank(
        layouts("a", "float32", (2,), held),
        [Layout("b", "float32", (2,), boxes, "a" if boxes else None) for boxes in held],
    )
    assert tied(plan_save(layout)) == {2: 0, 3: 1}
    assert tied(plan_save(layout[::-1])) == {2: 0, 3: 1}


def test_a_tie_to_what_is_elsewhere_is_none() -> None:
    """An alias that another layout, or a chain of aliases, makes doubtful is stored by itself."""
    one, two = (Box((0,), (2,)),), (Box((2,), (2,)),)
    layout = [
        [Layout("a", "float32", (4,), one), Layout("b", "float32", (4,), two, "a")],
        [Layout("a", "float32", (4,), two), Layout("b", "float32", (4,), one, "a")],
    ]
    plan = plan_save(layout)
    assert not plan.same_as
    assert len(set(zip(plan.writer, plan.offset, strict=True))) == 4


_BOX = Box((0,), (4,))


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (
            [[Layout("t", "float32", (4,), (_BOX,))], [Layout("t", "float32", (5,), ())]],
            "'t'.*float32 of shape \\[4\\] on rank 0 and float32 of shape \\[5\\] on rank 1",
        ),
        (
            [[Layout("t", "float32", (4,), (_BOX,))], [Layout("t", "float16", (4,), (_BOX,))]],
            "'t'.*float32.*float16.*rank 1",
        ),
        (
            [[Layout("t", "int8", (4,), (Box((0,), (2,)),))], [Layout("t", "int8", (4,), ())]],
            "'t'.*has 4 elements, but the ranks' boxes have 2",
        ),
        (
            [
                [Layout("t", "int8", (4,), (Box((0,), (3,)),))],
                [Layout("t", "int8", (4,), (Box((2,), (2,)),))],
            ],
            "'t'.*boxes have 5",
        ),
        (
            [
                [Layout("t", "int8", (4,), (Box((0,), (2,)),))],
                [Layout("t", "int8", (4,), (Box((1,), (2,)),))],
            ],
            "'t'.*overlap in part",
        ),
        ([[Layout("t", "int8", (), ())]], "'t'.*boxes have 0"),
    ],
)
def test_layouts_that_do_not_fit_together(world: list[list[Layout]], message: str) -> None:
    """Ranks that disagree about shape or type, gaps and partial overlap: an error that names the tensor."""
    with pytest.raises(RankMismatchError, match=message):
        plan_save(world)


# -- reading


def tied(plan: SavePlan) -> dict[int, int]:
    """Row of a tied tensor -> the row whose chunk it shares."""
    rows, sources = plan.tied_rows
    return dict(zip(rows.tolist(), sources.tolist(), strict=True))


def _spread_over(plan: SavePlan) -> dict[int, list[str]]:
    names = defaultdict(list)
    for rank in range(len(plan.pack_sizes)):
        names[rank] = [write.name for write in plan.writes(rank)]
    return names


@pytest.mark.parametrize("make", [fsdp, replicated])
def test_a_rank_may_have_nothing_to_write(make: Callable[..., list[tuple[Box, ...]]]) -> None:
    """Fewer elements than ranks: some packs are empty, and the checkpoint is whole."""
    plan = plan_save(by_rank(layouts("t", "float32", (2,), make((2,), 5))))
    assert sum(size > 0 for size in plan.pack_sizes) == (2 if make is fsdp else 1)
    assert sum(len(names) for names in _spread_over(plan).values()) == len(plan.writer)
    decode_manifest(encode_record(manifest_of(plan)), "/somewhere")
