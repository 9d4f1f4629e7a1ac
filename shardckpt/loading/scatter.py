"""Scatter: the content of chunks into arrays, piece by piece, as it is read. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shardckpt.format.dtypes import numpy_dtype
from shardckpt.huge_pages import FreshMemory
from shardckpt.loading.plan import ChunkRead, Copy

__all__ = ["DISCARD", "PIECE", "ArrayScatter", "Scatter", "Scratch"]

PIECE = 256 << 10
"""Bytes that are read, checksummed and copied on while they are in a core's cache."""


class Scratch:
    """Memory of one thread, used again and again so that it stays in the cache."""

    def __init__(self) -> None:
        self._memory = np.empty(PIECE, dtype=np.uint8)

    def bytes(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """The first `nbytes` bytes of it."""
        if nbytes > len(self._memory):
            self._memory = np.empty(nbytes, dtype=np.uint8)
        return self._memory[:nbytes]


class Scatter(Protocol):
    """Takes the content of chunks. Safe to use from several threads, for different chunks."""

    def buffers(self, read: ChunkRead, scratch: Scratch) -> Iterator[memoryview]:
        """Yield buffers for the chunk's content, in order, as long as the content in all.

        The caller fills each before it asks for the next one. A buffer is the memory where the bytes are wanted,
        or a part of `scratch`, from which they are copied on.
        """

    def write(self, read: ChunkRead, content: npt.NDArray[np.uint8]) -> None:
        """Take all of the chunk's content at once."""


class _Discard:
    """Takes nothing: for chunks that are only verified."""

    def buffers(self, read: ChunkRead, scratch: Scratch) -> Iterator[memoryview]:
        return _passed_over(read.stored.nbytes, scratch)

    def write(self, read: ChunkRead, content: npt.NDArray[np.uint8]) -> None:
        pass


DISCARD = _Discard()


class ArrayScatter:
    """Fills the boxes that are wanted, each with an array of its shape.

    Args:
        arrays: by the number of the box in the list of wanted boxes. Their elements are as large as the tensor's.
            None: a box that a subclass fills, by `put`.
    """

    slab = PIECE
    """Bytes that are given to `put` together, or one row of the chunk."""

    def __init__(self, arrays: Mapping[int, npt.NDArray[Any] | None]) -> None:
        self._arrays = arrays
        filled = [array for array in arrays.values() if array is not None and array.flags.c_contiguous]
        self._fresh = FreshMemory((_address(array), array.nbytes) for array in filled)

    def word(self, read: ChunkRead) -> npt.DTypeLike:
        """The element type of the arrays that the chunk is for."""
        return numpy_dtype(read.tensor.dtype)

    def buffers(self, read: ChunkRead, scratch: Scratch) -> Iterator[memoryview]:
        if len(read.copies) == 1 and (found := self._contiguous(read, read.copies[0])) is not None:
            start, target = found
            self._fresh.provide(_address(target), target.nbytes)
            yield from _passed_over(start, scratch)
            content = target.data
            for begin in range(0, len(content), PIECE):
                yield content[begin : begin + PIECE]
            yield from _passed_over(read.stored.nbytes - start - len(content), scratch)
        else:
            yield from self._slabs(read, scratch)

    def write(self, read: ChunkRead, content: npt.NDArray[np.uint8]) -> None:
        elements = content.view(self.word(read)).reshape(read.chunk)
        for copy in read.copies:
            self.put(copy.wanted, copy.target, elements[copy.source])

    def put(self, wanted: int, target: tuple[slice, ...], part: npt.NDArray[Any]) -> None:
        """Fill a part of a box."""
        array = self._arrays[wanted]
        assert array is not None
        index: tuple[Any, ...] = (*target, ...)  # an array also where the box has no dimensions
        place = array[index]
        self._fresh.provide(_address(place), _extent(place))
        place[...] = part

    def _contiguous(self, read: ChunkRead, copy: Copy) -> tuple[int, npt.NDArray[np.uint8]] | None:
        """The copy's first byte in the chunk, and the memory to fill; None unless its bytes are a run in both."""
        array = self._arrays[copy.wanted]
        index: tuple[Any, ...] = (*copy.target, ...)  # an array also where the box has no dimensions
        if array is None or not (part := array[index]).flags.c_contiguous:
            return None
        start = 0
        if part.shape != read.chunk:
            stride, is_cut = part.itemsize, False
            for picked, size, length in zip(
                reversed(copy.source), reversed(read.chunk), reversed(part.shape), strict=True
            ):
                if is_cut and length > 1:
                    return None
                is_cut = is_cut or length < size
                start += picked.start * stride
                stride *= size
        return start, part.reshape(-1).view(np.uint8)

    def _slabs(self, read: ChunkRead, scratch: Scratch) -> Iterator[memoryview]:
        """Cut the chunk into slabs along its first dimension that can be cut, and put what is wanted of each."""
        dim = next((d for d, size in enumerate(read.chunk) if size > 1), len(read.chunk) - 1)
        row = read.stored.nbytes // read.chunk[dim]
        step = max(1, self.slab // row)
        for start in range(0, read.chunk[dim], step):
            stop = min(start + step, read.chunk[dim])
            content = scratch.bytes((stop - start) * row)
            yield content.data
            shape = (*read.chunk[:dim], stop - start, *read.chunk[dim + 1 :])
            elements = content.view(self.word(read)).reshape(shape)
            for copy in read.copies:
                source, target = copy.source[dim], copy.target[dim]
                low, high = max(start, source.start), min(stop, source.stop)
                if low < high:
                    shift = target.start - source.start
                    self.put(
                        copy.wanted,
                        _replaced(copy.target, dim, slice(low + shift, high + shift)),
                        elements[_replaced(copy.source, dim, slice(low - start, high - start))],
                    )


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _extent(array: npt.NDArray[Any]) -> int:
    """Bytes from the first element to the end of the last one, in memory; there is at least one."""
    reach = sum(stride * (n - 1) for stride, n in zip(array.strides, array.shape, strict=True))
    return int(reach) + array.itemsize


def _passed_over(nbytes: int, scratch: Scratch) -> Iterator[memoryview]:
    """Buffers for so many bytes that nobody wants."""
    for start in range(0, nbytes, PIECE):
        yield scratch.bytes(min(PIECE, nbytes - start)).data


def _replaced(slices: tuple[slice, ...], dim: int, by: slice) -> tuple[slice, ...]:
    return (*slices[:dim], by, *slices[dim + 1 :])
