"""torch's stores, with the one method that its type hints lack."""

from __future__ import annotations

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

__all__ = ["PrefixStore", "Store", "TCPStore", "connect_again"]


def connect_again(store: Store) -> Store:
    """A connection of its own to the same store: operations on one connection wait for each other."""
    return store.clone()  # type: ignore[attr-defined,no-any-return]
