"""Snapshots for trainers that restore: which ones there are, and the memory of one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from shardckpt.saver.protocol import Attached, Contents
from shardckpt.saver.snapshots import HeldSnapshot, SnapshotStore

__all__ = ["attachable", "attached"]

_PACKS_AT_ONCE = 64  # descriptors in a message


def attachable(store: SnapshotStore, run: str) -> list[HeldSnapshot]:
    """The run's whole snapshots that no trainer may write into."""
    return [held for held in store.whole(run) if not held.is_at_risk]


def attached(held: HeldSnapshot) -> Iterator[tuple[Attached, list[int]]]:
    """The answers that hand a snapshot over, each with its descriptors, of which copies are to be sent at once.

    In each, the first descriptor is that of the encoded `Contents`, the others are the packs'.
    """
    contents = _sealed(msgspec.msgpack.encode(_contents(held)))
    try:
        parts = [held.parts[rank] for rank in sorted(held.parts)]
        for start in range(0, len(parts), _PACKS_AT_ONCE):
            batch = parts[start : start + _PACKS_AT_ONCE]
            answer = Attached(
                [part.stage.rank for part in batch],
                [part.plan.size for part in batch],
                more=start + len(batch) < len(parts),
            )
            yield answer, [contents, *(part.buffer.descriptor for part in batch)]
    finally:
        os.close(contents)


def _contents(held: HeldSnapshot) -> Contents:
    first = held.parts.get(0)
    return Contents(
        proposal=first.stage.proposal if first else b"",
        plan=first.plan.encoded if first else b"",
        values={rank: part.stage.values for rank, part in held.parts.items()},
        checksums={rank: p.checksums for rank, p in held.parts.items() if p.checksums is not None},
    )


def _sealed(data: bytes) -> int:
    """A descriptor of memory with this content."""
    descriptor = os.memfd_create("shardckpt", os.MFD_CLOEXEC)
    try:
        with open(os.dup(descriptor), "wb") as file:
            file.write(data)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
