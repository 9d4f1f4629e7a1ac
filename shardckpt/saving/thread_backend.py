"""Persist in a thread of the trainer, where there is no saver."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import replace

from shardckpt.errors import (
    OutOfReachError,
    SupersededError,
)
from shardckpt.format.chunks import ChunkLocation
from shardckpt.format.save_plan import SavePlan
from shardckpt.progress import committed
from shardckpt.run.attempt_keeper import AttemptKeeper
from shardckpt.run.persist import StagedPack, persist_save
from shardckpt.run.places import Place
from shardckpt.run.tiers import MEMORY, Destination
from shardckpt.saving.backend import JobAttempt, Save, report_missing_part
from shardckpt.saving.handle import SaveHandle
from shardckpt.saving.staging import StagingBuffer

__all__ = ["ThreadBackend"]

_END_TIMEOUT = 5.0  # seconds for the end of the job to be written to the attempt's lease


class ThreadBackend:
    """A SaveBackend that persists in a thread of this process.

    It has one buffer, so a save waits for the one before it. The interpreter's exit waits for the thread.

    Args:
        commit_timeout: seconds without progress of another rank after which a save has failed.
    """

    outlives_trainer = False

    def __init__(self, commit_timeout: float) -> None:
        self.id = f"{os.getpid()}-{id(self)}"
        self.is_lost = False
        self._timeout = commit_timeout
        self._thread: threading.Thread | None = None
        self._buffer: StagingBuffer | None = None
        self._writes: list[ChunkLocation] = []
        self._keeper: AttemptKeeper | None = None
        self.last_staged: StagingBuffer | None = None

    @property
    def is_ready(self) -> bool:
        """See SaveBackend."""
        return self._thread is None or not self._thread.is_alive()

    def adopt(self, job: JobAttempt) -> None:
        """See SaveBackend."""
        before, self._keeper = self._keeper, AttemptKeeper(job.attempt, lambda: job.root, tell=job.tell)
        if before is not None:
            before.retire()
        weakref.finalize(self, self._keeper.retire)  # in case nothing calls `close`
        if job.claims:
            self._keeper.claim()

    def learn(self, name: str) -> None:
        """See SaveBackend."""
        if self._keeper is not None:
            self._keeper.learn(name)

    def wait_claimed(self, patience: float, *, is_urgent: bool) -> str:
        """See SaveBackend."""
        keeper = self._keeper
        assert keeper is not None
        try:
            return keeper.wait(patience, lambda: is_urgent and keeper.condition.error is not None)
        except (OutOfReachError, SupersededError):
            return ""

    def prepare(self, plan: SavePlan, rank: int) -> None:
        """See SaveBackend."""
        self._join()
        self._buffer = self.last_staged = None  # free the old one first
        writes = plan.writes(rank)
        self._writes = plan.locations(rank)
        self._buffer = StagingBuffer(writes, plan.pack_size(rank))
        threading.Thread(target=self._buffer.touch, name="shardckpt-touch", daemon=True).start()

    def expect(self, _nbytes: int, /) -> None:
        """See SaveBackend. The only buffer comes with the plan."""

    def begin(self, _save: Save, /) -> StagingBuffer:
        """See SaveBackend."""
        self._join()
        assert self._buffer is not None
        self.last_staged = self._buffer
        return self._buffer

    def submit(self, save: Save, handle: SaveHandle) -> None:
        """See SaveBackend."""
        assert self._buffer is not None
        pack = StagedPack(save.rank, self._buffer.content, self._writes, save.values)
        keeper = self._keeper if save.is_of_run else None
        handle.note(MEMORY)

        def persist(destination: Destination) -> None:
            proposal = save.proposal
            if keeper is not None:
                name = keeper.wait(self._timeout)
                place = Place(destination.place.root, f"{name}/{save.info.path.partition('/')[2]}")
                handle.moved(destination.tier.name, place)
                destination = replace(destination, place=place)
                if proposal is not None:
                    proposal = proposal.at(place.path)
            persist_save(destination, save.info.id, [pack], proposal, self._timeout)

        def work() -> None:
            for destination in save.destinations:
                try:
                    persist(destination)
                except BaseException as error:
                    handle.note(destination.tier.name, error)
                else:
                    if save.proposal is not None:
                        committed(destination.tier.name, save.info.step)
                    handle.note(destination.tier.name, committed=save.proposal is not None)

        self._thread = threading.Thread(target=work, name="shardckpt-save")
        self._thread.start()

    def abandon(self, save: Save, error: BaseException, /) -> None:
        """See SaveBackend."""
        report_missing_part(save, self._keeper, save.destinations, error, self._timeout)

    def probe(self, _seconds: float, /) -> None:
        """See SaveBackend."""

    def limit_silence(self, _seconds: float, /) -> None:
        """See SaveBackend."""

    def close(self) -> None:
        """See SaveBackend."""
        if self._keeper is not None:
            self._keeper.end(_END_TIMEOUT, stop=True)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
