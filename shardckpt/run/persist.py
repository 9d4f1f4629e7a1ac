"""Persist: from staged packs to a checkpoint in one tier. Free of torch, and of the trainers.

Each process that has staged packs of a save does this on its own; the processes meet only in the storage.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from shardckpt.errors import CheckpointExistsError, OutOfReachError
from shardckpt.format.chunks import ChunkLocation
from shardckpt.format.manifest import Manifest, Part, WrittenPack, marker_path
from shardckpt.run.commit import commit
from shardckpt.run.commit_wait import Patience
from shardckpt.run.failure_reports import report_failure
from shardckpt.run.index import note_committed
from shardckpt.run.keep_rules import KeepNewest
from shardckpt.run.pack_writer import persist
from shardckpt.run.parts import write_part
from shardckpt.run.places import FAILED, Place
from shardckpt.run.proposal import Proposal
from shardckpt.run.retention import prune
from shardckpt.run.tiers import Destination

__all__ = ["StagedPack", "check_free", "persist_save"]

_log = logging.getLogger("shardckpt")

_PARALLEL = 2  # one pack's checksums are computed while another's bytes are on their way


def check_free(place: Place) -> None:
    """Raise CheckpointExistsError if a checkpoint is there: writing would damage it."""
    if place.is_committed():
        raise CheckpointExistsError(
            f"{place.url} has a checkpoint already, which is never overwritten. Save under another "
            f"URL, or delete "
            "that folder first."
        )


@dataclass
class StagedPack:
    """One rank's pack, staged in memory.

    Attributes:
        rank: whose it is.
        content: the pack's bytes, writable: the checksums are put into it.
        chunks: where its chunks lie.
        values: the rank's PerRank values by path.
        checksums: the CRC-32C of each chunk; `persist_save` sets them.
    """

    rank: int
    content: memoryview
    chunks: Sequence[ChunkLocation]
    values: dict[str, Any]
    checksums: list[int] | None = None


def persist_save(
    destination: Destination,
    save_id: str,
    packs: Sequence[StagedPack],
    proposal: Proposal | None,
    timeout: float,
    progress: Callable[[int], object] | None = None,
    is_given_up: Callable[[], bool] = lambda: False,
    *,
    reports_outage: bool = True,
) -> Manifest | None:
    """Make packs durable, then one part for them all; with rank 0's proposal, also commit the save and prune.

    Returns the manifest of what was committed.

    Args:
        destination: the tier, and the checkpoint's place there.
        save_id: the save's.
        packs: this process's packs of it.
        proposal: rank 0's, if this process commits; else None.
        timeout: seconds without another rank's part after which the commit has failed.
        progress: called with the bytes of all packs that the storage has taken so far, from several threads.
        is_given_up: asked while the parts of others are missing; True ends the wait.
        reports_outage: False: do not report OutOfReachError in the storage. A caller that tries again has not
            failed, and calls `report_lost` when it gives up.

    Raises CheckpointExistsError, with nothing written, if there is one already; what `commit` raises;
    StorageError. Failures are reported in the storage, so that no other process waits for this one's parts.
    """
    place = destination.place
    taken = dict.fromkeys((pack.rank for pack in packs), 0)

    def advance(rank: int, nbytes: int) -> None:
        taken[rank] = nbytes
        if progress is not None:
            progress(sum(taken.values()))

    def report(path: str, error: Exception) -> None:
        if reports_outage or not isinstance(error, OutOfReachError):
            report_failure(place.storage, path, save_id, error)

    def persist_one(pack: StagedPack) -> WrittenPack:
        try:
            written = persist(
                place.storage,
                pack.content,
                pack.chunks,
                rank=pack.rank,
                per_rank=pack.values,
                checksums=pack.checksums,
                progress=partial(advance, pack.rank),
            )
        except Exception as error:
            report(marker_path(save_id, pack.rank), error)
            raise
        pack.checksums = written.crc32c
        return written

    def persist_part() -> Part:
        if len(packs) == 1:
            written = [persist_one(packs[0])]
        else:
            with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="shardckpt-persist") as pool:
                written = list(pool.map(persist_one, packs))
        part = Part(id=save_id, packs=written)
        try:
            write_part(place.storage, part)
        except Exception as error:
            report(marker_path(save_id, packs[0].rank), error)
            raise
        return part

    check_free(place)
    started = time.monotonic()
    try:
        part = persist_part()
        if proposal is None:
            return None
        patience = Patience(timeout, is_given_up, time.monotonic() - started)
        manifest = commit(place, proposal, patience, part)
    except Exception as error:
        if proposal is not None:
            report(FAILED, error)
        raise
    gone = _prune(destination)
    if place.path:
        note_committed(place, manifest, gone)
    return manifest


def _prune(destination: Destination) -> list[str]:
    """Delete old checkpoints. Returns their paths.

    A failure is logged only: the new one is durable, and the next prune tries again.
    """
    place, keep_last = destination.place, destination.tier.keep_last
    if keep_last is None:
        return []
    try:
        return prune(place.root, [KeepNewest(keep_last)], place)
    except OSError as error:
        _log.warning("old checkpoints of %s could not be deleted: %s", place.root.url, error)
        return []
