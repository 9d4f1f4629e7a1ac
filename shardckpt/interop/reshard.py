"""Reshard: write a checkpoint again as another number of ranks would have written it. Free of torch."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import crc32c
import numpy as np

from shardckpt.errors import CheckpointExistsError, ShardckptError, StorageError, StorageFullError
from shardckpt.format.box import Box, Runs, pieces_of_runs, split_evenly
from shardckpt.format.manifest import (
    MANIFEST,
    Manifest,
    Part,
    TensorEntry,
    pack_path,
    part_path,
    tied_names,
)
from shardckpt.format.manifest_codec import encode_record
from shardckpt.format.save_plan import ChunkWrite, Layout, SavePlan, plan_save
from shardckpt.format.tree import TensorRef, iter_references
from shardckpt.format.value_decoding import decode_value
from shardckpt.loading.stream import iter_boxes
from shardckpt.run.commit import commit
from shardckpt.run.places import Place, attempt_for, exact_place, find_place, read_manifest
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.storage import LocalStorage, Storage
from shardckpt.storage.work import cleanup

__all__ = ["Resharded", "reshard"]

_WINDOW = 2 << 30
"""Bytes of packs that are put together in a temporary file at a time, on their way to an object store."""

_PIECE = 16 << 20

_MOST_FILES = 256
"""Packs that are open at a time."""

_CRC = struct.Struct("<I")
_COMMIT_TIMEOUT = 60.0


@dataclass(frozen=True)
class Resharded:
    """What a reshard wrote.

    Attributes:
        source: the checkpoint it was made from.
        url: the new one.
        world_size: its number of ranks.
        nbytes: bytes of its packs.
        dropped: ranks of the source whose PerRank values are not in it, since it has fewer ranks.
    """

    source: str
    url: str
    world_size: int
    nbytes: int
    dropped: tuple[int, ...]


def reshard(
    url: str | os.PathLike[str] | Storage,
    out: str | os.PathLike[str] | Storage,
    world_size: int,
    *,
    storage_options: Mapping[str, Any] | None = None,
    out_storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Resharded:
    """Write the checkpoint at `url`, or the newest good one of the run there, for `world_size` ranks.

    The new checkpoint at `out` has every tensor split evenly along its first dimension, as fully_shard
    does, what cannot be split spread over the ranks, and all values, metrics, and the step. It loads
    bit-equal. PerRank values stay with their rank: the ranks beyond a smaller world lose theirs
    (`dropped`), those beyond the source's world have none. Like any other checkpoint it exists completely
    or not at all, and every chunk is verified on the way. Nothing is needed of it to load on another
    world size: a load does that by itself; this is for files of another size or number, and for copies.

    Memory is bounded by a small multiple of the largest tensor. For object storage packs go through a
    temporary file of 2 GiB, or of the largest pack, in the folder for temporary files.

    Args:
        url: a checkpoint or a run.
        out: where nothing is yet.
        world_size: the number of ranks, 1 or more.
        storage_options: arguments of the fsspec file system of `url`.
        out_storage_options: the same for `out`.
        progress: called with the bytes done and the bytes in all.

    Raises ValueError, CheckpointExistsError, NotACheckpointError, FormatError, CorruptError, StorageError;
    then what was written at `out` is deleted again.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"the world size must be a whole number of 1 or more; it is {world_size!r}")
    place = find_place(url, storage_options)
    manifest = read_manifest(place)
    target = exact_place(out, out_storage_options)
    _check_empty(target)
    plan = plan_save(_layouts(manifest, world_size))
    attempt = attempt_for(target.url, manifest.step) or 0
    info = SaveInfo(secrets.token_hex(16), target.path, manifest.step, attempt, world_size)
    proposal = Proposal(info, manifest.metrics, manifest.values, plan)
    try:
        _persist(place, manifest, target.storage, proposal, progress)
        commit(target, proposal, _COMMIT_TIMEOUT)
    except BaseException as error:
        with cleanup(error, f"packs may be left at {target.url}"):
            if not target.is_committed():
                target.storage.delete_tree("")
        raise
    return Resharded(
        source=place.url,
        url=target.url,
        world_size=world_size,
        nbytes=sum(plan.pack_sizes),
        dropped=tuple(rank for rank in range(world_size, manifest.world_size) if manifest.per_rank[rank]),
    )


def _check_empty(target: Place) -> None:
    found = target.storage.list()
    if MANIFEST in found:
        raise CheckpointExistsError(
            f"{target.url} has a checkpoint already, which is never overwritten; give another URL"
        )
    if found:
        raise CheckpointExistsError(
            f"{target.url} is not empty: it has {', '.join(found[:4])}{' ...' if len(found) > 4 else ''}. "
            "Give a URL where nothing is yet, or delete what is there first"
        )


def _persist(
    place: Place,
    manifest: Manifest,
    storage: Storage,
    proposal: Proposal,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Write every rank's pack and part to `storage`, some ranks at a time."""
    plan = proposal.plan
    ranks = range(proposal.info.world_size)
    total = sum(location.nbytes for rank in ranks for location in plan.locations(rank))
    done = 0
    for window in _windows(plan.pack_sizes, local=isinstance(storage, LocalStorage)):
        packs = _local_packs if isinstance(storage, LocalStorage) else _remote_packs
        checksums: dict[int, int] = {}
        with packs(storage, {rank: plan.pack_sizes[rank] for rank in window}) as put:
            for rank, write, content in _contents(place, manifest, plan, window):
                row, offset, nbytes = write.location
                checksums[row] = crc32c.crc32c(content)
                put(rank, offset, content)
                put(rank, offset + nbytes, memoryview(_CRC.pack(checksums[row])))
                done += nbytes
                if progress is not None:
                    progress(done, total)
                del content  # before the next one is read
        for rank in window:
            part = _part(proposal, rank, checksums, manifest)
            storage.write(part_path(rank), encode_record(part))


def _contents(
    place: Place, manifest: Manifest, plan: SavePlan, ranks: Sequence[int]
) -> Iterator[tuple[int, ChunkWrite, memoryview]]:
    """What these ranks write, tensor after tensor, so that chunks of the source are read about once."""
    writes = sorted((write.location.row, rank, write) for rank in ranks for write in plan.writes(rank))
    arrays = iter_boxes(place, manifest, [(write.name, write.box) for _, _, write in writes])
    for _, rank, write in writes:
        array = next(arrays)
        if array.shape != write.chunk:  # at the edge of the grid, where a chunk is stored whole
            padded = np.zeros(write.chunk, array.dtype)
            padded[tuple(slice(0, n) for n in array.shape)] = array
            array = padded
        content = array.reshape(-1).view(np.uint8).data
        del array
        yield rank, write, content
        del content


def _part(proposal: Proposal, rank: int, checksums: Mapping[int, int], manifest: Manifest) -> Part:
    locations = proposal.plan.locations(rank)
    return Part(
        id=proposal.info.id,
        rank=rank,
        size=proposal.plan.pack_sizes[rank],
        chunk=[location.row for location in locations],
        offset=[location.offset for location in locations],
        crc32c=[checksums[location.row] for location in locations],
        values=manifest.per_rank[rank] if rank < manifest.world_size else {},
    )


def _windows(pack_sizes: Sequence[int], *, local: bool) -> Iterator[list[int]]:
    """The ranks, in groups whose packs are written at the same time."""
    window: list[int] = []
    size = 0
    for rank, nbytes in enumerate(pack_sizes):
        if window and (len(window) == _MOST_FILES or (not local and size + nbytes > _WINDOW)):
            yield window
            window, size = [], 0
        window.append(rank)
        size += nbytes
    yield window


Put = Callable[[int, int, memoryview], None]
"""Puts bytes at an offset of a rank's pack."""


@contextlib.contextmanager
def _local_packs(storage: Storage, sizes: Mapping[int, int]) -> Iterator[Put]:
    """Packs that are filled in place; durable at the end of the block."""
    with contextlib.ExitStack() as stack:
        files: dict[int, int] = {}
        for rank, nbytes in sizes.items():
            storage.write_pack(pack_path(rank), memoryview(b""))  # makes the folders durable
            path = f"{storage.url}/{pack_path(rank)}"
            files[rank] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, files[rank])
            os.ftruncate(files[rank], nbytes)
        with _explained(storage.url, sum(sizes.values())):
            yield lambda rank, offset, data: _write_at(files[rank], offset, data)
            for descriptor in files.values():
                os.fsync(descriptor)


@contextlib.contextmanager
def _remote_packs(storage: Storage, sizes: Mapping[int, int]) -> Iterator[Put]:
    """Packs that are put together in a temporary file, and uploaded at the end of the block."""
    starts: dict[int, int] = {}
    end = 0
    for rank, nbytes in sizes.items():
        starts[rank] = end
        end += nbytes
    with tempfile.TemporaryFile() as file:
        with _explained(tempfile.gettempdir(), end):
            os.ftruncate(file.fileno(), end)
            yield lambda rank, offset, data: _write_at(file.fileno(), starts[rank] + offset, data)
        for rank, nbytes in sizes.items():
            pieces = _pieces_at(file.fileno(), starts[rank], nbytes)
            storage.write_pieces(pack_path(rank), nbytes, pieces)


def _pieces_at(descriptor: int, offset: int, nbytes: int) -> Iterator[memoryview]:
    for start in range(0, nbytes, _PIECE):
        yield memoryview(os.pread(descriptor, min(_PIECE, nbytes - start), offset + start))


def _write_at(descriptor: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        offset, data = offset + written, data[written:]


@contextlib.contextmanager
def _explained(folder: str, wanted: int) -> Iterator[None]:
    """Check that there is room for this many bytes in a folder, and say so where there is not."""
    text = f"cannot write {wanted} bytes below {folder}"
    system = os.statvfs(folder)
    free = system.f_bavail * system.f_frsize
    if free < wanted:
        raise StorageFullError(f"{text}: {free} are free. Free some, or choose another place")
    try:
        yield
    except ShardckptError:
        raise
    except OSError as error:
        kind = StorageFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"{text}: {error.strerror or error}. Choose another place") from error


def _layouts(manifest: Manifest, world_size: int) -> list[list[Layout]]:
    """What each rank of the new world would hold."""
    tied = tied_names(manifest)
    owners = {name: rank for rank in range(manifest.world_size) for name in _per_rank_names(manifest, rank)}
    layouts: list[list[Layout]] = [[] for _ in range(world_size)]
    for tensor in manifest.tensors:
        owner = owners.get(tensor.name)
        if owner is not None and owner < world_size:
            layouts[owner].append(_layout(tensor, (Box.whole(tensor.shape),), tied))
        elif owner is None:
            for rank in range(world_size):
                layouts[rank].append(_layout(tensor, _even_part(tensor.shape, world_size, rank), tied))
    return layouts


def _layout(tensor: TensorEntry, boxes: tuple[Box, ...], tied: Mapping[str, str]) -> Layout:
    return Layout(tensor.name, tensor.dtype, tensor.shape, boxes, alias=tied.get(tensor.name))


@lru_cache(maxsize=1 << 14)  # most tensors have the shape of others
def _even_part(shape: tuple[int, ...], world_size: int, rank: int) -> tuple[Box, ...]:
    """The rows that fully_shard gives to a rank; all of a tensor without dimensions."""
    runs: list[Runs] = [((0, n),) for n in shape]
    if shape:
        runs[0] = split_evenly(runs[0], world_size, rank)
    return tuple(piece.box for piece in pieces_of_runs(runs))


def _per_rank_names(manifest: Manifest, rank: int) -> Iterator[str]:
    """The tensors in the rank's PerRank values."""
    for value in manifest.per_rank[rank].values():
        for reference in iter_references(decode_value(value)):
            if isinstance(reference, TensorRef):
                yield reference.name
