"""Packs as `persist` leaves them, and their records, whatever blocks the storage writes in."""

from __future__ import annotations

import mmap
from pathlib import Path

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.format.chunks import ChunkLocation
from shardckpt.format.manifest import WrittenPack, pack_path
from shardckpt.run.pack_writer import persist
from shardckpt.storage import Storage, open_storage
from shardckpt.storage.protocol import Before
from tests.kit.faults import FaultyStorage

BLOCK = 16 << 20


class Blockwise(FaultyStorage):
    """Takes each block's bytes right after `before` was called for it: what comes later is lost."""

    block = 0

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        pack = bytearray()
        for start in range(0, len(buffer), self.block):
            stop = min(start + self.block, len(buffer))
            if before is not None:
                before(start, stop)
            pack += buffer[start:stop]
        super().write_pack(path, memoryview(pack))


def laid_out(sizes: list[int], align: int) -> tuple[list[ChunkLocation], int]:
    """Places of chunks of these sizes, one after another, and the bytes of their pack."""
    places, end = [], 0
    for row, nbytes in enumerate(sizes):
        offset = -(-end // align) * align
        places.append(ChunkLocation(10 * row, offset, nbytes))
        end = offset + nbytes + 4
    return places, end


def staged(places: list[ChunkLocation], size: int) -> memoryview:
    """A pack as it is staged: elements, and no checksums."""
    memory = mmap.mmap(-1, max(size, 1))
    for place in places:
        memory[place.offset : place.offset + place.nbytes] = _noise(place.nbytes, place.row)
    return memoryview(memory)[:size]


def assert_written(storage: Storage, places: list[ChunkLocation], part: WrittenPack) -> None:
    pack = storage.read(pack_path(3))
    assert part.size == len(pack)
    assert part.chunk == [place.row for place in places]
    assert part.offset == [place.offset for place in places]
    assert len(part.crc32c) == len(places)
    for place, checksum in zip(places, part.crc32c, strict=True):
        end = place.offset + place.nbytes
        assert pack[place.offset : end] == _noise(place.nbytes, place.row)
        assert checksum == crc32c.crc32c(pack[place.offset : end])
        assert pack[end : end + 4] == checksum.to_bytes(4, "little")


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), max_size=12),
    align=st.sampled_from([1, 4, 16]),
    block=st.integers(1, 50),
)
def test_chunks_and_checksums_across_blocks(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], align: int, block: int
) -> None:
    """Also where a block ends inside a chunk, right behind it, or inside its checksum."""
    places, size = laid_out(sizes, align)
    Blockwise.block = block
    storage = Blockwise(open_storage(f"memory://{tmp_path_factory.getbasetemp().name}"))
    part = persist(storage, staged(places, size), places, rank=3, per_rank={"a": 1})
    assert part.values == {"a": 1}
    assert_written(storage, places, part)


def test_large_packs_on_a_disk(tmp_path: Path) -> None:
    places, size = laid_out([BLOCK - 2, 5, 2 * BLOCK, BLOCK // 2, 100], 64)
    storage = open_storage(tmp_path)
    content = staged(places, size)
    told: list[int] = []
    part = persist(storage, content, places, rank=3, per_rank={}, progress=told.append)
    assert_written(storage, places, part)
    assert storage.read(pack_path(3)) == content
    assert told == [*range(0, size, BLOCK), size]


def test_a_second_tier_takes_the_checksums_of_the_first(tmp_path: Path) -> None:
    """They are not computed again: what has been damaged in memory since is found by who reads it."""
    places, size = laid_out([1000, 0, 3000], 64)
    content = staged(places, size)
    first = persist(open_storage(tmp_path / "1"), content, places, rank=3, per_rank={})
    second = open_storage(tmp_path / "2")
    told: list[int] = []
    part = persist(
        second,
        content,
        places,
        rank=3,
        per_rank={},
        checksums=first.crc32c,
        progress=told.append,
    )
    assert part == first
    assert_written(second, places, part)
    assert told == [0, size]
    content[10] ^= 1
    again = persist(second, content, places, rank=3, per_rank={}, checksums=first.crc32c)
    assert again == first


def test_an_error_of_progress_ends_it(tmp_path: Path) -> None:
    """There is no record of it, so that nobody relies on the pack."""
    places, size = laid_out([2 * BLOCK], 64)

    def stop(done: int) -> None:
        if done:
            raise InterruptedError("enough")

    storage = open_storage(tmp_path)
    with pytest.raises(OSError, match="enough"):
        persist(storage, staged(places, size), places, rank=3, per_rank={}, progress=stop)


def _noise(size: int, seed: int) -> bytes:
    """Bytes of which no two blocks are alike, always the same."""
    count = -(-size // 8)
    return (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(seed)).tobytes()[:size]
