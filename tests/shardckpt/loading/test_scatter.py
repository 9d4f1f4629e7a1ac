"""Scatter: chunks that are read in pieces reach the boxes that want them, whatever part of them that is."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from shardckpt.format.box import Box
from shardckpt.format.chunks import StoredChunk, content_bytes
from shardckpt.format.manifest import ArrayEntry, TensorEntry
from shardckpt.loading.plan import ChunkRead, Copy
from shardckpt.loading.scatter import DISCARD, PIECE, ArrayScatter, Scratch


def read_of(chunk: tuple[int, ...], copies: tuple[Copy, ...], dtype: str = "float32") -> ChunkRead:
    nbytes = content_bytes(dtype, chunk)
    box = Box.whole(chunk)
    entry = TensorEntry("t", dtype, chunk, (ArrayEntry(box.offsets, chunk, chunk),))
    return ChunkRead(StoredChunk(0, 0, 0, nbytes, 0), entry, box, chunk, copies)


def content_of(read: ChunkRead) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, read.stored.nbytes, dtype=np.uint8)


def deliver(read: ChunkRead, scatter: Any) -> list[memoryview]:
    """Fill the scatter's buffers with the chunk's content; return them."""
    content, offset, buffers = content_of(read), 0, []
    for buffer in scatter.buffers(read, Scratch()):
        assert len(buffer)
        buffer[:] = content[offset : offset + len(buffer)].data
        offset += len(buffer)
        buffers.append(buffer)
    assert offset == read.stored.nbytes
    return buffers


ROWS, COLUMNS = 700, 256  # 700 KiB of float32: three pieces

PARTS = {
    "all of it": [(slice(0, ROWS), slice(0, COLUMNS))],
    "rows, as of a padded chunk": [(slice(0, 501), slice(0, COLUMNS))],
    "rows in the middle": [(slice(13, 600), slice(0, COLUMNS))],
    "columns": [(slice(0, ROWS), slice(5, 77))],
    "a box": [(slice(300, 400), slice(100, 101))],
    "a part of one row": [(slice(300, 301), slice(100, 201))],
    "two boxes": [(slice(0, 100), slice(0, COLUMNS)), (slice(90, 650), slice(3, 8))],
}


@pytest.mark.parametrize("name", list(PARTS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128", "bool"])
@pytest.mark.parametrize("strided", [False, True])
def test_parts(name: str, dtype: str, strided: bool) -> None:
    """What is wanted arrives, into contiguous memory and other, and nothing else changes."""
    kind: Any = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    copies, arrays = [], {}
    for number, source in enumerate(PARTS[name]):
        shape = tuple(part.stop - part.start for part in source)
        memory = np.zeros((shape[0] + 2, 2 * shape[1]) if strided else (shape[0] + 2, shape[1]), dtype=kind)
        arrays[number] = memory[:, ::2] if strided else memory
        copies.append(Copy(number, source, (slice(1, shape[0] + 1), slice(0, shape[1]))))
    read = read_of((ROWS, COLUMNS), tuple(copies), dtype)
    wanted = content_of(read).view(kind).reshape(ROWS, COLUMNS)
    deliver(read, ArrayScatter(arrays))
    for number, source in enumerate(PARTS[name]):
        found = arrays[number]
        assert found[1:-1].tobytes() == wanted[source].tobytes()
        assert not any(found[0].tobytes() + found[-1].tobytes())
    for array in arrays.values():
        array[...] = 0
    ArrayScatter(arrays).write(read, content_of(read))
    for number, source in enumerate(PARTS[name]):
        assert arrays[number][1:-1].tobytes() == wanted[source].tobytes()


def test_contiguous_memory_is_filled_directly() -> None:
    """Without a copy: the buffers are the wanted memory, in pieces."""
    read = read_of((ROWS, COLUMNS), (Copy(0, *[(slice(0, ROWS), slice(0, COLUMNS))] * 2),))
    array = np.zeros((ROWS, COLUMNS), dtype=np.float32)
    buffers = deliver(read, ArrayScatter({0: array}))
    assert all(np.shares_memory(np.frombuffer(buffer, np.uint8), array) for buffer in buffers)
    assert {len(buffer) for buffer in buffers[:-1]} == {PIECE}


@pytest.mark.parametrize("chunk", [(3, 1 << 17), (1, 1, 1 << 18), (1, 5, 1 << 16), (1 << 18,)])
def test_rows_longer_than_a_piece(chunk: tuple[int, ...]) -> None:
    """Where a row does not fit, or there is one only."""
    every_other = tuple(slice(0, size) for size in chunk)
    memory = np.zeros((*chunk, 2), dtype=np.float32)
    read = read_of(chunk, (Copy(0, every_other, every_other),))
    deliver(read, ArrayScatter({0: memory[..., 0]}))
    assert memory[..., 0].tobytes() == content_of(read).tobytes()
    assert not memory[..., 1].view(np.uint32).any()


def test_discard() -> None:
    """All of a chunk passes through a little memory."""
    read = read_of((ROWS, COLUMNS), ())
    assert {len(buffer) for buffer in deliver(read, DISCARD)} <= {PIECE, read.stored.nbytes % PIECE}
