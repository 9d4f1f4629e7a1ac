"""Read a checkpoint of any size in bounded memory, one box after another. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from shardckpt.format.box import Box
from shardckpt.format.dtypes import itemsize, numpy_dtype
from shardckpt.format.manifest import Manifest, TensorEntry
from shardckpt.loading.fetch import Fetcher
from shardckpt.loading.plan import ChunkRead, plan_reads
from shardckpt.loading.scatter import ArrayScatter
from shardckpt.run.places import Place

__all__ = ["iter_boxes", "slabs"]

_BATCH = 32 << 20
"""Bytes of boxes that are read together, and of a slab."""


def iter_boxes(
    place: Place, manifest: Manifest, boxes: Sequence[tuple[str, Box]]
) -> Iterator[npt.NDArray[Any]]:
    """Yield the content of each (tensor name, box), in this order, as a new C-ordered array, verified.

    Consecutive boxes that share chunks are read together, so that no chunk is read twice for them. Memory is
    needed for these boxes, or 32 MiB of smaller ones, and for the chunks being read. Raises KeyError for an
    unknown name, and CorruptError, which names the chunk: discard what was yielded before it.
    """
    dtypes = {tensor.name: tensor.dtype for tensor in manifest.tensors}
    fetcher = Fetcher(place, manifest)
    for wanted, reads in _groups(boxes, plan_reads(manifest, boxes), dtypes):
        fetcher.check_sizes(read.stored for read in reads)
        arrays = [np.empty(boxes[i][1].shape, numpy_dtype(dtypes[boxes[i][0]])) for i in wanted]
        fetcher.load(reads, ArrayScatter(dict(zip(wanted, arrays, strict=True))))
        arrays.reverse()
        while arrays:
            yield arrays.pop()


def slabs(tensor: TensorEntry) -> list[Box]:
    """Cut the tensor along its first dimension, between chunks, into boxes that follow one another in memory.

    Each has 32 MiB or more, as the chunks allow. A tensor without elements has one box, without elements.
    """
    whole = Box.whole(tensor.shape)
    if not tensor.shape or not whole.volume:
        return [whole]
    row = tensor.nbytes // tensor.shape[0]
    edges = sorted(
        (
            array.offset[0] + i * array.chunk[0],
            array.offset[0] + min((i + 1) * array.chunk[0], array.shape[0]),
        )
        for array in tensor.arrays
        if array.box.volume
        for i in range(array.grid[0])
    )
    found: list[Box] = []
    start = reach = 0
    for low, high in edges:
        if low >= reach > start and (reach - start) * row >= _BATCH:
            found.append(_rows(tensor, start, reach))
            start = reach
        reach = max(reach, high)
    return [*found, _rows(tensor, start, tensor.shape[0])]


def _rows(tensor: TensorEntry, start: int, stop: int) -> Box:
    """The box of the tensor's rows `start:stop`."""
    zeros = (0,) * (len(tensor.shape) - 1)
    return Box((start, *zeros), (stop - start, *tensor.shape[1:]))


def _groups(
    boxes: Sequence[tuple[str, Box]], reads: Sequence[ChunkRead], dtypes: dict[str, str]
) -> Iterator[tuple[range, list[ChunkRead]]]:
    """Groups of boxes and the reads for them; no box shares a chunk with a later group."""
    by_first: dict[int, list[ChunkRead]] = {}
    for read in reads:
        by_first.setdefault(min(part.wanted for part in read.copies), []).append(read)
    start = reach = size = 0
    group: list[ChunkRead] = []
    for number, (name, box) in enumerate(boxes):
        nbytes = box.volume * itemsize(dtypes[name])
        if number > start and number > reach and size + nbytes > _BATCH:
            yield range(start, number), sorted(group, key=attrgetter("stored"))
            start, size, group = number, 0, []
        size += nbytes
        for read in by_first.pop(number, ()):
            group.append(read)
            reach = max(reach, max(part.wanted for part in read.copies))
    if boxes:
        yield range(start, len(boxes)), sorted(group, key=attrgetter("stored"))
