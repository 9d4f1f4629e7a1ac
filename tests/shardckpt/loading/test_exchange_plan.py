"""Who fetches for whom: every need is met once, by one who can, and all do about as much."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.errors import CorruptError
from shardckpt.format.manifest import ArrayEntry, Chunks, Manifest, Pack, TensorEntry
from shardckpt.loading.exchange_plan import ExchangePlanner, SharedRead
from shardckpt.loading.limits import DEFAULT_LIMITS

CHUNK = 64 << 10
PACKS = 4


def manifest_of(rows: list[tuple[int, int]]) -> Manifest:
    """A manifest with a chunk of 64 KiB for each (pack, place)."""
    shape = (CHUNK,)
    return Manifest(
        id="test",
        step=1,
        attempt=0,
        world_size=1,
        created=0.0,
        writer="",
        metrics={},
        values={},
        per_rank=[{}],
        packs=tuple(Pack(f"rank-{number:05d}/data.pack", 1 << 40) for number in range(PACKS)),
        tensors=tuple(
            TensorEntry(f"t{row}", "uint8", shape, (ArrayEntry(offset=(0,), shape=shape, chunk=shape),))
            for row in range(len(rows))
        ),
        chunks=Chunks(
            pack=[pack for pack, _ in rows],
            offset=[place * (CHUNK + 4096) for _, place in rows],
            crc32c=[0] * len(rows),
        ),
    )


def plan(manifest: Manifest, needs: list[set[int]], reaches: list[set[int]]) -> list[list[SharedRead]]:
    planner = ExchangePlanner(manifest)
    messages = [planner.encode(need, reach) for need, reach in zip(needs, reaches, strict=True)]
    return planner.plan(messages, "here")


worlds = st.integers(1, 5).flatmap(
    lambda ranks: st.tuples(
        st.lists(st.tuples(st.integers(0, PACKS - 1), st.integers(0, 40)), min_size=1, max_size=30),
        st.lists(st.sets(st.integers(0, 29)), min_size=ranks, max_size=ranks),
        st.lists(st.sets(st.integers(0, PACKS - 1)), min_size=ranks, max_size=ranks),
    )
)


@settings(deadline=None, max_examples=200)
@given(worlds)
def test_every_need_is_met_once(
    world: tuple[list[tuple[int, int]], list[set[int]], list[set[int]]],
) -> None:
    """Whatever is needed and can be reached; the same bytes under two names are one chunk."""
    rows, needs, reaches = world
    manifest = manifest_of(rows)
    needs = [{row for row in need if row < len(rows)} for need in needs]
    wanted: dict[tuple[int, int], set[int]] = {}
    for rank, need in enumerate(needs):
        for row in need:
            wanted.setdefault(rows[row], set()).add(rank)
    reachable = set().union(*reaches)
    if any(pack not in reachable for pack, _ in wanted):
        with pytest.raises(CorruptError, match="no rank can read the pack"):
            plan(manifest, needs, reaches)
        return
    batches = plan(manifest, needs, reaches)
    met: dict[tuple[int, int], set[int]] = {}
    for unit in (unit for batch in batches for unit in batch):
        assert [chunk.offset for chunk in unit.chunks] == sorted({chunk.offset for chunk in unit.chunks})
        for chunk in unit.chunks:
            assert (chunk.nbytes, rows[chunk.row][0]) == (CHUNK, chunk.pack)
            assert chunk.pack in reaches[unit.fetcher]
            assert rows[chunk.row] not in met
            met[rows[chunk.row]] = set(unit.needers)
    for place, ranks in wanted.items():
        (first, *more) = ranks
        if more or place[0] not in reaches[first]:
            assert met.pop(place) == ranks
    assert not met  # nothing is passed on that only its fetcher needs


def test_all_fetch_as_much() -> None:
    """Neighbours stay together, and what one rank reads for itself alone counts, too."""
    manifest = manifest_of([(0, place) for place in range(1024)])
    everything, everywhere = set(range(1024)), [{0}] * 4
    units = [unit for batch in plan(manifest, [everything] * 4, everywhere) for unit in batch]
    assert sorted(Counter(unit.fetcher for unit in units).values()) == [2, 2, 2, 3]
    assert max(unit.nbytes for unit in units) > DEFAULT_LIMITS.shared_read * 0.9
    alone = set(range(512))
    batches = plan(manifest, [everything, everything - alone], [{0}, {0}])
    assert {unit.fetcher for batch in batches for unit in batch} == {1}


def test_batches_are_bounded() -> None:
    """No rank sends or receives more than 16 MiB in one, and in each all have something to fetch."""
    manifest = manifest_of([(pack, place) for pack in range(4) for place in range(1024)])
    batches = plan(manifest, [set(range(4096))] * 2, [{0, 1, 2, 3}] * 2)
    assert len(batches) > 10
    for batch in batches:
        assert sum(unit.nbytes for unit in batch) <= DEFAULT_LIMITS.batch
    assert all({unit.fetcher for unit in batch} == {0, 1} for batch in batches[:-2])
