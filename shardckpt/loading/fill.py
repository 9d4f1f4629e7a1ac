"""Load: from a manifest to filled tensors, on every rank or on none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch

from shardckpt.format.manifest import Manifest
from shardckpt.loading.exchange_plan import ExchangePlanner, SharedRead
from shardckpt.loading.fetch import Fetcher, in_parallel
from shardckpt.loading.pack_reader import Source
from shardckpt.loading.plan import Read, plan_reads
from shardckpt.memory import provide, writable
from shardckpt.progress import alive
from shardckpt.ranks.world import Ranks, agree
from shardckpt.state.tensors import LocalTensor, as_array, torch_dtype

__all__ = ["fill"]

_WORDS: Mapping[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int16,
    4: np.int32,
    8: np.int64,
    16: np.complex128,
}
"""Types that NumPy has, by their bytes: a copy does not care what the bits mean."""

Passed = Mapping[int, Sequence[Read]]
"""What this rank gets in exchanges: the reads of each stored chunk, by the row that stands for it."""


def fill(
    source: Source,
    manifest: Manifest,
    targets: Sequence[LocalTensor],
    ranks: Ranks,
    prepare: Callable[[], object] = lambda: None,
) -> int:
    """Fill this rank's memory of `targets` from a checkpoint, whatever layout it was saved in.

    Every rank calls it, with a source of the same kind. What several ranks need from remote storage is
    fetched by one and passed on, as is what only other nodes have in memory. Nothing is written to a tensor
    of the state before all ranks have verified every chunk that they need: CorruptError is raised on all
    ranks, and the state is as it was. Until then what is remote is held for such tensors; beside that, about
    64 MiB are under way. A storage that fails later leaves the targets partly filled, and raises StorageError
    on all ranks. Returns the bytes that this rank loaded.
    """
    pieces = [(target, piece) for target in targets for piece in target.pieces if piece.box.volume]
    views = [target.data[piece.local_slices] for target, piece in pieces]
    reads = plan_reads(manifest, [(target.name, piece.box) for target, piece in pieces])
    live = {read.row for read in reads if any(not pieces[copy.wanted][0].is_new for copy in read.copies)}
    fetcher = Fetcher(source, manifest)
    apply = partial(_apply, fetcher, views)
    batches, passed = _plan_exchange(fetcher, manifest, reads, ranks)
    gets = {read.row for same in passed.values() for read in same}
    own = [read for read in reads if read.row not in gets]
    error: Exception | None = None
    try:
        fetcher.verify(read for read in own if read.row in live)
        fetcher.verify((read for read in own if read.row not in live), take=apply)
    except Exception as failure:
        error = failure

    def receive(read: Read, content: memoryview) -> None:
        fetcher.hold(read, content)
        if read.row not in live:
            apply(read)
            fetcher.release(read)

    error = _exchange(fetcher, batches, passed, receive, ranks, error)
    agree(ranks, error)
    try:
        prepare()
    except Exception as failure:
        error = failure
    agree(ranks, error)
    try:
        fetcher.hand_over((read for read in reads if read.row in live), apply)
    except Exception as failure:
        error = failure
    agree(ranks, error)
    return sum(read.nbytes for read in reads)


def _plan_exchange(
    fetcher: Fetcher, manifest: Manifest, reads: Sequence[Read], ranks: Ranks
) -> tuple[list[list[SharedRead]], Passed]:
    """What is passed on among all ranks, in batches, and what of it this rank gets."""
    far = [read for read in reads if not fetcher.is_near or read.pack not in fetcher]
    if not any(ranks.maximum([bool(far)])):
        return [], {}
    wants = ExchangePlanner(manifest)
    packs = (number for number in range(len(manifest.packs)) if number in fetcher)
    batches = wants.plan(ranks.gather(wants.encode((read.row for read in far), packs)), fetcher.url)
    rows = {
        chunk.row
        for batch in batches
        for unit in batch
        if ranks.rank in unit.needers
        for chunk in unit.chunks
    }
    passed: defaultdict[int, list[Read]] = defaultdict(list)
    for read in far:
        if (row := wants.first_row(read.row)) in rows:
            passed[row].append(read)
    return batches, passed


def _exchange(
    fetcher: Fetcher,
    batches: Sequence[Sequence[SharedRead]],
    passed: Passed,
    receive: Callable[[Read, memoryview], object],
    ranks: Ranks,
    error: Exception | None,
) -> Exception | None:
    """Fetch this rank's units, send them to who needs them, and receive what others fetch for this rank.

    `error` is what this rank has met with so far. All ranks agree before each batch, since none may wait for
    one that has failed; raises as `agree` does. Returns this rank's error in handling the last batch.
    """

    def unpack(item: tuple[SharedRead, memoryview]) -> None:
        unit, content = item
        for chunk in unit.chunks:
            start = chunk.offset - unit.chunks[0].offset
            for read in passed[chunk.row]:
                receive(read, content[start : start + chunk.nbytes])

    own = [unit for batch in batches for unit in batch if unit.fetcher == ranks.rank]
    with closing(fetcher.fetch_ahead([unit.chunks for unit in own] if error is None else [])) as fetched:
        for batch in batches:
            mine = [unit for unit in batch if unit.fetcher == ranks.rank]
            ready: list[tuple[SharedRead, memoryview]] = []
            try:
                if error is None:
                    ready = [(unit, next(fetched)) for unit in mine]
            except Exception as failure:
                error = failure
            agree(ranks, error)
            alive()  # so are those that wait for others here
            arriving = [
                (unit, np.empty(unit.nbytes, dtype=np.uint8).data)
                for unit in batch
                if ranks.rank in unit.others
            ]
            ranks.exchange(
                [(other, content) for unit, content in ready for other in unit.others],
                [(unit.fetcher, content) for unit, content in arriving],
            )
            kept = [(unit, content) for unit, content in ready if ranks.rank in unit.needers]
            try:
                in_parallel(unpack, kept + arriving)
            except Exception as failure:
                error = failure
    return error


def _apply(fetcher: Fetcher, views: Sequence[torch.Tensor], read: Read) -> None:
    """Put one verified chunk where it belongs."""
    dtype = torch_dtype(read.tensor.dtype)
    word = _WORDS[dtype.itemsize]
    content = fetcher.content(read).view(word).reshape(read.chunk)
    with torch.no_grad():  # the setting belongs to a thread
        for copy in read.copies:
            target, part = views[copy.wanted][copy.target], content[copy.source]
            if target.is_cpu and not target.is_conj() and not target.is_neg():
                if target.is_contiguous():
                    provide(target.data_ptr(), target.nbytes)
                np.copyto(as_array(target, word), part)  # torch's own copy takes half as long again
            else:
                target.copy_(torch.from_numpy(writable(part)).view(dtype))
