"""Where a staged pack goes: to the node's saver, which outlives this process, or to a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shardckpt.errors import (
    ShardckptError,
)
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

__all__ = ["END_TIMEOUT", "JobAttempt", "Save", "SaveBackend", "report_missing_part"]

_log = logging.getLogger("shardckpt")

END_TIMEOUT = 5.0  # seconds for a run's storage to take note that its job has ended


@dataclass(frozen=True)
class Save:
    """A save that this rank stages its part of.

    Attributes:
        info: which save it is.
        rank: this rank's number.
        local_ranks: number of ranks that have the same sink.
        destinations: the durable tiers that it goes to.
        values: this rank's PerRank values by path.
        proposal: of rank 0, what the manifest says; else None.
    """

    info: SaveInfo
    rank: int
    local_ranks: int
    destinations: Sequence[Destination]
    values: dict[str, Any]
    proposal: Proposal | None

    @property
    def is_of_run(self) -> bool:
        """Whether it lies in an attempt of a run, rather than alone."""
        return bool(self.info.path)

    @property
    def is_shared(self) -> bool:
        """Whether other processes than this rank's sink wait in the storage for its part."""
        return self.info.world_size > self.local_ranks


@dataclass(frozen=True)
class JobAttempt:
    """The attempt that a job saves as.

    Attributes:
        attempt: as all of its ranks know it.
        root: the run.
        claims: whether this rank's sink claims it.
        tell: called by another thread with what becomes of the claim.
    """

    attempt: Attempt
    root: Storage
    claims: bool
    tell: Callable[[Condition], object]


class SaveBackend(Protocol):
    """Gives out buffers to stage into, and sees to what is staged."""

    @property
    def id(self) -> str:
        """Equal for two ranks only if the same process sees to what they stage."""

    @property
    def outlives_trainer(self) -> bool:
        """Whether what is submitted is seen to even if this process ends at once, and kept for the next one."""

    @property
    def is_ready(self) -> bool:
        """Whether `begin` need not wait for an earlier save."""

    @property
    def is_lost(self) -> bool:
        """Whether it must be prepared again before it can be used."""

    @property
    def last_staged(self) -> StagingBuffer | None:
        """The buffer that `begin` gave last, if it was by the present plan."""

    def adopt(self, job: JobAttempt) -> None:
        """Saves are of this attempt from now on: has it claimed in the background, if this rank's sink is to
        do that.

        Raises SaverError.
        """

    def learn(self, name: str) -> None:
        """The attempt is claimed, and this is its folder's name."""

    def wait_claimed(self, patience: float, *, is_urgent: bool) -> str:
        """The name of the attempt's folder; empty if that is not known after `patience` seconds.

        `is_urgent`: also as soon as the storage has been found to be out of reach. Raises why it cannot be
        claimed; SaverError.
        """

    def prepare(self, plan: SavePlan, rank: int) -> None:
        """Get buffers for the rank's packs by this plan, in the background if that takes long.

        Raises SaverError if it cannot, MemoryError or OSError if there is no memory.
        """

    def begin(self, save: Save, /) -> StagingBuffer:
        """A buffer to stage the rank's part of a save in. Waits until there is one.

        Raises SaverError or MemoryError; then nothing is to be submitted.
        """

    def submit(self, save: Save, handle: SaveHandle) -> None:
        """See to what was staged in the buffer that `begin` gave last. Tells the handle what becomes of it."""

    def abandon(self, save: Save, error: BaseException, /) -> None:
        """Nothing will be staged for this save after all: has those told that wait for it."""

    def probe(self, seconds: float, /) -> None:
        """See whether it is still at work, for so many seconds at most; if not, it is lost from now on."""

    def limit_silence(self, seconds: float, /) -> None:
        """From now on it is lost if it has not answered for so many seconds, or less."""

    def close(self) -> None:
        """No more saves will come, from no process of this job. What was submitted is seen to."""


def report_missing_part(
    save: Save,
    keeper: AttemptKeeper | None,
    destinations: Sequence[Destination],
    error: BaseException,
    patience: float,
) -> None:
    """Have it reported in the storage that this rank's part will not come, if anyone waits for it there.

    In the background, since the storage may be slow, and it may not be known yet where the attempt is; not
    waited for at the process's end, which others notice.
    """
    reason = f"{type(error).__name__}: {error}"

    def report() -> None:
        path = save.info.path
        try:
            if keeper is not None:
                path = f"{keeper.wait(patience)}/{path.partition('/')[2]}"
        except ShardckptError as failure:
            _log.debug("nobody is told that a part of %s will not come: %s", save.info.path, failure)
            return
        for destination in destinations:
            report_lost(destination.place.root.at(path), [save.rank], save.info.id, reason)

    if save.is_shared and destinations:
        threading.Thread(target=report, name="shardckpt-report", daemon=True).start()
