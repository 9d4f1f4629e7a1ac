"""Where a staged pack goes: to the node's saver, which outlives this process, or to a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec

from shardckpt import errors
from shardckpt.attempts import Attempt
from shardckpt.commit import Proposal, was_committed
from shardckpt.errors import (
    OutOfReachError,
    SaveError,
    SaverError,
    SaverSilentError,
    ShardckptError,
    StorageError,
    SupersededError,
)
from shardckpt.handle import MEMORY, SaveHandle
from shardckpt.keeper import AttemptKeeper, Condition
from shardckpt.persisting import Destination, StagedPack, persist_save
from shardckpt.plan import SavePlan, encode_plan
from shardckpt.progress import committed
from shardckpt.runs import Place, attempt_number
from shardckpt.saver.client import Memory, SaverClient
from shardckpt.saver.wire import Begin, Claimed, Outcome, Plan, Stage, Start, Tier
from shardckpt.staging import StagingBuffer
from shardckpt.storage import Storage
from shardckpt.writer import Placed, report_lost

__all__ = ["JobAttempt", "OwnThread", "Save", "SaverSink", "Sink"]

_log = logging.getLogger("shardckpt")

_SHORT = 2.0  # seconds for a saver to answer that has been silent before
_END_TIMEOUT = 5.0  # seconds for a run's storage to take note that its job has ended


@dataclass(frozen=True)
class Save:
    """A save that this rank stages its part of.

    Attributes:
        id: unique among all saves.
        path: the checkpoint's path below its run.
        step: optimizer steps done.
        rank, world_size: this rank's part in it.
        local_ranks: number of ranks that have the same sink.
        destinations: the durable tiers that it goes to.
        values: this rank's PerRank values by path.
        proposal: of rank 0, what the manifest says; else None.
    """

    id: str
    path: str
    step: int
    rank: int
    world_size: int
    local_ranks: int
    destinations: Sequence[Destination]
    values: dict[str, Any]
    proposal: Proposal | None

    @property
    def is_of_run(self) -> bool:
        """Whether it lies in an attempt of a run, rather than alone."""
        return bool(self.path)

    @property
    def is_shared(self) -> bool:
        """Whether other processes than this rank's sink wait in the storage for its part."""
        return self.world_size > self.local_ranks


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


class Sink(Protocol):
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


class OwnThread:
    """Persists in a thread of this process. One buffer: a save waits for the one before it."""

    outlives_trainer = False

    def __init__(self, commit_timeout: float) -> None:
        self.id = f"{os.getpid()}-{id(self)}"
        self.is_lost = False
        self._timeout = commit_timeout
        self._thread: threading.Thread | None = None
        self._buffer: StagingBuffer | None = None
        self._writes: list[Placed] = []
        self._keeper: AttemptKeeper | None = None
        self.last_staged: StagingBuffer | None = None

    @property
    def is_ready(self) -> bool:
        """See Sink."""
        return self._thread is None or not self._thread.is_alive()

    def adopt(self, job: JobAttempt) -> None:
        """See Sink."""
        before, self._keeper = self._keeper, AttemptKeeper(job.attempt, lambda: job.root, tell=job.tell)
        if before is not None:
            before.retire()
        weakref.finalize(self, self._keeper.retire)  # whoever forgets to close it
        if job.claims:
            self._keeper.claim()

    def learn(self, name: str) -> None:
        """See Sink."""
        if self._keeper is not None:
            self._keeper.learn(name)

    def wait_claimed(self, patience: float, *, is_urgent: bool) -> str:
        """See Sink."""
        keeper = self._keeper
        assert keeper is not None
        try:
            return keeper.wait(patience, lambda: is_urgent and keeper.condition.error is not None)
        except (OutOfReachError, SupersededError):
            return ""

    def prepare(self, plan: SavePlan, rank: int) -> None:
        """See Sink."""
        self._join()
        self._buffer = self.last_staged = None  # free the old one first
        writes = plan.writes(rank)
        self._writes = [Placed(write.row, write.offset, write.nbytes) for write in writes]
        self._buffer = StagingBuffer(writes, plan.pack_sizes[rank])
        threading.Thread(target=self._buffer.touch, name="shardckpt-touch", daemon=True).start()

    def begin(self, _save: Save, /) -> StagingBuffer:
        """See Sink."""
        self._join()
        assert self._buffer is not None
        self.last_staged = self._buffer
        return self._buffer

    def submit(self, save: Save, handle: SaveHandle) -> None:
        """See Sink. The interpreter's exit waits for the thread."""
        assert self._buffer is not None
        pack = StagedPack(save.rank, self._buffer.content, self._writes, save.values)
        keeper = self._keeper if save.is_of_run else None
        handle.note(MEMORY)

        def persist(destination: Destination) -> None:
            proposal = save.proposal
            if keeper is not None:
                name = keeper.wait(self._timeout)
                place = Place(destination.place.root, f"{name}/{save.path.partition('/')[2]}")
                handle.moved(destination.tier, place)
                destination = replace(destination, place=place)
                if proposal is not None:
                    proposal = replace(proposal, attempt=attempt_number(name))
            persist_save(destination, save.id, [pack], proposal, self._timeout)

        def work() -> None:
            for destination in save.destinations:
                try:
                    persist(destination)
                except BaseException as error:
                    handle.note(destination.tier, error)
                else:
                    if save.proposal is not None:
                        committed(destination.tier, save.step)
                    handle.note(destination.tier, committed=save.proposal is not None)

        self._thread = threading.Thread(target=work, name="shardckpt-save")
        self._thread.start()

    def abandon(self, save: Save, error: BaseException, /) -> None:
        """See Sink."""
        _leave_word(save, self._keeper, save.destinations, error, self._timeout)

    def probe(self, _seconds: float, /) -> None:
        """See Sink."""

    def limit_silence(self, _seconds: float, /) -> None:
        """See Sink."""

    def close(self) -> None:
        """See Sink."""
        if self._keeper is not None:
            self._keeper.end(_END_TIMEOUT, stop=True)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()


@dataclass
class SaverSink:
    """Hands over to the node's saver.

    Attributes:
        run: the run's URL.
        tiers: its durable tiers.
        snapshots: how many snapshots may be held in memory.
        commit_timeout: seconds without any progress of another rank after which a save has failed.
        linger: seconds that a saver without launcher waits for a restarted job.
        outage_timeout: seconds that a save waits for a storage that is out of reach, and no longer than
            `commit_timeout`.
    """

    run: str
    tiers: Sequence[Tier]
    snapshots: int
    commit_timeout: float
    linger: float
    outage_timeout: float = math.inf
    outlives_trainer = True
    _client: SaverClient | None = None
    _staging: dict[int, StagingBuffer] = field(default_factory=dict)
    _plan: SavePlan | None = None
    _rank: int = 0
    _plans: int = 0
    _taken: Memory | None = None
    _was_silent: bool = False
    _job: JobAttempt | None = None
    _name: str = ""  # of the attempt's folder, once it is known
    last_staged: StagingBuffer | None = None

    @property
    def id(self) -> str:
        """See Sink."""
        return self._client.id if self._client is not None else ""

    @property
    def is_ready(self) -> bool:
        """See Sink. True also while the first buffers are made: waiting for these is better than no save."""
        client = self._client
        return client is None or client.is_lost or not client.is_full

    @property
    def is_lost(self) -> bool:
        """See Sink."""
        return self._plan is not None and (self._client is None or self._client.is_lost)

    @property
    def newest(self) -> int:
        """The number of the run's newest attempt that the saver knows of; 0 if it knows of none, or there is
        none."""
        try:
            return self.connect().newest
        except SaverError:
            return 0

    def connect(self) -> SaverClient:
        """The saver, to which this connects if need be. Raises SaverError.

        One that has been waited for in vain is not waited for again for long.
        """
        if self._client is not None and self._client.is_lost:
            self._was_silent = self._was_silent or isinstance(self._client.loss, SaverSilentError)
        if self._client is None or self._client.is_lost:
            try:
                self._client = SaverClient(
                    self.run,
                    self.tiers,
                    self.snapshots,
                    self.commit_timeout,
                    linger=self.linger,
                    outage_timeout=self.outage_timeout,
                    patience=_SHORT if self._was_silent else None,
                )
            except SaverSilentError:
                self._was_silent = True
                raise
            self._was_silent = False
            self._introduce(self._client)
        return self._client

    def probe(self, seconds: float, /) -> None:
        """See Sink."""
        if self._client is not None:
            self._client.probe(seconds)

    def limit_silence(self, seconds: float, /) -> None:
        """See Sink."""
        if self._client is not None:
            self._client.limit_silence(seconds)

    def adopt(self, job: JobAttempt) -> None:
        """See Sink."""
        self._job, self._name = job, ""
        known = self._client
        client = self.connect()
        if client is known:
            self._introduce(client)

    def learn(self, name: str) -> None:
        """See Sink."""
        self._name = name
        if self._client is not None and not self._client.is_lost:
            with contextlib.suppress(SaverError):  # the next one is told when it comes
                self._introduce(self._client)

    def wait_claimed(self, patience: float, *, is_urgent: bool) -> str:
        """See Sink."""
        assert self._job is not None
        told = self.connect().wait_claimed(self._job.attempt.id, patience, is_urgent=is_urgent)
        if told is None or (told.is_passing and not told.name):
            return ""
        if not told.name:
            raise _error_of(told)
        return told.name

    def _introduce(self, client: SaverClient) -> None:
        """Say which attempt the next saves are of."""
        job = self._job
        if job is None:
            return

        def note(claimed: Claimed) -> None:
            if claimed.id == job.attempt.id:
                self._name = claimed.name or self._name
                error = _error_of(claimed) if claimed.error else None
                job.tell(Condition(claimed.name, error, claimed.notice))

        client.start(Start(job.attempt, job.claims, self._name), note)

    def prepare(self, plan: SavePlan, rank: int) -> None:
        """See Sink."""
        self._staging.clear()
        self.last_staged = None
        self._plan, self._rank = plan, rank
        self._plans += 1
        writes = plan.writes(rank)
        message = Plan(
            self._plans,
            [write.row for write in writes],
            [write.offset for write in writes],
            [write.nbytes for write in writes],
            plan.pack_sizes[rank],
            encode_plan(plan) if rank == 0 else b"",
        )
        known = self._client
        client = self.connect()
        try:
            client.plan(message, self.snapshots)
        except SaverError:
            if client is not known:
                raise
            self.connect().plan(message, self.snapshots)  # it has died since the last save

    def begin(self, save: Save, /) -> StagingBuffer:
        """See Sink."""
        client, plan, rank = self._client, self._plan, self._rank
        assert client is not None
        assert plan is not None
        memory = client.take()
        if memory.number not in self._staging:
            self._staging[memory.number] = StagingBuffer(
                plan.writes(rank), plan.pack_sizes[rank], memory.content
            )
        waited_for = [destination.tier for destination in save.destinations if save.is_shared]
        client.begin(Begin(memory.number, save.id, save.path, save.rank, waited_for))
        self._taken = memory
        self.last_staged = self._staging[memory.number]
        return self.last_staged

    def submit(self, save: Save, handle: SaveHandle) -> None:
        """See Sink."""
        assert self._taken is not None
        client = self._client
        assert client is not None
        proposal = save.proposal.encode() if save.proposal is not None else b""
        stage = Stage(
            self._taken.number,
            save.id,
            save.path,
            save.step,
            save.rank,
            save.world_size,
            save.local_ranks,
            [destination.tier for destination in save.destinations],
            msgspec.json.encode(save.values),
            proposal,
        )

        def done(outcome: Outcome) -> None:
            kind = type(client.loss) if client.is_lost else SaveError
            error = kind(outcome.error) if outcome.error else None
            goals = [goal for goal in save.destinations if goal.tier == outcome.tier]
            if outcome.path:
                goals = [replace(goal, place=Place(goal.place.root, outcome.path)) for goal in goals]
                handle.moved(outcome.tier, goals[0].place)
            # A saver that has died may have committed it, and not told. One that lives knows, and its next
            # messages are not to wait for a storage.
            if client.is_lost and error is not None and any(was_committed(g.place, save.id) for g in goals):
                error = None
            handle.note(outcome.tier, error, committed=True)
            if isinstance(error, SaverError):  # which cannot tell it itself any more
                self._leave_word(save, goals, error)

        client.stage(stage, done)
        if not client.is_lost:
            handle.submitted()

    def abandon(self, save: Save, error: BaseException, /) -> None:
        """See Sink."""
        if self._client is not None:
            self._client.abandon(save.id, error)
        self._leave_word(save, save.destinations, error)

    def _leave_word(self, save: Save, destinations: Sequence[Destination], error: BaseException) -> None:
        job = self._job
        keeper = None
        if job is not None:
            keeper = AttemptKeeper(job.attempt, lambda: job.root)
            keeper.learn(self._name)
        _leave_word(save, keeper, destinations, error, self.commit_timeout)

    def close(self) -> None:
        """See Sink."""
        if self._client is not None:
            self._client.close()
            self._client = None


def _error_of(claimed: Claimed) -> Exception:
    """What a saver has said is wrong with a claim."""
    kind = getattr(errors, claimed.kind, StorageError)
    return kind(claimed.error)


def _leave_word(
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
        path = save.path
        try:
            if keeper is not None:
                path = f"{keeper.wait(patience)}/{path.partition('/')[2]}"
        except ShardckptError as failure:
            _log.debug("nobody is told that a part of %s will not come: %s", save.path, failure)
            return
        for destination in destinations:
            report_lost(destination.place.root.at(path), [save.rank], save.id, reason)

    if save.is_shared and destinations:
        threading.Thread(target=report, name="shardckpt-report", daemon=True).start()
