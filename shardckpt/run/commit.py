"""Commit: a checkpoint comes into being when every rank's part is in the storage.

The committer and the writers meet in the storage alone, so a commit needs neither a collective nor a living
trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from shardckpt.errors import CheckpointExistsError, SaveError
from shardckpt.format.manifest import MANIFEST, REFS, Manifest, Part, WrittenPack, pack_path
from shardckpt.format.manifest_codec import encode_record
from shardckpt.format.zarr_refs import are_written, encode_refs
from shardckpt.run.commit_wait import Patience, wait_for_parts
from shardckpt.run.places import Place
from shardckpt.run.proposal import Proposal
from shardckpt.storage.parallel import in_parallel

__all__ = ["commit", "publish"]

_log = logging.getLogger("shardckpt")

_NONE = -1  # no checksum
_THREADS = 16
"""Packs whose size is asked for at one time."""


def commit(place: Place, proposal: Proposal, patience: Patience, own: Part | None = None) -> Manifest:
    """Wait for every rank's part, then make the checkpoint exist. If this raises, there is no checkpoint.

    Args:
        place: where the checkpoint is to be.
        proposal: what its manifest says beside the checksums.
        patience: how long to wait for the parts of other processes.
        own: what this process wrote itself, durably.

    Raises SaveError if a rank reports that it failed, if no further part appears in time, or if the parts are
    not what was planned; SupersededError if the save is given up for a newer attempt; CheckpointExistsError if
    another writer was faster.
    """
    packs = wait_for_parts(place, proposal, patience, own)
    manifest = _assemble(proposal, packs, place.url)
    _check_packs(place, packs)
    publish(place, manifest)
    return manifest


def publish(place: Place, manifest: Manifest) -> None:
    """Make a checkpoint exist. Its packs are durable at `place` already. Every checkpoint comes into being here.

    Raises CheckpointExistsError if another writer has made one there, which is left as it is.
    """
    if are_written(manifest):
        place.storage.write(REFS, encode_refs(manifest, place.url))
    else:
        place.storage.delete(REFS)  # which a save that did not come this far may have left
        _log.info(
            "%s has %d chunks, too many for a %s: nothing needs it but plain Zarr, for which `shardckpt refs %s` "
            "writes it",
            *(place.url, len(manifest.chunks.pack), REFS, place.url),
        )
    try:
        place.storage.create(MANIFEST, encode_record(manifest))  # from here on the checkpoint exists
    except FileExistsError as error:
        raise CheckpointExistsError(
            f"{place.url} already has a checkpoint, made by another writer in the meantime; it was left as it is"
        ) from error


def _assemble(proposal: Proposal, packs: Sequence[WrittenPack], where: str) -> Manifest:
    """Build the manifest. Raises SaveError unless every planned chunk was written where it was planned."""
    plan = proposal.plan
    writer, offset = plan.writer, plan.offset
    checksums = np.full(len(writer), _NONE, np.int64)
    for pack in packs:
        if pack.size != plan.pack_sizes[pack.rank]:
            raise SaveError(
                f"{where}: rank {pack.rank} wrote {pack.size} bytes, planned were {plan.pack_sizes[pack.rank]}"
            )
        rows = np.array(pack.chunk, np.int64)
        wrong = rows >= len(writer)
        if not wrong.any():
            wrong = (writer[rows] != pack.rank) | (offset[rows] != pack.offset)
        if wrong.any():
            raise SaveError(f"{where}: rank {pack.rank} wrote chunk {rows[wrong][0]} elsewhere")
        checksums[rows] = pack.crc32c
    tied, sources = plan.tied_rows
    checksums[tied] = checksums[sources]
    if (checksums == _NONE).any():
        raise SaveError(f"{where}: chunk {np.argmax(checksums == _NONE)} was written by no rank")
    return proposal.manifest([pack.values for pack in packs], checksums)


def _check_packs(place: Place, packs: Sequence[WrittenPack]) -> None:
    """Raise SaveError unless each pack in the storage is as large as its part says.

    In a run one listing shows them all. A checkpoint alone may lie in a folder with any number of other files;
    there, and where the listing shows something else, each pack is asked for.
    """
    listed = place.storage.sizes() if place.path else {}
    doubtful = [pack for pack in packs if listed.get(pack_path(pack.rank)) != pack.size]
    sizes = in_parallel(lambda pack: place.storage.size(pack_path(pack.rank)), doubtful, _THREADS)
    for pack, found in zip(doubtful, sizes, strict=True):
        if found != pack.size:
            raise SaveError(
                f"{place.url}/{pack_path(pack.rank)} has {found} bytes, but rank {pack.rank} wrote {pack.size}"
            )
