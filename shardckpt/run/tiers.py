"""The tiers of a save: the memory of the node, a local folder, the run's URL."""

from __future__ import annotations

from dataclasses import dataclass

from shardckpt.run.places import Place
from shardckpt.storage import LocalStorage, Storage

__all__ = ["MEMORY", "Destination", "tier_of"]


@dataclass(frozen=True)
class Destination:
    """Where a save is to be durable: a tier ("local" or "remote"), the place there, what retention keeps."""

    tier: str
    place: Place
    keep_last: int | None = None


def tier_of(storage: Storage) -> str:
    """The name of the tier that a storage is, unless a nearer one stands before it."""
    return "local" if isinstance(storage, LocalStorage) else "remote"


MEMORY = "memory"
"""The tier that every save reaches first."""
