"""Stage: copy what this rank writes into a buffer that is laid out as its pack will be.

This copy is all that training waits for. The buffer is reused from save to save.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shardckpt.box import Box
from shardckpt.local import LocalTensor, torch_dtype
from shardckpt.plan import ChunkWrite

__all__ = ["Copies", "StagingBuffer", "chunk_view", "local_slices"]

_PAGE = 4096


class StagingBuffer:
    """Memory for one rank's pack, and the chunks' places in it as tensors."""

    def __init__(self, writes: Sequence[ChunkWrite], size: int, memory: mmap.mmap | None = None) -> None:
        """Room for a pack of `size` bytes with these chunks: in `memory`, or in new memory of this process."""
        self.size = size
        self._is_own = memory is None
        self._map = _own_memory(size) if memory is None else memory
        self._lock = threading.Lock()
        self._is_clean = False
        self._is_pinned = False
        self._is_touched = not self._is_own
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._writes = tuple(writes)
        self._whole = [chunk_view(self._bytes, write.offset, write.dtype, write.chunk) for write in writes]
        self._views = [
            view[tuple(slice(0, n) for n in write.box.shape)]
            for write, view in zip(writes, self._whole, strict=True)
        ]

    @property
    def content(self) -> memoryview:
        """The pack's bytes, writable."""
        return memoryview(self._map)[: self.size]

    def touch(self) -> None:
        """Have the kernel provide the memory, which takes several times as long as a later copy into it."""
        with self._lock:
            if not self._is_touched:
                self._bytes.zero_()
                self._is_touched = True

    def copies_from(self, tensors: Mapping[str, LocalTensor]) -> Copies:
        """What is to be copied to fill this buffer, worked out once for any number of times."""
        copies = Copies(self)
        for write, view in zip(self._writes, self._views, strict=True):
            tensor = tensors[write.name]
            copies.add(tensor.data[local_slices(tensor, write.box)], view)
        return copies

    def pin(self) -> None:
        """Let a GPU write here without a copy in between; where the driver refuses, it makes that copy.

        Written by CUDA's documentation of cudaHostRegister, and not yet measured.
        """
        if not self._is_pinned:
            self._is_pinned = True
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            address = self._bytes.data_ptr()
            if not int(runtime.cudaHostRegister(address, self._bytes.nbytes, 0)):
                weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """While something is copied into this buffer."""
        with self._lock:
            self._is_touched = True
            self._clean()
            yield

    def _clean(self) -> None:
        """Zero what lies between and behind the chunks' elements, where another pack may have been."""
        if self._is_clean:
            return
        self._is_clean = True
        if self._is_own:
            return
        end = 0
        for write, whole, view in zip(self._writes, self._whole, self._views, strict=True):
            self._bytes[end : write.offset].zero_()
            if view.shape != whole.shape:
                whole.zero_()
            end = write.offset + write.nbytes
        self._bytes[end : self.size].zero_()


def _own_memory(size: int) -> mmap.mmap:
    """Zeroed memory of this process, page-aligned."""
    memory = mmap.mmap(-1, max(_PAGE, -(-size // _PAGE) * _PAGE), mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer page faults in the first save
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Copies:
    """Live tensors and the places in a staging buffer that they are copied to."""

    def __init__(self, buffer: StagingBuffer) -> None:
        self._buffer = buffer
        self._moves: list[tuple[int, int, int]] = []
        self._kept: list[torch.Tensor] = []  # whose addresses are in _moves
        self._others: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def add(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Note one more copy, between tensors of one shape and type."""
        if _is_plain(source) and _is_plain(target):
            self._moves.append((target.data_ptr(), source.data_ptr(), source.nbytes))
            self._kept += [source, target]
        else:
            targets, sources = self._others.setdefault(source.device, ([], []))
            targets.append(target)
            sources.append(source)

    def run(self) -> None:
        """Copy. When it returns, the live tensors may change again."""
        with self._buffer.exclusively(), torch.no_grad():
            for target, source, nbytes in self._moves:
                ctypes.memmove(target, source, nbytes)  # twice as fast as what torch does here
            for device, (targets, sources) in self._others.items():
                is_gpu = device.type == "cuda"
                if is_gpu:
                    self._buffer.pin()
                torch._foreach_copy_(targets, sources, non_blocking=is_gpu)
                if is_gpu:
                    torch.cuda.current_stream(device).synchronize()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements are its memory's bytes, one after another."""
    plain = tensor.device.type == "cpu" and tensor.is_contiguous()
    return plain and not tensor.is_conj() and not tensor.is_neg()


def local_slices(tensor: LocalTensor, box: Box) -> tuple[slice, ...]:
    """What selects `box` from this rank's memory. The box must lie in one of the tensor's pieces."""
    for piece in tensor.pieces:
        if box.intersect(piece.box) is not None or not box.shape:
            shift = tuple(a - o for a, o in zip(piece.at, piece.box.offsets, strict=True))
            return tuple(
                slice(o + s, o + s + n) for o, n, s in zip(box.offsets, box.shape, shift, strict=True)
            )
    raise AssertionError(f"{tensor.name!r}: {box} is in no piece of this rank")


def chunk_view(buffer: torch.Tensor, offset: int, dtype: str, chunk: Sequence[int]) -> torch.Tensor:
    """The chunk at `offset` of a byte tensor, as a tensor that shares its memory."""
    kind = torch_dtype(dtype)
    count = int(np.prod(chunk, dtype=np.int64)) * kind.itemsize
    return buffer[offset : offset + count].view(kind).view(tuple(chunk))
