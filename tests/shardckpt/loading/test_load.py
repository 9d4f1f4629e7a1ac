"""Loads from local files, memory and remote storage: how much is read, by whom, and what goes wrong."""

from __future__ import annotations

import os
import re
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from shardckpt.errors import CorruptError, StorageError
from shardckpt.format.box import Box, Piece
from shardckpt.format.manifest import Chunks, Manifest
from shardckpt.loading.fill import fill
from shardckpt.loading.limits import LoadLimits
from shardckpt.loading.pack_reader import MemoryPacks, Source
from shardckpt.ranks.world import Alone, Ranks, TorchRanks, current_ranks
from shardckpt.run.places import Place, read_manifest
from shardckpt.state.tensors import TensorShard, tensor_shard
from shardckpt.storage import LocalStorage, Storage, open_storage
from shardckpt.storage.local_file import LocalFile
from tests.kit.faults import FaultyStorage
from tests.kit.worlds import outcomes, run_processes, run_threads, save_local

ROWS, COLUMNS, TENSORS = 48, 64, 6
State = list[TensorShard]


class Remote(FaultyStorage):
    """A folder as if it were far away. `fetched` has the (path, bytes) of each read."""

    def __init__(
        self, inner: Storage, fail_at: int | None = None, error: BaseException | None = None
    ) -> None:
        super().__init__(inner, fail_at, error)
        self.fetched: list[tuple[str, int]] = []

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        super().read_into(path, offset, buffer)
        self.fetched.append((path, buffer.nbytes))


class Watched(LocalStorage):
    """A local folder.

    Attributes:
        fetched: the paths that were read by requests.
        opened: the paths that were opened for many reads.
        kind: what is opened for them.
        spoil: called after each check of a size.
    """

    def __init__(self, path: str, kind: type[LocalFile] = LocalFile) -> None:
        super().__init__(path)
        self.fetched: list[str] = []
        self.opened: list[str] = []
        self.kind = kind
        self.spoil: Callable[[Path], object] = lambda _: None

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        self.fetched.append(path)
        super().read_into(path, offset, buffer)

    def open_file(self, path: str) -> LocalFile:
        self.opened.append(path)
        full = f"{self.url}/{path}"
        return self.kind(os.open(full, os.O_RDONLY), full)

    def size(self, path: str) -> int:
        found = super().size(path)
        self.spoil(Path(self.url) / path)
        return found


class Cold(LocalFile):
    """Nothing of it is in the page cache."""

    def read_cached(self, offset: int, buffers: Sequence[memoryview]) -> int:  # noqa: ARG002
        return 0


class Patchy(LocalFile):
    """Every other 1000 bytes of it are in the page cache."""

    def read_cached(self, offset: int, buffers: Sequence[memoryview]) -> int:
        if offset // 1000 % 2:
            return 0
        return super().read_cached(offset, [buffers[0][: 1000 - offset % 1000]])


class WithoutDirect(Cold):
    """Its file system has no O_DIRECT."""

    def read_direct(self, offset: int, buffer: memoryview) -> int:  # noqa: ARG002
        return -1


def content(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(ROWS, COLUMNS, generator=generator)


def shards(parts: int, part: int, *, filled: bool = False, is_new: bool = False) -> State:
    """What one of so many ranks holds of each tensor: an even part of its rows."""
    start, stop = part * ROWS // parts, (part + 1) * ROWS // parts
    box = Box((start, 0), (stop - start, COLUMNS))
    pieces = (Piece(box, (0, 0)),) if box.volume else ()
    return [
        TensorShard(
            f"t{i}",
            "float32",
            (ROWS, COLUMNS),
            pieces,
            content(i)[start:stop].clone() if filled else torch.zeros(box.shape),
            is_new=is_new,
        )
        for i in range(TENSORS)
    ]


def save(path: Path, parts: int = 4) -> Manifest:
    return save_local(open_storage(path), [shards(parts, i, filled=True) for i in range(parts)])[1]


def assert_loaded(state: State, parts: int, part: int) -> None:
    for found, wanted in zip(state, shards(parts, part, filled=True), strict=True):
        assert torch.equal(found.data, wanted.data), (found.name, part)


def assert_untouched(state: State) -> None:
    assert not any(tensor.data.any() for tensor in state)


def memory(
    path: Path, manifest: Manifest, numbers: Sequence[int], *, has_checksums: bool = True
) -> MemoryPacks:
    """The packs of a checkpoint as a saver holds them; the memory is read-only and larger than the pack."""
    held = {number: (path / manifest.packs[number].path).read_bytes() + b"\xff" * 5 for number in numbers}
    return MemoryPacks("memory", {n: memoryview(data) for n, data in held.items()}, has_checksums)


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


# -- local files


@pytest.mark.parametrize("kind", [LocalFile, Cold, Patchy, WithoutDirect])
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("is_new", [False, True])
def test_local_packs(is_new: bool, atomic: bool, kind: type[LocalFile], tmp_path: Path) -> None:
    """Whatever of them is in the page cache, they are opened once, and no request is made."""
    manifest = save(tmp_path)
    storage = Watched(str(tmp_path), kind)
    state = shards(1, 0, is_new=is_new)
    assert fill(Place(storage), manifest, state, Alone(), atomic=atomic) == manifest.nbytes
    assert_loaded(state, 1, 0)
    assert sorted(storage.opened) == sorted(pack.path for pack in manifest.packs)
    assert not storage.fetched


def test_more_packs_than_are_open_at_a_time(tmp_path: Path) -> None:
    """A file that was closed is opened again."""
    manifest = save(tmp_path)
    storage = Watched(str(tmp_path))
    state = shards(1, 0)
    fill(Place(storage), manifest, state, Alone(), limits=LoadLimits(open_files=1))
    assert_loaded(state, 1, 0)
    assert len(storage.opened) > len(manifest.packs)


@pytest.mark.parametrize("is_new", [False, True])
def test_local_chunks_are_not_held(is_new: bool, tmp_path: Path) -> None:
    """Not for live tensors either, which are read twice."""
    wanted = torch.arange(1 << 21).view(64, -1)
    root = Watched(str(tmp_path), Cold)
    _, manifest = save_local(root, [[tensor_shard(wanted[i], f"t{i}") for i in range(64)]])
    made = torch.zeros_like(wanted)
    targets = [replace(tensor_shard(made[i], f"t{i}"), is_new=is_new) for i in range(64)]
    limits = LoadLimits(near_request=1 << 20, direct=64 << 10)
    tracemalloc.start()
    try:
        fill(Place(root), manifest, targets, Alone(), limits=limits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert torch.equal(made, wanted)
    assert peak < 13 << 20  # of 16 MiB; a block is aligned to 2 MiB, and there are up to 4


class Truncating(Alone):
    """Has a file cut short at the second thing that ranks agree on: between verifying and applying."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._calls = 0

    def maximum(self, values: Sequence[int], doing: str = "") -> list[int]:  # noqa: ARG002
        self._calls += 1
        if self._calls == 2:
            os.truncate(self._path, 100)
        return super().maximum(values)


def _load_while_truncated(_: int, path: Path, when: str) -> tuple[str, bool]:
    root = Watched(str(path))
    pack = path / "rank-00000/data.pack"
    ranks = Alone()
    if when == "before":
        root.spoil = lambda found: os.truncate(found, 100)
    else:
        ranks = Truncating(pack)
    state = shards(1, 0)
    try:
        fill(Place(root), read_manifest(Place(root)), state, ranks)
    except CorruptError as error:
        return str(error), any(bool(tensor.data.any()) for tensor in state)
    return "", True


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pack_truncated_while_it_is_read(when: str, tmp_path: Path) -> None:
    """After its size was checked, or after it was verified: an error, and never the end of the process."""
    save(tmp_path, 1)
    ((told, changed),) = run_processes(1, _load_while_truncated, tmp_path, when)
    assert "is truncated" in told
    assert when == "after" or not changed


# -- remote storage


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize(("ranks", "parts"), [(3, 1), (3, 3), (5, 5), (4, 2), (1, 1)])
def test_a_job_fetches_each_byte_once(ranks: int, parts: int, is_new: bool, tmp_path: Path) -> None:
    """Replicated, resharded, or both: 1.05 times the checkpoint's bytes at most; in one batch or many."""
    manifest = save(tmp_path)
    # Small enough for many batches and requests, large enough for several chunks in each
    limits = LoadLimits(shared_read=8 << 10, batch=20 << 10, ahead=16 << 10)
    storage = Remote(open_storage(tmp_path))

    def load(world: Ranks) -> None:
        state = shards(parts, world.rank % parts, is_new=is_new)
        fill(Place(storage), manifest, state, world, limits=limits)
        assert_loaded(state, parts, world.rank % parts)

    run_threads(ranks, load)
    fetched = sum(nbytes for _, nbytes in storage.fetched)
    assert manifest.nbytes <= fetched <= 1.05 * manifest.nbytes


def test_ranks_fetch_equally_much(tmp_path: Path) -> None:
    """What all need is divided among them."""
    manifest = save(tmp_path)
    storages = [Remote(open_storage(tmp_path)) for _ in range(2)]
    run_threads(2, lambda ranks: fill(Place(storages[ranks.rank]), manifest, shards(1, 0), ranks))
    one, other = (sum(nbytes for _, nbytes in storage.fetched) for storage in storages)
    assert one == other


@pytest.mark.parametrize("parts", [1, 3])
def test_a_bad_chunk_that_is_passed_on(parts: int, tmp_path: Path) -> None:
    """The rank that fetches it finds it; the same error comes to every rank, and no state changes."""
    manifest = save(tmp_path)
    flip(tmp_path / "rank-00002/data.pack", 8)
    place = Place(Remote(open_storage(tmp_path)))
    states = [shards(parts, rank % parts) for rank in range(3)]
    told = outcomes(3, lambda ranks: fill(place, manifest, states[ranks.rank], ranks))
    assert {type(error) for error in told} == {CorruptError}
    (message,) = {re.sub(r"^rank \d: ", "", str(error)) for error in told}
    assert "rank-00002/data.pack, byte 0" in message
    for state in states:
        assert_untouched(state)


def test_a_storage_that_fails_for_one_rank(tmp_path: Path) -> None:
    """Nobody waits for it."""
    manifest = save(tmp_path)

    class Broken(Remote):
        def read_into(self, *_: Any) -> None:
            raise StorageError("out of reach")

    storages = [Remote(open_storage(tmp_path)), Broken(open_storage(tmp_path))]
    states = [shards(1, 0) for _ in storages]
    told = outcomes(2, lambda r: fill(Place(storages[r.rank]), manifest, states[r.rank], r))
    assert [str(error) for error in told] == ["rank 1: out of reach", "out of reach"]
    for state in states:
        assert_untouched(state)


@pytest.mark.parametrize("is_new", [False, True])
def test_remote_chunks_are_held_for_live_tensors_only(is_new: bool, tmp_path: Path) -> None:
    """New memory gets its content as it comes: one pass, and never all of it twice in memory."""
    wanted = torch.arange(1 << 20).view(64, -1)
    made = torch.empty_like(wanted)
    root = open_storage(tmp_path)
    _, manifest = save_local(root, [[tensor_shard(wanted[i::64], f"t{i}") for i in range(64)]])
    targets = [replace(tensor_shard(made[i::64], f"t{i}"), is_new=is_new) for i in range(64)]
    limits = LoadLimits(far_request=64 << 10)  # one tensor, or none
    tracemalloc.start()
    try:
        fill(Place(Remote(root)), manifest, targets, Alone(), limits=limits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert torch.equal(made, wanted)
    assert (peak < wanted.nbytes / 2) == is_new


def test_tied_tensors_are_passed_on_once(tmp_path: Path) -> None:
    """Two names for the same stored bytes: fetched once, also where each rank wants another name."""
    manifest = save(tmp_path, 1)
    rows = manifest.chunks
    (other,) = (tensor for tensor in manifest.tensors if tensor.name == "t0")
    tied = msgspec.structs.replace(
        manifest,
        tensors=(*manifest.tensors, msgspec.structs.replace(other, name="tied")),
        chunks=Chunks(*(np.append(c, c[0]) for c in (rows.pack, rows.offset, rows.crc32c))),
    )
    storage = Remote(open_storage(tmp_path))
    names = [["t0"], ["tied"], ["t0", "tied"]]

    def load(ranks: Ranks) -> None:
        state = [replace(shards(1, 0)[0], name=name) for name in names[ranks.rank]]
        fill(Place(storage), tied, state, ranks)
        assert all(torch.equal(tensor.data, content(0)) for tensor in state)

    run_threads(3, load)
    assert sum(nbytes for _, nbytes in storage.fetched) <= 1.05 * other.nbytes


# -- memory


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("has_checksums", [False, True])
def test_snapshots(has_checksums: bool, is_new: bool, tmp_path: Path) -> None:
    """They load like files; without checksums nothing is compared with them."""
    manifest = save(tmp_path)
    if not has_checksums:
        table = manifest.chunks
        unknown = Chunks(table.pack, table.offset, np.zeros_like(table.crc32c))
        manifest = msgspec.structs.replace(manifest, chunks=unknown)
    source = memory(tmp_path, manifest, range(4), has_checksums=has_checksums)
    state = shards(1, 0, is_new=is_new)
    fill(source, manifest, state, Alone())
    assert_loaded(state, 1, 0)


def test_a_snapshot_that_is_not_what_was_saved(tmp_path: Path) -> None:
    """With checksums it is found."""
    manifest = save(tmp_path)
    flip(tmp_path / "rank-00001/data.pack", 8)
    state = shards(1, 0)
    with pytest.raises(CorruptError, match=r"^memory: .*rank-00001/data.pack, byte 0"):
        fill(memory(tmp_path, manifest, range(4)), manifest, state, Alone())
    assert_untouched(state)


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_snapshots_on_several_nodes(parts: int, is_new: bool, tmp_path: Path) -> None:
    """What another node holds comes from one of its ranks, whether these need it themselves or not."""
    manifest = save(tmp_path)
    nodes = [memory(tmp_path, manifest, held) for held in ((0, 1), (3,), (2,))]

    def load(ranks: Ranks) -> None:
        part = (ranks.rank + 1) % parts
        state = shards(parts, part, is_new=is_new)
        fill(nodes[ranks.rank % 3], manifest, state, ranks)
        assert_loaded(state, parts, part)

    run_threads(5, load)


def test_a_snapshot_that_nobody_holds(tmp_path: Path) -> None:
    """The same error on every rank."""
    manifest = save(tmp_path)
    nodes = [memory(tmp_path, manifest, held) for held in ((0, 1), (3,))]
    states = [shards(2, rank) for rank in range(2)]
    for error in outcomes(2, lambda ranks: fill(nodes[ranks.rank], manifest, states[ranks.rank], ranks)):
        assert isinstance(error, CorruptError)
        assert "no rank can read the pack rank-00002/data.pack" in str(error)
    for state in states:
        assert_untouched(state)


# -- real processes


def _exchange(rank: int, path: Path) -> Any:
    ranks = current_ranks()
    assert isinstance(ranks, TorchRanks)
    # Several messages between the same two, of different lengths, from memory that is read-only
    lengths = {peer: [3 + rank, 1 << 20, 5 + peer] for peer in range(3) if peer != rank}
    sends = [(peer, memoryview(bytes([rank]) * n)) for peer, ns in lengths.items() for n in ns]
    receives = [
        (peer, np.zeros(n, dtype=np.uint8).data)
        for peer in (2, 1, 0)
        if peer != rank
        for n in (3 + peer, 1 << 20, 5 + rank)
    ]
    ranks.exchange(sends, receives)
    assert all(set(buffer.tolist()) == {peer} for peer, buffer in receives)
    ranks.exchange([], [])
    source: Source
    manifest = read_manifest(Place(open_storage(path)))
    fetched = []
    for source in (Place(Remote(open_storage(path))), memory(path, manifest, (rank, 3) if rank else (0,))):
        state = shards(1, 0, is_new=bool(rank))
        fill(source, manifest, state, ranks)
        assert_loaded(state, 1, 0)
        fetched += [n for _, n in source.root.fetched] if isinstance(source, Place) else []  # type: ignore[attr-defined]
    return sum(fetched)


def test_real_ranks(tmp_path: Path) -> None:
    """Messages, remote packs and memory of several nodes over gloo."""
    manifest = save(tmp_path)
    assert sum(run_processes(3, _exchange, tmp_path)) <= 1.05 * manifest.nbytes
