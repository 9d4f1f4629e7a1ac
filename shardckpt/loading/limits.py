"""How much a load reads, sends and holds at a time."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT_LIMITS", "LoadLimits"]


@dataclass(frozen=True)
class LoadLimits:
    """Bytes, but for `open_files`. None of them changes what is loaded.

    Attributes:
        near_request: read together from local files and from memory.
        far_request: read together from a storage that needs requests.
        direct: read together from a disk past the page cache.
        ahead: fetched before they are needed, where one group of chunks is awaited after another.
        shared_read: read by one rank and sent to others in one message.
        batch: sent and received by one rank between two agreements of all ranks.
        open_files: packs that are open at a time; each takes up to two file descriptors.
    """

    near_request: int = 8 << 20
    far_request: int = 16 << 20
    direct: int = 4 << 20
    ahead: int = 48 << 20
    shared_read: int = 8 << 20
    batch: int = 16 << 20
    open_files: int = 64


DEFAULT_LIMITS = LoadLimits()
