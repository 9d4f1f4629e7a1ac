"""The tiers of a save: the memory of the node, a local folder, the run's URL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from shardckpt.run.places import Place
from shardckpt.storage import LocalStorage, Storage, open_storage

__all__ = ["LOCAL", "MEMORY", "REMOTE", "Destination", "Tier", "tier_name"]

MEMORY = "memory"
"""The tier that every save reaches first: snapshots in the memory of the nodes."""
LOCAL = "local"
"""A durable tier in a folder: a disk of the node, or a file system that all nodes mount."""
REMOTE = "remote"
"""A durable tier in object storage, or any tier behind a local one."""


class Tier(msgspec.Struct, frozen=True, array_like=True):
    """A durable tier of a run.

    Attributes:
        name: `LOCAL` or `REMOTE`.
        url: the run's URL in this tier.
        options: arguments of the fsspec file system that opens `url`.
        keep_last: how many checkpoints retention keeps here; None: all of them.
    """

    name: str
    url: str
    options: dict[str, Any] = {}
    keep_last: int | None = None

    def open(self, opener: Callable[[str, dict[str, Any] | None], Storage] = open_storage) -> Storage:
        """Open the run's storage in this tier. Raises what `opener` raises."""
        return opener(self.url, self.options or None)


@dataclass(frozen=True)
class Destination:
    """Where one save is to be durable: a tier, and its place there."""

    tier: Tier
    place: Place


def tier_name(storage: Storage) -> str:
    """Name the tier that a storage is, if no nearer one stands before it."""
    return LOCAL if isinstance(storage, LocalStorage) else REMOTE
