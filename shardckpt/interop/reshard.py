"""Reshard: rewrite a checkpoint as another number of ranks would have written it. Does not use torch."""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import crc32c
import numpy as np

from shardckpt.errors import CheckpointExistsError
from shardckpt.format.box import Box
from shardckpt.format.layouts import Layout, RankLayout, Split, WorldLayout
from shardckpt.format.manifest import (
    MANIFEST,
    Manifest,
    Part,
    WrittenPack,
    tied_names,
)
from shardckpt.format.save_plan import ChunkWrite, SavePlan, plan_save
from shardckpt.format.tree import TensorRef, iter_references
from shardckpt.format.value_decoding import decode_value
from shardckpt.interop.packs import iter_windows, open_packs
from shardckpt.interop.progress import Counter, Progress
from shardckpt.loading.stream import iter_boxes
from shardckpt.run.commit import commit
from shardckpt.run.commit_wait import Patience
from shardckpt.run.parts import write_part
from shardckpt.run.places import Place, attempt_for, exact_place, find_place, read_manifest
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.storage import Storage
from shardckpt.storage.work import cleanup

__all__ = ["Resharded", "reshard"]

_CRC = struct.Struct("<I")
_COMMIT_TIMEOUT = 60.0


@dataclass(frozen=True)
class Resharded:
    """What a reshard wrote.

    Attributes:
        source: URL of the checkpoint that was read.
        url: URL of the new one.
        world_size: number of ranks of the new one.
        nbytes: size of its packs in bytes.
        dropped: ranks of the source whose PerRank values were left out, since the new one has fewer ranks.
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
    progress: Progress | None = None,
) -> Resharded:
    """Rewrite a checkpoint for another number of ranks.

    Loading does not need this: `load` and `restore` read a checkpoint on any number of ranks. It is for packs of
    another size or number, and for tools that read packs by rank. In the new checkpoint every tensor is split
    evenly along its first dimension, as fully_shard does; tensors that cannot be split are spread over the ranks.
    Values, metrics and the step stay, and it loads bit-equal. PerRank values stay with their rank: a smaller
    world loses those of the ranks beyond it (`dropped`), a larger one has none for its new ranks. Every chunk is
    verified on the way.

    Memory is bounded by a small multiple of the largest tensor. To object storage packs go through a temporary
    file of 2 GiB, or of the largest pack, in the folder for temporary files.

        shardckpt.reshard("s3://bucket/run", "s3://bucket/run-8", 8)

    Args:
        url: a checkpoint, or a run, of which the newest good checkpoint is taken.
        out: the new checkpoint's URL, where nothing is yet.
        world_size: its number of ranks, 1 or more.
        storage_options: arguments of the fsspec file system of `url`.
        out_storage_options: the same for `out`.
        progress: called with the bytes done and the bytes in all.

    Returns where both are, and whose PerRank values were dropped.

    Raises ValueError, CheckpointExistsError, NotACheckpointError, FormatError, CorruptError, StateError if `out`
    is the folder of another step, StorageError; then what was written at `out` is deleted again.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"the world size must be a whole number of 1 or more; it is {world_size!r}")
    place = find_place(url, storage_options)
    manifest = read_manifest(place)
    target = exact_place(out, out_storage_options)
    _check_empty(target)
    plan = plan_save(_world(manifest, world_size))
    attempt = attempt_for(target.url, manifest.step) or 0
    info = SaveInfo(secrets.token_hex(16), target.path, manifest.step, attempt, world_size)
    proposal = Proposal(info, manifest.metrics, manifest.values, plan)
    try:
        packs = _persist(place, manifest, target.storage, proposal, progress)
        part = Part(id=info.id, packs=packs)
        write_part(target.storage, part)
        commit(target, proposal, Patience(_COMMIT_TIMEOUT), part)
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
    place: Place, manifest: Manifest, storage: Storage, proposal: Proposal, progress: Progress | None
) -> list[WrittenPack]:
    """Write every rank's pack to `storage`, some ranks at a time. Returns their records for a part."""
    plan = proposal.plan
    ranks = range(proposal.info.world_size)
    counter = Counter(sum(location.nbytes for rank in ranks for location in plan.locations(rank)), progress)
    written = []
    for window in iter_windows(storage, plan.pack_sizes):
        checksums: dict[int, int] = {}
        with open_packs(storage, {rank: plan.pack_sizes[rank] for rank in window}) as put:
            for rank, write, content in _contents(place, manifest, plan, window):
                row, offset, nbytes = write.location
                checksums[row] = crc32c.crc32c(content)
                put(rank, offset, content)
                put(rank, offset + nbytes, memoryview(_CRC.pack(checksums[row])))
                counter.add(nbytes)
                del content  # before the next one is read
        written += [_written(plan, rank, checksums, manifest) for rank in window]
    return written


def _contents(
    place: Place, manifest: Manifest, plan: SavePlan, ranks: Sequence[int]
) -> Iterator[tuple[int, ChunkWrite, memoryview]]:
    """The chunks of these ranks, tensor after tensor, so that chunks of the source are read about once."""
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


def _written(plan: SavePlan, rank: int, checksums: Mapping[int, int], manifest: Manifest) -> WrittenPack:
    locations = plan.locations(rank)
    return WrittenPack(
        rank=rank,
        size=plan.pack_sizes[rank],
        chunk=[location.row for location in locations],
        offset=[location.offset for location in locations],
        crc32c=[checksums[location.row] for location in locations],
        values=manifest.per_rank[rank] if rank < manifest.world_size else {},
    )


def _world(manifest: Manifest, world_size: int) -> WorldLayout:
    """What the ranks of the new world would hold: an even part of each tensor, and their own ones."""
    tied = tied_names(manifest)
    owners = {name: rank for rank in range(manifest.world_size) for name in _per_rank_names(manifest, rank)}
    own: list[list[Layout]] = [[] for _ in range(world_size)]
    common: list[Layout | None] = []  # with a place for each of rank 0's own
    for tensor in manifest.tensors:
        owner = owners.get(tensor.name)
        alias = tied.get(tensor.name)
        if owner is None and tensor.shape:
            splits = (Split(0, world_size, 0),)
            common.append(
                Layout(tensor.name, tensor.dtype, tensor.shape, (), alias=alias, mesh=0, splits=splits)
            )
            continue
        whole = (Box.whole(tensor.shape),) if tensor.nbytes else ()
        layout = Layout(tensor.name, tensor.dtype, tensor.shape, whole, alias=alias)
        if owner is None:
            common.append(layout)
        elif owner < world_size:
            own[owner].append(layout)
            common += [None] if owner == 0 else []
    first = tuple(common)
    others = {len(own[0]): first}
    shared = tuple(layout for layout in first if layout is not None)
    layouts = [
        RankLayout(
            ((world_size,),),
            (rank,),
            others.setdefault(len(mine), (*shared, *[None] * len(mine))),
            tuple(mine),
        )
        for rank, mine in enumerate(own)
    ]
    return WorldLayout.of(layouts)


def _per_rank_names(manifest: Manifest, rank: int) -> Iterator[str]:
    """Names of the tensors in the rank's PerRank values."""
    for value in manifest.per_rank[rank].values():
        for reference in iter_references(decode_value(value)):
            if isinstance(reference, TensorRef):
                yield reference.name
