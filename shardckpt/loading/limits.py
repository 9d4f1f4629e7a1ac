"""How much a load reads, sends and holds at a time."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT_LIMITS", "LoadLimits"]


@dataclass(frozen=True)
class LoadLimits:
    """Bytes, but for `mapped_packs`. None of them changes what is loaded.

    Attributes:
        near_request: read together from mapped files and from memory.
        far_request: read together from a storage that needs requests.
        ahead: fetched before they are needed, where one group of chunks is awaited after another.
        shared_read: read by one rank and sent to others in one message.
        batch: sent and received by one rank between two agreements of all ranks.
        mapped_packs: packs that are mapped at a time; each takes a file descriptor.
    """

    near_request: int = 8 << 20
    far_request: int = 16 << 20
    ahead: int = 48 << 20
    shared_read: int = 8 << 20
    batch: int = 16 << 20
    mapped_packs: int = 64


DEFAULT_LIMITS = LoadLimits()
