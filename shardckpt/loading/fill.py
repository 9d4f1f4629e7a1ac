"""Fill: from a manifest to filled tensors, on every rank or on none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardckpt.environment import local_world_size
from shardckpt.format.box import Piece
from shardckpt.format.dtypes import itemsize
from shardckpt.format.manifest import Manifest
from shardckpt.loading.exchange_plan import ExchangePlanner, SharedRead
from shardckpt.loading.fetch import Fetcher
from shardckpt.loading.limits import DEFAULT_LIMITS, LoadLimits
from shardckpt.loading.pack_reader import Source
from shardckpt.loading.plan import ChunkRead, plan_reads
from shardckpt.loading.scatter import ArrayScatter
from shardckpt.memory import writable
from shardckpt.progress import alive
from shardckpt.ranks.world import Ranks, agree, agreement
from shardckpt.state.tensors import TensorShard, as_array
from shardckpt.storage.parallel import in_parallel

__all__ = ["fill"]

_WORDS: Mapping[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int16,
    4: np.int32,
    8: np.int64,
    16: np.complex128,
}
"""Bytes of an element -> a type that NumPy has: a copy does not interpret the bits."""

_DEVICE_SLAB = 8 << 20
"""Bytes that are copied to a device at a time."""


@dataclass(frozen=True)
class _Exchange:
    """What ranks fetch for each other.

    Attributes:
        batches: the same on every rank.
        received: what this rank needs of it: the row that stands for a stored chunk -> its reads.
    """

    batches: Sequence[Sequence[SharedRead]]
    received: Mapping[int, Sequence[ChunkRead]]


def fill(
    source: Source,
    manifest: Manifest,
    targets: Sequence[TensorShard],
    ranks: Ranks,
    prepare: Callable[[], object] = lambda: None,
    begin: Callable[[], object] = lambda: None,
    *,
    atomic: bool = True,
    limits: LoadLimits = DEFAULT_LIMITS,
) -> int:
    """Fill this rank's memory of `targets` from a checkpoint, whatever layout it was saved in. Collective.

    Args:
        source: where the packs are; of the same kind on every rank.
        manifest: of the checkpoint; the same on every rank.
        targets: this rank's memory to fill.
        ranks: of the job.
        prepare: called before anything of the state changes, and if `atomic`, once every rank has verified its
            chunks and filled its new memory; if it raises on any rank, nothing is applied.
        begin: called on every rank right before the first tensor of the state is written to on any.
        atomic: verify every chunk that any rank needs before a tensor of the state is written to. If False, on
            all ranks, they are filled while they are verified, in one pass. True on one rank counts for all.
        limits: how much is read, sent and held at a time.

    Chunks that several ranks need from remote storage, or that only another node has in memory, are fetched by
    one rank and sent to the others. Errors are raised on all ranks: CorruptError, StorageError. Unless `begin`
    has been called, the state is unchanged; after it, the targets are partly filled. If `atomic`, remote chunks
    of tensors of the state are held in memory until all are verified. Beside them, and beside the tensors, about
    64 MiB are in use.

    Returns the bytes of the chunks that this rank needed.
    """
    pieces = [(target, piece) for target in targets for piece in target.pieces if piece.box.volume]
    scatter = _TensorScatter([_part(target, piece) for target, piece in pieces])
    reads = plan_reads(manifest, [(target.name, piece.box) for target, piece in pieces])
    fetcher = Fetcher(source, manifest, limits)
    atomic, exchange = _plan_exchange(fetcher, manifest, reads, ranks, limits, atomic=atomic)
    if ranks.size > 1 and local_world_size() > 1:
        whole = [piece.box.shape == target.shape for target, piece in pieces]
        fetcher.share({read.stored.row for read in reads if whole[read.copies[0].wanted]})
    received = {read.stored.row for same in exchange.received.values() for read in same}
    live: set[int] = set()
    if atomic:
        for read in reads:
            if any(not pieces[copy.wanted][0].is_new for copy in read.copies):
                live.add(read.stored.row)
    else:
        with agreement(ranks):
            prepare()
        begin()
    own = [read for read in reads if read.stored.row not in received]
    error: Exception | None = None
    try:
        fetcher.verify_first(read for read in own if read.stored.row in live)
        fetcher.load((read for read in own if read.stored.row not in live), scatter)
    except Exception as failure:
        error = failure

    def receive(read: ChunkRead, content: memoryview) -> None:
        if read.stored.row in live:
            fetcher.hold(read.stored.row, content)
        else:
            scatter.write(read, np.frombuffer(content, dtype=np.uint8))

    agree(ranks, _run_exchange(fetcher, exchange, receive, ranks, error))
    if atomic:
        with agreement(ranks):
            prepare()
        begin()
        with agreement(ranks):
            fetcher.load((read for read in reads if read.stored.row in live), scatter)
    return sum(read.stored.nbytes for read in reads)


def _plan_exchange(
    fetcher: Fetcher,
    manifest: Manifest,
    reads: Sequence[ChunkRead],
    ranks: Ranks,
    limits: LoadLimits,
    *,
    atomic: bool,
) -> tuple[bool, _Exchange]:
    """Agree on whether the load is atomic, and plan what ranks fetch for each other. Collective."""
    far = [read for read in reads if not fetcher.is_near or read.stored.pack not in fetcher]
    any_atomic, any_far = ranks.maximum([atomic, bool(far)])
    if not any_far:
        return bool(any_atomic), _Exchange([], {})
    planner = ExchangePlanner(manifest, limits)
    packs = (number for number in range(len(manifest.packs)) if number in fetcher)
    messages = ranks.gather(planner.encode((read.stored.row for read in far), packs))
    batches = planner.plan(messages, fetcher.url)
    rows = {
        chunk.row
        for batch in batches
        for shared in batch
        if ranks.rank in shared.needers
        for chunk in shared.chunks
    }
    received: defaultdict[int, list[ChunkRead]] = defaultdict(list)
    for read in far:
        if (row := planner.first_row(read.stored.row)) in rows:
            received[row].append(read)
    return bool(any_atomic), _Exchange(batches, received)


def _run_exchange(
    fetcher: Fetcher,
    exchange: _Exchange,
    receive: Callable[[ChunkRead, memoryview], object],
    ranks: Ranks,
    error: Exception | None,
) -> Exception | None:
    """Fetch this rank's shared reads, send them to the ranks that need them, and receive the others'. Collective.

    `error` is this rank's error so far. All ranks agree before each batch, since a rank must not wait for one
    that has failed; raises as `agree` does. Returns this rank's error in handling the last batch.
    """

    def unpack(item: tuple[SharedRead, memoryview]) -> None:
        shared, content = item
        for chunk in shared.chunks:
            start = chunk.offset - shared.chunks[0].offset
            for read in exchange.received[chunk.row]:
                receive(read, content[start : start + chunk.nbytes])

    own = [shared for batch in exchange.batches for shared in batch if shared.fetcher == ranks.rank]
    with closing(
        fetcher.fetch_ahead([shared.chunks for shared in own] if error is None else [])
    ) as fetched:
        for batch in exchange.batches:
            sent: list[tuple[SharedRead, memoryview]] = []
            try:
                if error is None:
                    sent = [(shared, next(fetched)) for shared in batch if shared.fetcher == ranks.rank]
            except Exception as failure:
                error = failure
            agree(ranks, error)
            alive()  # a rank that waits here for others is alive, too
            arriving = [
                (shared, np.empty(shared.nbytes, dtype=np.uint8).data)
                for shared in batch
                if ranks.rank in shared.receivers
            ]
            ranks.exchange(
                [(receiver, content) for shared, content in sent for receiver in shared.receivers],
                [(shared.fetcher, content) for shared, content in arriving],
            )
            kept = [(shared, content) for shared, content in sent if ranks.rank in shared.needers]
            try:
                in_parallel(unpack, kept + arriving)
            except Exception as failure:
                error = failure
    return error


def _part(target: TensorShard, piece: Piece) -> torch.Tensor:
    """The memory of a piece; of a single one it is all that the target has."""
    return target.data if len(target.pieces) == 1 else target.data[piece.shard_slices]


class _TensorScatter(ArrayScatter):
    """Fills tensors: those in CPU memory as arrays, others by torch."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(dict(enumerate(map(_as_words, tensors))))
        self._tensors = tensors
        if not all(tensor.is_cpu for tensor in tensors):
            self.slab = _DEVICE_SLAB

    def word(self, read: ChunkRead) -> npt.DTypeLike:
        return _WORDS[itemsize(read.tensor.dtype)]

    def put(self, wanted: int, target: tuple[slice, ...], part: npt.NDArray[Any]) -> None:
        if self._arrays[wanted] is not None:
            super().put(wanted, target, part)
            return
        with torch.no_grad():  # the setting belongs to a thread
            tensor = self._tensors[wanted]
            tensor[target].copy_(torch.from_numpy(writable(part)).view(tensor.dtype))


def _as_words(tensor: torch.Tensor) -> npt.NDArray[Any] | None:
    """The tensor's memory, unless it is of a device, or its elements do not mean what their bits say."""
    if not tensor.is_cpu or tensor.is_conj() or tensor.is_neg():
        return None
    return as_array(tensor, _WORDS[tensor.itemsize])
