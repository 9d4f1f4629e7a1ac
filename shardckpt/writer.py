"""Persist: from a staged buffer to a durable pack and part."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import crc32c

from shardckpt.manifest import Part, encode_record, pack_path, part_path
from shardckpt.plan import ChunkWrite
from shardckpt.runs import FAILED
from shardckpt.storage import Storage

__all__ = ["persist", "report_failure"]

_CRC = struct.Struct("<I")


def persist(
    storage: Storage,
    content: memoryview,
    writes: Sequence[ChunkWrite],
    *,
    save_id: str,
    rank: int,
    per_rank: dict[str, Any],
) -> Part:
    """Checksum the chunks in `content`, and write it as `rank`'s pack, then the part that describes it.

    Both are durable when it returns, in this order: whoever sees the part can rely on the pack.
    """
    checksums = []
    for write in writes:
        end = write.offset + write.nbytes
        checksum = crc32c.crc32c(content[write.offset : end])
        _CRC.pack_into(content, end, checksum)
        checksums.append(checksum)
    part = Part(
        id=save_id,
        rank=rank,
        size=len(content),
        chunk=[write.row for write in writes],
        offset=[write.offset for write in writes],
        crc32c=checksums,
        values=per_rank,
    )
    storage.write_pack(pack_path(rank), content)
    storage.write(part_path(rank), encode_record(part))
    return part


def report_failure(storage: Storage, path: str, save_id: str, error: BaseException) -> None:
    """Leave word at `path` that this save has failed, so that no other process waits for it.

    Best effort: the storage may be what failed.
    """
    record = json.dumps({"id": save_id, "error": f"{type(error).__name__}: {error}"})
    try:
        storage.write(f"{path}/{FAILED}" if path else FAILED, record.encode())
    except OSError:
        pass
