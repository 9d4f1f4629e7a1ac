"""Retention: delete the checkpoints that no rule keeps."""

from __future__ import annotations

from collections.abc import Iterable

from shardckpt.format.manifest import MANIFEST
from shardckpt.run.keep_rules import KeepRule, StoredCheckpoint, kept
from shardckpt.run.places import Place
from shardckpt.run.survey import StepFolder, survey
from shardckpt.storage import Storage

__all__ = ["prune"]


def prune(root: Storage, rules: Iterable[KeepRule], newest: Place) -> list[str]:
    """Delete what no rule keeps of the run up to `newest`, which is always kept.

    Unfinished saves that are older than `newest` go too: their writer has given them up, or belongs to an attempt
    that is over. The manifest is deleted first, so a checkpoint that is half deleted does not exist. Returns the
    paths that were deleted, the newest first. Raises StorageError; the next call deletes the rest.
    """
    older = [folder for folder in survey(root) if folder.place.order <= newest.order]
    # Nothing is taken for unfinished, and deleted, because of a listing alone, which may be out of date.
    unfinished = {f.place.path for f in older if not f.is_committed and not f.place.is_committed()}
    committed = [_stored(folder) for folder in older if folder.place.path not in unfinished]
    keep = kept(rules, committed) | {newest.path}
    deleted = []
    for place in (folder.place for folder in older):
        if place.path in keep or (place.path in unfinished and _is_by_rival(place, newest)):
            continue
        place.storage.delete(MANIFEST)
        place.storage.delete_tree("")
        deleted.append(place.path)
    return deleted


def _stored(folder: StepFolder) -> StoredCheckpoint:
    attempt, step, _ = folder.place.order
    return StoredCheckpoint(
        folder.place.path, attempt, step, is_good=folder.is_committed and not folder.is_bad
    )


def _is_by_rival(place: Place, newest: Place) -> bool:
    """True if another writer has the same attempt number, where the storage cannot keep two claims apart."""
    return place.order[0] == newest.order[0] and place.order[2] != newest.order[2]
