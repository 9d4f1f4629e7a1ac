"""SaveBackend: who persists what this rank has staged, the node's saver or a thread of this process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shardckpt.errors import ShardckptError
from shardckpt.format.save_plan import SavePlan
from shardckpt.run.attempt_keeper import AttemptKeeper, Condition
from shardckpt.run.attempts import Attempt
from shardckpt.run.failure_reports import report_lost
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.run.tiers import Destination
from shardckpt.saving.handle import SaveHandle
from shardckpt.saving.staging import StagingBuffer
from shardckpt.storage import Storage

__all__ = ["JobAttempt", "Save", "SaveBackend", "report_missing_part"]

_log = logging.getLogger("shardckpt")


@dataclass(frozen=True)
class Save:
    """This rank's part of a save.

    Attributes:
        info: which save it is.
        rank: this rank's number.
        local_ranks: number of ranks that have the same backend, this one included.
        destinations: the durable tiers that the save goes to.
        values: this rank's PerRank values by path.
        proposal: on rank 0, what the manifest will contain; None on others.
    """

    info: SaveInfo
    rank: int
    local_ranks: int
    destinations: Sequence[Destination]
    values: dict[str, Any]
    proposal: Proposal | None

    @property
    def is_of_run(self) -> bool:
        """True if the checkpoint lies in an attempt of a run, False if it lies alone."""
        return bool(self.info.path)

    @property
    def is_shared(self) -> bool:
        """True if other processes than this rank's backend wait in storage for its part."""
        return self.info.world_size > self.local_ranks


@dataclass(frozen=True)
class JobAttempt:
    """The attempt that a job saves as.

    Attributes:
        attempt: as all ranks of the job know it.
        root: the run's storage.
        claims: True if this rank's backend claims it; other backends wait for the claim in storage.
        tell: called with each change of the claim, by another thread.
    """

    attempt: Attempt
    root: Storage
    claims: bool
    tell: Callable[[Condition], object]


class SaveBackend(Protocol):
    """Provides buffers to stage into, and persists what is staged, while training goes on."""

    @property
    def id(self) -> str:
        """Equal for two ranks only if one process persists what both stage."""

    @property
    def outlives_trainer(self) -> bool:
        """True if what is submitted is persisted even if this process ends at once, and kept for the next one."""

    @property
    def is_ready(self) -> bool:
        """True if `begin` would not wait for an earlier save."""

    @property
    def is_lost(self) -> bool:
        """True if it has to be prepared again before it can be used."""

    @property
    def last_staged(self) -> StagingBuffer | None:
        """The buffer that `begin` returned last; None if that was for another plan."""

    def adopt(self, job: JobAttempt) -> None:
        """Have later saves belong to this attempt, and claim it in the background if `job.claims`.

        Raises SaverError.
        """

    def learn(self, name: str) -> None:
        """Take in the name of the attempt's folder, now that the attempt is claimed."""

    def wait_claimed(self, patience: float, *, is_urgent: bool) -> str:
        """Wait until the attempt is claimed.

        Args:
            patience: seconds to wait at most.
            is_urgent: True to return also as soon as the storage is found to be out of reach.

        Returns the name of the attempt's folder; empty if it is not known yet. Raises StorageError if the attempt
        cannot be claimed; SaverError.
        """

    def prepare(self, plan: SavePlan, rank: int) -> None:
        """Get buffers for the rank's packs by this plan, in the background if that takes long.

        Raises SaverError if the saver cannot be reached; MemoryError or OSError if there is no memory.
        """

    def expect(self, nbytes: int, /) -> None:
        """Get buffers of so many bytes in the background, which are to serve a plan that is not made yet.

        Does nothing if there is a plan already, or no saver.
        """

    def begin(self, save: Save, /) -> StagingBuffer:
        """Return a buffer to stage the rank's part of a save in. Waits until there is one.

        Raises SaverError or MemoryError; then nothing is to be submitted.
        """

    def submit(self, save: Save, handle: SaveHandle) -> None:
        """Persist what is staged in the buffer that `begin` returned last, and note the outcome in the handle."""

    def abandon(self, save: Save, error: BaseException, /) -> None:
        """Tell those that wait for this rank's part that it will not be staged."""

    def probe(self, seconds: float, /) -> None:
        """Wait for a sign of life, at most so many seconds; without one, the backend is lost from now on."""

    def limit_silence(self, seconds: float, /) -> None:
        """From now on, take the backend for lost after so many seconds without an answer, or fewer."""

    def close(self) -> None:
        """Take no more saves. What was submitted is persisted."""


def report_missing_part(
    save: Save,
    keeper: AttemptKeeper | None,
    destinations: Sequence[Destination],
    error: BaseException,
    patience: float,
) -> None:
    """Write a failure marker to storage, in the background, so that the committing process stops waiting.

    Does nothing if no other process waits for this rank's part. The end of this process does not wait for the
    marker: other processes notice that end.

    Args:
        save: the save that lacks this rank's part.
        keeper: knows, or finds, where the attempt is; None for a checkpoint that lies alone.
        destinations: where to write the marker.
        error: why the part is missing.
        patience: seconds to wait for the attempt's place.
    """
    reason = f"{type(error).__name__}: {error}"

    def report() -> None:
        path = save.info.path
        try:
            if keeper is not None:
                path = f"{keeper.wait(patience)}/{path.partition('/')[2]}"
        except ShardckptError as failure:
            _log.debug("no marker for the missing part of %s: %s", save.info.path, failure)
            return
        for destination in destinations:
            report_lost(destination.place.root.at(path), [save.rank], save.info.id, reason)

    if save.is_shared and destinations:
        threading.Thread(target=report, name="shardckpt-report", daemon=True).start()
