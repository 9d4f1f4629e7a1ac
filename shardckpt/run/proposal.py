"""What a save's manifest will say, before the checksums are known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy.typing as npt

from shardckpt.format.manifest import (
    Chunks,
    Manifest,
    Pack,
    pack_path,
)
from shardckpt.format.save_plan import SavePlan
from shardckpt.run.save_info import SaveInfo
from shardckpt.version import __version__

__all__ = ["Proposal"]


@dataclass(frozen=True)
class Proposal:
    """A save that is to become a checkpoint: what its manifest says beside the checksums.

    Attributes:
        info: which save it is.
        metrics: by name; what is not finite as text.
        values: the plain values of the state, as the manifest has them.
        plan: which rank writes which chunk where.
    """

    info: SaveInfo
    metrics: dict[str, float | str]
    values: Any
    plan: SavePlan

    def at(self, path: str) -> Proposal:
        """The same for another path of the run, once the attempt has been claimed there."""
        return replace(self, info=self.info.at(path))

    def encode(self) -> bytes:
        """Encode all but the plan, for a committer in another process."""
        values = msgspec.Raw(msgspec.json.encode(self.values))
        return msgspec.json.encode(_Head(self.info, self.metrics, values))

    @classmethod
    def decode(cls, data: bytes, plan: SavePlan) -> Proposal:
        """Decode what `encode` made; `plan` is the plan of that save."""
        head = msgspec.json.decode(data, type=_Head)
        values = msgspec.json.decode(head.values)
        return cls(head.info, head.metrics, values, plan)

    def manifest(self, per_rank: Sequence[dict[str, Any]], checksums: npt.ArrayLike) -> Manifest:
        """Build the manifest.

        Args:
            per_rank: each rank's PerRank values by path.
            checksums: the CRC-32C of each row of the chunk table.
        """
        plan, info = self.plan, self.info
        return Manifest(
            id=info.id,
            step=info.step,
            attempt=info.attempt,
            world_size=info.world_size,
            created=time.time(),
            writer=f"shardckpt {__version__}",
            metrics=self.metrics,
            values=self.values,
            per_rank=list(per_rank),
            packs=tuple(Pack(pack_path(rank), size) for rank, size in enumerate(plan.pack_sizes)),
            tensors=plan.tensors,
            chunks=Chunks(plan.writer, plan.offset, checksums),
        )


class _Head(msgspec.Struct, frozen=True):
    info: SaveInfo
    metrics: dict[str, float | str]
    values: msgspec.Raw
