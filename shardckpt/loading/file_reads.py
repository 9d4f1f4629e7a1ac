"""Streams of local files: from the page cache where that has the bytes, else past it. Free of torch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from shardckpt.errors import CorruptError
from shardckpt.memory import aligned_memory
from shardckpt.storage import LocalStorage
from shardckpt.storage.local_file import PAGE, LocalFile

__all__ = ["BlockPool", "FileStream", "OpenFiles"]


class OpenFiles:
    """Files of a folder, by number, of which so many stay open. Safe to use from several threads."""

    def __init__(self, root: LocalStorage, paths: Sequence[str], most: int) -> None:
        self._root = root
        self._paths = paths
        self._most = most
        self._open: OrderedDict[int, LocalFile] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, number: int) -> LocalFile:
        """The file, which is closed once it is used no longer. Raises FileNotFoundError, StorageError."""
        with self._lock:
            if number not in self._open:
                self._open[number] = self._root.open_file(self._paths[number])
            self._open.move_to_end(number)
            if len(self._open) > self._most:
                self._open.popitem(last=False)
            return self._open[number]


class BlockPool:
    """Blocks of memory for reads past the page cache, in huge pages. Safe to use from several threads."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: list[npt.NDArray[np.uint8]] = []

    def take(self) -> npt.NDArray[np.uint8]:
        """A block: one that was put back, or a new one."""
        try:
            return self._free.pop()
        except IndexError:
            return aligned_memory(self._nbytes)

    def put_back(self, block: npt.NDArray[np.uint8]) -> None:
        """Make the block available to others."""
        self._free.append(block)


class FileStream:
    """Reads a range of a file in ascending order. For one thread.

    Args:
        file: the file.
        stop: the end of the range.
        turn: held by the thread while the stream is open, and given to others while it waits for the disk.
        blocks: for reads past the page cache; None: read through it.
    """

    def __init__(
        self, file: LocalFile, stop: int, turn: threading.Semaphore, blocks: BlockPool | None
    ) -> None:
        self._file = file
        self._stop = stop
        self._turn = turn
        self._blocks = blocks
        self._block: npt.NDArray[np.uint8] | None = None
        self._start = self._end = 0  # of what the block holds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._block is not None and self._blocks is not None:
            self._blocks.put_back(self._block)

    def read(self, offset: int, *buffers: memoryview) -> None:
        """See `PackStream`."""
        wanted = sum(map(len, buffers))
        if not self._start <= offset < self._end:
            found = self._file.read_cached(offset, buffers)
            if found == wanted:
                return
        else:
            found = 0
        for buffer in buffers:
            if found >= len(buffer):
                found -= len(buffer)
            else:
                self._read_one(offset + found, buffer[found:])
                found = 0
            offset += len(buffer)

    def _read_one(self, offset: int, buffer: memoryview) -> None:
        target = np.frombuffer(buffer, dtype=np.uint8)
        while len(target):
            found = self._from_block(offset, target) or self._file.read_cached(offset, [target.data])
            if not found and not (found := self._from_disk(offset, target)):
                raise CorruptError(
                    f"{self._file.path} is truncated: wanted {len(target)} bytes at offset {offset}, found 0"
                )
            target, offset = target[found:], offset + found

    def _from_block(self, offset: int, target: npt.NDArray[np.uint8]) -> int:
        """Copy what the block has for the target. Returns the number of bytes."""
        if self._block is None or not self._start <= offset < self._end:
            return 0
        part = self._block[offset - self._start : self._end - self._start][: len(target)]
        np.copyto(target[: len(part)], part)
        return len(part)

    def _from_disk(self, offset: int, target: npt.NDArray[np.uint8]) -> int:
        """Read for the target, while other threads have the turn. Returns the number of bytes; 0 at the end."""
        self._turn.release()
        try:
            if not self._fill_block(offset):
                return self._file.read(offset, [target.data])
        finally:
            self._turn.acquire()
        return self._from_block(offset, target)

    def _fill_block(self, offset: int) -> bool:
        """Read the block from the page of `offset` on. Returns False where only the page cache can be read."""
        if self._blocks is None:
            return False
        if self._block is None:
            self._block = self._blocks.take()
        start = offset // PAGE * PAGE
        length = min(len(self._block), -(-self._stop // PAGE) * PAGE - start)
        self._start = self._end = 0  # of no use after an error
        found = self._file.read_direct(start, self._block[:length].data)
        if found < 0:
            return False
        self._start, self._end = start, start + found
        return True
