"""Where chunks lie in packs.

A pack is one file of chunks. Each chunk is its elements in C order, padding included, followed by their checksum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from shardckpt.format.dtypes import itemsize

__all__ = ["CRC_BYTES", "ChunkLocation", "StoredChunk", "chunk_bytes", "content_bytes"]

CRC_BYTES = 4
"""Bytes of a chunk's checksum: the CRC-32C of its elements, little-endian."""


class ChunkLocation(NamedTuple):
    """Where a rank writes one chunk in its own pack.

    Attributes:
        row: the chunk's row in the chunk table.
        offset: its first byte in the pack.
        nbytes: bytes of its elements, padding included; the checksum follows them.
    """

    row: int
    offset: int
    nbytes: int


class StoredChunk(NamedTuple):
    """Where a reader finds one chunk of a checkpoint. Sorts in the order of packs and offsets.

    Attributes:
        pack: the pack's number in the manifest.
        offset: the chunk's first byte in the pack.
        row: its row in the chunk table.
        nbytes: bytes of its elements, padding included; the checksum follows them.
        crc32c: the checksum of its elements according to the manifest.
    """

    pack: int
    offset: int
    row: int
    nbytes: int
    crc32c: int

    @property
    def stop(self) -> int:
        """The first byte of the pack after the chunk's checksum."""
        return self.offset + self.nbytes + CRC_BYTES


def content_bytes(dtype: str, chunk: Sequence[int]) -> int:
    """Bytes of the elements of a chunk of this type and shape, padding included."""
    return math.prod(chunk) * itemsize(dtype)


def chunk_bytes(dtype: str, chunk: Sequence[int]) -> int:
    """Bytes that a chunk of this type and shape takes in its pack: its elements and its checksum."""
    return content_bytes(dtype, chunk) + CRC_BYTES
