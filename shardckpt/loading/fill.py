"""Fill: from a manifest to filled tensors, on every rank or on none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from shardckpt.format.manifest import Manifest
from shardckpt.loading.exchange_plan import ExchangePlanner, SharedRead
from shardckpt.loading.fetch import Fetcher
from shardckpt.loading.limits import DEFAULT_LIMITS, LoadLimits
from shardckpt.loading.pack_reader import Source
from shardckpt.loading.plan import ChunkRead, plan_reads
from shardckpt.memory import provide, writable
from shardckpt.progress import alive
from shardckpt.ranks.world import Ranks, agree, agreement
from shardckpt.state.tensors import TensorShard, as_array, torch_dtype
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
    *,
    limits: LoadLimits = DEFAULT_LIMITS,
) -> int:
    """Fill this rank's memory of `targets` from a checkpoint, whatever layout it was saved in. Collective.

    Args:
        source: where the packs are; of the same kind on every rank.
        manifest: of the checkpoint; the same on every rank.
        targets: this rank's memory to fill.
        ranks: of the job.
        prepare: called once every rank has verified its chunks, and before anything of the state changes; if it
            raises on any rank, nothing is applied.
        limits: how much is read, sent and held at a time.

    Chunks that several ranks need from remote storage, or that only another node has in memory, are fetched by
    one rank and sent to the others. No tensor of the state is written to before all ranks have verified every
    chunk that they need: on CorruptError, which is raised on all ranks, the state is unchanged. Until then remote
    chunks of such tensors are held in memory; beside them about 64 MiB are in use. A storage that fails later
    leaves the targets partly filled, and raises StorageError on all ranks.

    Returns the bytes of the chunks that this rank needed.
    """
    pieces = [(target, piece) for target in targets for piece in target.pieces if piece.box.volume]
    views = [target.data[piece.shard_slices] for target, piece in pieces]
    reads = plan_reads(manifest, [(target.name, piece.box) for target, piece in pieces])
    live = {
        read.stored.row for read in reads if any(not pieces[copy.wanted][0].is_new for copy in read.copies)
    }
    fetcher = Fetcher(source, manifest, limits)
    apply = partial(_apply, fetcher, views)
    exchange = _plan_exchange(fetcher, manifest, reads, ranks, limits)
    received = {read.stored.row for same in exchange.received.values() for read in same}
    own = [read for read in reads if read.stored.row not in received]
    error: Exception | None = None
    try:
        fetcher.verify(read for read in own if read.stored.row in live)
        fetcher.verify((read for read in own if read.stored.row not in live), take=apply)
    except Exception as failure:
        error = failure

    def receive(read: ChunkRead, content: memoryview) -> None:
        fetcher.hold(read.stored.row, content)
        if read.stored.row not in live:
            apply(read)
            fetcher.release(read.stored.row)

    agree(ranks, _run_exchange(fetcher, exchange, receive, ranks, error))
    with agreement(ranks):
        prepare()
    with agreement(ranks):
        fetcher.hand_over((read for read in reads if read.stored.row in live), apply)
    return sum(read.stored.nbytes for read in reads)


def _plan_exchange(
    fetcher: Fetcher,
    manifest: Manifest,
    reads: Sequence[ChunkRead],
    ranks: Ranks,
    limits: LoadLimits,
) -> _Exchange:
    """Plan what ranks fetch for each other. Collective."""
    far = [read for read in reads if not fetcher.is_near or read.stored.pack not in fetcher]
    if not any(ranks.maximum([bool(far)])):
        return _Exchange([], {})
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
    return _Exchange(batches, received)


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


def _apply(fetcher: Fetcher, views: Sequence[torch.Tensor], read: ChunkRead) -> None:
    """Copy one verified chunk into the tensors that want it."""
    dtype = torch_dtype(read.tensor.dtype)
    word = _WORDS[dtype.itemsize]
    content = fetcher.content(read).view(word).reshape(read.chunk)
    with torch.no_grad():  # the setting belongs to a thread
        for copy in read.copies:
            target, part = views[copy.wanted][copy.target], content[copy.source]
            if target.is_cpu and not target.is_conj() and not target.is_neg():
                if target.is_contiguous():
                    provide(target.data_ptr(), target.nbytes)
                np.copyto(
                    as_array(target, word), part
                )  # torch takes half as long again (scripts/bench/memory)
            else:
                target.copy_(torch.from_numpy(writable(part)).view(dtype))
