"""Stage: copy this rank's chunks into a buffer that has the layout of its pack.

Training waits for this copy only. The buffer is reused from save to save.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from shardckpt.format.box import Box
from shardckpt.format.save_plan import ChunkWrite
from shardckpt.state.tensors import TensorShard, dense, flat_bytes, is_plain, torch_dtype

__all__ = ["Copies", "StagingBuffer", "box_data", "chunk_view", "shard_slices"]

_PAGE = 4096
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class StagingBuffer:
    """Memory for one rank's pack.

    Args:
        writes: the chunks of the pack, in its order.
        size: bytes of the pack.
        memory: at least as large; None: new memory of this process.
    """

    def __init__(self, writes: Sequence[ChunkWrite], size: int, memory: memoryview | None = None) -> None:
        self.size = size
        self._is_own = memory is None
        self._map = memoryview(_own_memory(size)) if memory is None else memory
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._writes = writes
        self._lock = threading.Lock()
        self._is_pinned = False
        self._is_touched = self._is_clean = False

    @property
    def content(self) -> memoryview:
        """The pack's bytes, writable."""
        return self._map[: self.size]

    def touch(self) -> None:
        """Have the kernel provide the memory now: that takes several times as long as a later copy into it."""
        with self._lock:
            if self._is_own and not self._is_touched:
                self._bytes.zero_()
                self._is_touched = True

    def fill(self, copies: Copies) -> None:
        """Copy the live tensors to this buffer. When this returns, they may change again."""
        with self._lock, torch.no_grad():
            self._is_touched = True
            self._clean()
            base = self._bytes.data_ptr()
            for offset, source, nbytes in copies.plain:
                ctypes.memmove(base + offset, source, nbytes)  # torch's takes twice as long (bench/memory)
            for device, others in copies.others.items():
                is_gpu = device.type == "cuda"
                if is_gpu:
                    self._pin()
                targets = [self._target(write) for write, _ in others]
                torch._foreach_copy_(targets, [source for _, source in others], non_blocking=is_gpu)
                if is_gpu:
                    torch.cuda.current_stream(device).synchronize()

    def holds(self, copies: Copies) -> bool:
        """Return True if the live tensors equal, in every byte, what was copied here last."""
        base = self._bytes.data_ptr()
        with self._lock, torch.no_grad():
            for offset, address, nbytes in copies.plain:
                if _memcmp(base + offset, address, nbytes):
                    return False
            for others in copies.others.values():
                for write, source in others:
                    live = flat_bytes(dense(source).cpu())
                    if not torch.equal(live, flat_bytes(self._target(write).contiguous())):
                        return False
        return True

    def _target(self, write: ChunkWrite) -> torch.Tensor:
        """Return the elements of a chunk that its box fills; the others are padding."""
        chunk = chunk_view(self._bytes, write.location.offset, write.dtype, write.chunk)
        return chunk[tuple(slice(0, n) for n in write.box.shape)]

    def _clean(self) -> None:
        """Zero the bytes that no copy writes to, where the memory may have held another pack."""
        if self._is_clean:
            return
        self._is_clean = True
        if self._is_own:
            return
        base, end = self._bytes.data_ptr(), 0
        for write in self._writes:
            start, nbytes = write.location.offset, write.location.nbytes
            if (
                nbytes < _PAGE or write.box.shape != write.chunk
            ):  # small, or padded: zeroed with what is around
                continue
            ctypes.memset(base + end, 0, start - end)
            end = start + nbytes
        ctypes.memset(base + end, 0, self.size - end)

    def _pin(self) -> None:
        """Pin the memory, so that a GPU writes to it directly. If the driver refuses, copies take a detour.

        Follows CUDA's documentation of cudaHostRegister; not measured yet.
        """
        if not self._is_pinned:
            self._is_pinned = True
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            address = self._bytes.data_ptr()
            if not int(runtime.cudaHostRegister(address, self._bytes.nbytes, 0)):
                weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False


class Copies:
    """The copies that stage a state, computed once for any number of saves and buffers.

    Args:
        writes: the chunks that this rank writes.
        tensors: this rank's tensors, which are kept alive.

    Attributes:
        plain: (offset in the pack, address, bytes) of each chunk that lies in CPU memory as it does in the pack.
        others: by device, the chunks to copy by torch, each with its live tensor.
    """

    def __init__(self, writes: Sequence[ChunkWrite], tensors: Sequence[TensorShard]) -> None:
        self.plain: list[tuple[int, int, int]] = []
        self.others: dict[torch.device, list[tuple[ChunkWrite, torch.Tensor]]] = {}
        self._kept: list[torch.Tensor] = []  # whose addresses are in `plain`
        by_name = {tensor.name: tensor for tensor in tensors}
        for write in writes:
            tensor = by_name[write.name]
            source = box_data(tensor, write.box)
            if is_plain(source) and write.box.shape[1:] == write.chunk[1:]:
                self.plain.append((write.location.offset, source.data_ptr(), source.nbytes))
                self._kept.append(source)
            else:
                self.others.setdefault(source.device, []).append((write, source))


def _own_memory(size: int) -> mmap.mmap:
    """Zeroed memory of this process, page-aligned."""
    memory = mmap.mmap(-1, max(_PAGE, -(-size // _PAGE) * _PAGE), mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer page faults in the first save
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def box_data(tensor: TensorShard, box: Box) -> torch.Tensor:
    """Return the elements of `box` in this rank's memory; it must lie in one of the shard's pieces."""
    pieces = tensor.pieces
    if len(pieces) == 1 and pieces[0].box == box:  # so it is with nearly all small tensors
        return tensor.data
    return tensor.data[shard_slices(tensor, box)]


def shard_slices(tensor: TensorShard, box: Box) -> tuple[slice, ...]:
    """Return the slices that select `box` from this rank's memory; it must lie in one of the shard's pieces."""
    for piece in tensor.pieces:
        if box.intersect(piece.box) is not None or not box.shape:
            shift = tuple(a - o for a, o in zip(piece.at, piece.box.offsets, strict=True))
            return tuple(
                slice(o + s, o + s + n) for o, n, s in zip(box.offsets, box.shape, shift, strict=True)
            )
    raise AssertionError(f"{tensor.name!r}: {box} is in no piece of this rank")


def chunk_view(buffer: torch.Tensor, offset: int, dtype: str, chunk: Sequence[int]) -> torch.Tensor:
    """Return the chunk at byte `offset` of a byte tensor, as a tensor of shape `chunk` that shares its memory."""
    kind = torch_dtype(dtype)
    count = math.prod(chunk) * kind.itemsize
    return buffer[offset : offset + count].view(kind).view(tuple(chunk))
