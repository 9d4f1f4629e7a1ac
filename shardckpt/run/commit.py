"""Commit: a checkpoint comes into being when every rank's part is in the storage.

The committer and the writers meet in the storage alone, so a commit needs neither a collective nor a living
trainer.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardckpt.errors import CheckpointExistsError, SaveError
from shardckpt.format.manifest import MANIFEST, REFS, Manifest, Part, pack_path
from shardckpt.format.manifest_codec import encode_record
from shardckpt.format.zarr_refs import encode_refs
from shardckpt.run.commit_wait import Patience, wait_for_parts
from shardckpt.run.places import Place
from shardckpt.run.proposal import Proposal
from shardckpt.storage import Storage

__all__ = ["commit", "publish"]


def commit(place: Place, proposal: Proposal, patience: Patience) -> Manifest:
    """Wait for every rank's part, then make the checkpoint exist. If this raises, there is no checkpoint.

    Args:
        place: where the checkpoint is to be.
        proposal: what its manifest says beside the checksums.
        patience: how long to wait for the parts of other processes.

    Raises SaveError if a rank reports that it failed, if no further part appears in time, or if the parts are
    not what was planned; SupersededError if the save is given up for a newer attempt; CheckpointExistsError if
    another writer was faster.
    """
    parts = wait_for_parts(place, proposal, patience)
    manifest = _assemble(proposal, parts, place.url)
    _check_packs(place.storage, parts)
    publish(place, manifest)
    return manifest


def publish(place: Place, manifest: Manifest) -> None:
    """Make a checkpoint exist. Its packs are durable at `place` already. Every checkpoint comes into being here.

    Raises CheckpointExistsError if another writer has made one there, which is left as it is.
    """
    place.storage.write(REFS, encode_refs(manifest, place.url))
    try:
        place.storage.create(MANIFEST, encode_record(manifest))  # from here on the checkpoint exists
    except FileExistsError as error:
        raise CheckpointExistsError(
            f"{place.url} already has a checkpoint, made by another writer in the meantime; it was left as it is"
        ) from error


def _assemble(proposal: Proposal, parts: Sequence[Part], where: str) -> Manifest:
    """Build the manifest. Raises SaveError unless every planned chunk was written where it was planned."""
    plan = proposal.plan
    checksums: list[int | None] = [None] * len(plan.writer)
    for part in parts:
        if part.size != plan.pack_sizes[part.rank]:
            raise SaveError(
                f"{where}: rank {part.rank} wrote {part.size} bytes, planned were {plan.pack_sizes[part.rank]}"
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
    """Raise SaveError unless each pack in the storage is as large as its part says."""
    for part in parts:
        found = storage.size(pack_path(part.rank))
        if found != part.size:
            raise SaveError(
                f"{storage.url}/{pack_path(part.rank)} has {found} bytes, but rank {part.rank} wrote "
                f"{part.size}"
            )
