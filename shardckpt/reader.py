"""Load: from a manifest to filled tensors, on every rank or on none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from shardckpt.fetch import Fetcher, in_parallel
from shardckpt.local import LocalTensor, flat_bytes, torch_dtype
from shardckpt.manifest import Manifest
from shardckpt.ranks import Ranks, agree
from shardckpt.reads import Read, plan_reads
from shardckpt.runs import Place

__all__ = ["fill"]


def fill(place: Place, manifest: Manifest, targets: Sequence[LocalTensor], ranks: Ranks) -> int:
    """Fill this rank's memory of `targets` from a checkpoint, whatever layout it was saved in.

    Every rank calls it. Nothing is written to a tensor of the state before all ranks have verified every
    chunk that they need: CorruptError is raised on all ranks, and the state is as it was. A storage that
    fails after that leaves the targets partly filled, and raises StorageError on all ranks. Returns the
    bytes that this rank read.
    """
    pieces = [(target, piece) for target in targets for piece in target.pieces if piece.box.volume]
    views = [target.data[piece.local_slices] for target, piece in pieces]
    reads = plan_reads(manifest, [(target.name, piece.box) for target, piece in pieces])
    into_new = [all(pieces[copy.wanted][0].is_new for copy in read.copies) for read in reads]
    live = [read for read, new in zip(reads, into_new, strict=True) if not new]
    fetcher = Fetcher(place, manifest)
    apply = partial(_apply, fetcher, views)
    error: Exception | None = None
    try:
        fetcher.verify(live)
        new = [read for read, new in zip(reads, into_new, strict=True) if new]
        fetcher.fetch(new, memory=partial(_whole_target, views), take=apply)
    except Exception as failure:
        error = failure
    agree(ranks, error)
    try:
        in_parallel(apply, live)
    except Exception as failure:
        error = failure
    agree(ranks, error)
    return sum(read.nbytes for read in reads)


def _whole_target(views: Sequence[torch.Tensor], read: Read) -> memoryview | None:
    """The memory that a chunk fills just as it is stored, if there is such."""
    if len(read.copies) != 1:
        return None
    (copy,) = read.copies
    target = views[copy.wanted][copy.target]
    return _memory(target) if tuple(target.shape) == read.chunk and _is_plain(target) else None


def _apply(fetcher: Fetcher, views: Sequence[torch.Tensor], read: Read) -> None:
    """Put one verified chunk where it belongs."""
    chunk: torch.Tensor | None = None
    with torch.no_grad():  # the setting belongs to a thread
        for copy in read.copies:
            target = views[copy.wanted][copy.target]
            if (start := _contiguous_start(read, copy.source)) is not None and _is_plain(target):
                fetcher.read_into(read, start, _memory(target))
                continue
            if chunk is None:
                content = np.ascontiguousarray(fetcher.chunk(read)).reshape(-1).view(np.uint8)
                chunk = torch.from_numpy(content).view(torch_dtype(read.tensor.dtype)).view(read.chunk)
            target.copy_(chunk[copy.source])
    fetcher.release(read)


def _contiguous_start(read: Read, source: tuple[slice, ...]) -> int | None:
    """The byte of the chunk at which `source` begins, if it is one run of bytes of the chunk."""
    size = read.nbytes
    start, whole = 0, True
    stride = size
    for part, n in zip(source, read.chunk, strict=True):
        stride //= n
        start += part.start * stride
    # From the last dimension on: whole ones, then one range, then single indices.
    for part, n in zip(reversed(source), reversed(read.chunk), strict=True):
        length = part.stop - part.start
        if not whole and length != 1:
            return None
        whole = whole and length == n
    return start


def _is_plain(target: torch.Tensor) -> bool:
    plain = target.device.type == "cpu" and target.is_contiguous()
    return plain and not target.is_conj() and not target.is_neg()


def _memory(target: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable."""
    return flat_bytes(target).numpy().data
