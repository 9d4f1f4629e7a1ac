"""Commit: a checkpoint comes into being when every rank's part is in the storage.

The committer and the writers meet in the storage alone, so that a commit needs no collective and no
living trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardckpt.errors import SaveError
from shardckpt.format.manifest import MANIFEST, REFS, Manifest, Part, pack_path
from shardckpt.format.manifest_codec import encode_record
from shardckpt.format.zarr_refs import encode_refs
from shardckpt.run.commit_wait import Patience, wait_for_parts
from shardckpt.run.places import Place
from shardckpt.run.proposal import Proposal
from shardckpt.storage import Storage

__all__ = ["commit"]


def commit(
    place: Place,
    proposal: Proposal,
    timeout: float,
    is_given_up: Callable[[], bool] = lambda: False,
    *,
    own_seconds: float = 0.0,
) -> Manifest:
    """Wait for every rank's part, then make the checkpoint exist.

    Raises SaveError if a rank reports that it failed, if no further part appears for `timeout` seconds, or if
    what the ranks wrote is not what was planned. Then there is no checkpoint.

    Raises SupersededError while parts are lacking if `is_given_up` says so, or if a newer attempt of the run has
    a checkpoint in this storage and no further part appears for `own_seconds`, the time that this process
    took to write its own; or, where the newer attempt has only started, for a minute if that is longer.
    """
    storage = place.storage
    parts = wait_for_parts(storage, proposal, Patience(place, timeout, is_given_up, own_seconds))
    manifest = _assemble(proposal, parts, place.url)
    _check_packs(storage, parts)
    storage.write(REFS, encode_refs(manifest, place.url))
    try:
        storage.create(MANIFEST, encode_record(manifest))  # from here on the checkpoint exists
    except FileExistsError as error:
        raise SaveError(
            f"{place.url} already has a checkpoint, made by another writer while this save was "
            "under way; it was left as it is"
        ) from error
    return manifest


def _assemble(proposal: Proposal, parts: Sequence[Part], where: str) -> Manifest:
    """The manifest, checked so far that every planned chunk was written where it was planned."""
    plan = proposal.plan
    checksums: list[int | None] = [None] * len(plan.writer)
    for part in parts:
        if part.size != plan.pack_sizes[part.rank]:
            raise SaveError(
                f"{where}: rank {part.rank} wrote {part.size} bytes, planned were "
                f"{plan.pack_sizes[part.rank]}"
            )
        for row, offset, checksum in zip(part.chunk, part.offset, part.crc32c, strict=True):
            if row >= len(plan.writer) or (plan.writer[row], plan.offset[row]) != (part.rank, offset):
                raise SaveError(f"{where}: rank {part.rank} wrote chunk {row} elsewhere")
            checksums[row] = checksum
    for row, source in plan.same_as.items():
        checksums[row] = checksums[source]
    if None in checksums:
        raise SaveError(f"{where}: chunk {checksums.index(None)} was written by no rank")
    return proposal.manifest(
        [part.values for part in parts], [checksum for checksum in checksums if checksum is not None]
    )


def _check_packs(storage: Storage, parts: Sequence[Part]) -> None:
    """What the storage has of each pack is what its writer says."""
    for part in parts:
        found = storage.size(pack_path(part.rank))
        if found != part.size:
            raise SaveError(
                f"{storage.url}/{pack_path(part.rank)} has {found} bytes, but rank {part.rank} wrote "
                f"{part.size}"
            )
