"""What a save's manifest will say, before the checksums are known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shardckpt.format.manifest import (
    Chunks,
    Manifest,
    Pack,
    pack_path,
)
from shardckpt.format.save_plan import SavePlan
from shardckpt.version import __version__

__all__ = ["Proposal"]


@dataclass(frozen=True)
class Proposal:
    """A save that is on its way to be a checkpoint: what its manifest will say beside the checksums."""

    id: str
    step: int
    attempt: int
    metrics: dict[str, float | str]
    values: Any
    plan: SavePlan

    @property
    def world_size(self) -> int:
        """The number of ranks that write."""
        return len(self.plan.pack_sizes)

    def encode(self) -> bytes:
        """All but the plan, for a committer in another process."""
        return msgspec.json.encode(
            _Head(
                self.id,
                self.step,
                self.attempt,
                self.metrics,
                msgspec.Raw(msgspec.json.encode(self.values)),
            )
        )

    @classmethod
    def decode(cls, data: bytes, plan: SavePlan) -> Proposal:
        """What `encode` made, with its plan."""
        head = msgspec.json.decode(data, type=_Head)
        values = msgspec.json.decode(head.values)
        return cls(head.id, head.step, head.attempt, head.metrics, values, plan)

    def manifest(self, per_rank: Sequence[dict[str, Any]], checksums: Sequence[int]) -> Manifest:
        """The manifest, given every rank's own values and the CRC-32C of each row of the chunk table."""
        plan = self.plan
        return Manifest(
            id=self.id,
            step=self.step,
            attempt=self.attempt,
            world_size=self.world_size,
            created=time.time(),
            writer=f"shardckpt {__version__}",
            metrics=self.metrics,
            values=self.values,
            per_rank=list(per_rank),
            packs=tuple(Pack(pack_path(rank), size) for rank, size in enumerate(plan.pack_sizes)),
            tensors=plan.tensors,
            chunks=Chunks(pack=list(plan.writer), offset=list(plan.offset), crc32c=list(checksums)),
        )


class _Head(msgspec.Struct, frozen=True):
    id: str
    step: int
    attempt: int
    metrics: dict[str, float | str]
    values: msgspec.Raw
