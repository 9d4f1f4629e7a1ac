"""Retention: delete what is older than the checkpoints to keep."""

from __future__ import annotations

from shardckpt.format.manifest import MANIFEST
from shardckpt.run.places import Place, iter_places
from shardckpt.storage import Storage

__all__ = ["prune"]


def prune(root: Storage, keep_last: int, newest: Place) -> list[str]:
    """Delete what is older than the `keep_last` newest good checkpoints of the run up to `newest`.

    Unfinished saves that are older than `newest` go too: their writer has either given them up or
    belongs to an attempt that is over. The manifest goes first, so a checkpoint that is half deleted
    does not exist. Returns the paths that were deleted.
    """
    good, deleted = 0, []
    for place in iter_places(root):
        if place.order > newest.order:
            continue
        if place.is_committed():
            bad = place.is_bad()
            if good < keep_last or place.path == newest.path:
                good += not bad
                continue
        elif place.order[0] == newest.order[0] and place.order[2] != newest.order[2]:
            continue  # another writer with the same number, where the storage cannot tell them apart
        place.storage.delete(MANIFEST)
        place.storage.delete_tree("")
        deleted.append(place.path)
    return deleted
