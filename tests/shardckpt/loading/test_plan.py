"""The plan of a load: every wanted element is read once, and little else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.format.box import Box
from shardckpt.format.chunks import chunk_bytes
from shardckpt.format.save_plan import plan_save
from shardckpt.loading.plan import describe, plan_reads
from tests.kit.layouts import (
    by_rank,
    fsdp,
    layouts,
    manifest_of,
    rows_of,
    worlds,
)

_settings = settings(deadline=None, max_examples=100)


@_settings
@given(st.data())
def test_reads_cover_every_wanted_box_exactly_once(data: st.DataObject) -> None:
    """For any saved layout and any wanted boxes: each element is copied once, from where it was stored."""
    plan = plan_save(data.draw(worlds()))
    manifest = manifest_of(plan)
    truth: dict[str, np.ndarray] = {}
    for number, t in enumerate(plan.tensors):
        count = math.prod(t.shape)
        truth[t.name] = np.arange(1, count + 1).reshape(t.shape) + 1000 * number
    stored = [truth[name][box.slices] for name, box in rows_of(plan)]
    wanted: list[tuple[str, Box]] = []
    for t in plan.tensors:
        for _ in range(data.draw(st.integers(0, 2))):
            low = [data.draw(st.integers(0, n)) for n in t.shape]
            size = [data.draw(st.integers(0, n - o)) for o, n in zip(low, t.shape, strict=True)]
            wanted.append((t.name, Box(tuple(low), tuple(size))))
    results = [np.zeros(box.shape, dtype=np.int64) for _, box in wanted]
    touched = [np.zeros(box.shape, dtype=np.int64) for _, box in wanted]
    reads = plan_reads(manifest, wanted)
    assert len({read.stored.row for read in reads}) == len(reads)
    for read in reads:
        chunk = read.stored
        assert (chunk.pack, chunk.offset) == (plan.writer[chunk.row], plan.offset[chunk.row])
        assert chunk.stop - chunk.offset == chunk_bytes(read.tensor.dtype, read.chunk)
        for copy in read.copies:
            results[copy.wanted][copy.target] = stored[chunk.row][copy.source]
            touched[copy.wanted][copy.target] += 1
    for (name, box), result, times in zip(wanted, results, touched, strict=True):
        assert np.array_equal(result, truth[name][box.slices])
        assert np.all(times == 1)
    places = [(read.stored.pack, read.stored.offset) for read in reads]
    assert places == sorted(places)


def test_reads_touch_only_what_is_wanted() -> None:
    """One row of a tensor needs one chunk of it, and the message names tensor, place and pack."""
    shape = (8, 3)
    manifest = manifest_of(plan_save(by_rank(layouts("t", "float32", shape, fsdp(shape, 4)))))
    (read,) = plan_reads(manifest, [("t", Box((5, 0), (1, 3)))])
    assert read.cell == Box((4, 0), (2, 3))
    assert read.copies[0].source == (slice(1, 2), slice(0, 3))
    told = describe(manifest, read.stored.row)
    assert all(part in told for part in ("'t'", "[4, 0]", "[2, 3]", "rank-00002/data.pack", "byte 0"))
    with pytest.raises(KeyError):
        plan_reads(manifest, [("u", Box((0,), (1,)))])
