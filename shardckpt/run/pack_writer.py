"""Writes a rank's pack, with the checksums of its chunks."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import crc32c

from shardckpt.format.chunks import ChunkLocation
from shardckpt.format.manifest import WrittenPack, pack_path
from shardckpt.storage import Storage

__all__ = ["persist"]

_CRC = struct.Struct("<I")


def persist(
    storage: Storage,
    content: memoryview,
    chunks: Sequence[ChunkLocation],
    *,
    rank: int,
    per_rank: dict[str, Any],
    checksums: list[int] | None = None,
    progress: Callable[[int], object] | None = None,
) -> WrittenPack:
    """Write a rank's pack, which is durable when this returns. Returns its record for a part.

    Args:
        storage: the checkpoint's folder.
        content: the pack, writable: each chunk's checksum is put behind its elements as the chunk is written.
        chunks: where the chunks lie, in the order of `content`.
        rank: the rank's number.
        per_rank: its PerRank values by path.
        checksums: the CRC-32C of each chunk, if `content` was written before and so has them already.
        progress: called with the number of bytes that the storage has taken so far, and with all of them once
            they are durable; from any thread, one call at a time.

    Raises StorageError.
    """
    pending = _Checksums(content, chunks) if checksums is None else None

    def before(start: int, stop: int) -> None:
        if pending is not None:
            pending.advance(stop)
        if progress is not None:
            progress(start)

    storage.write_pack(pack_path(rank), content, before)
    if progress is not None:
        progress(len(content))
    return WrittenPack(
        rank=rank,
        size=len(content),
        chunk=[chunk.row for chunk in chunks],
        offset=[chunk.offset for chunk in chunks],
        crc32c=pending.done if pending is not None else list(checksums or []),
        values=per_rank,
    )


class _Checksums:
    """Checksums of the chunks of a buffer that is gone through once, from its beginning to its end."""

    def __init__(self, content: memoryview, chunks: Sequence[ChunkLocation]) -> None:
        self.done: list[int] = []
        self._content = content
        self._chunks = chunks
        self._position = 0
        self._running = 0

    def advance(self, stop: int) -> None:
        """Go on to byte `stop`: every chunk whose elements end there, or before, gets its checksum.

        Changes bytes from the earlier position on, those of the last checksum perhaps behind `stop`.
        """
        while len(self.done) < len(self._chunks):
            chunk = self._chunks[len(self.done)]
            if chunk.offset >= stop:
                break
            end = chunk.offset + chunk.nbytes
            piece = self._content[max(chunk.offset, self._position) : min(end, stop)]
            self._running = crc32c.crc32c(piece, self._running)
            if end > stop:
                break
            _CRC.pack_into(self._content, end, self._running)
            self.done.append(self._running)
            self._running = 0
        self._position = stop
