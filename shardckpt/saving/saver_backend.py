"""Persist through the node's saver, which outlives the trainer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from shardckpt import errors
from shardckpt.errors import (
    SaveError,
    SaverError,
    SaverSilentError,
    StorageError,
)
from shardckpt.format.save_plan import SavePlan, encode_plan
from shardckpt.run.attempt_keeper import AttemptKeeper, Condition
from shardckpt.run.commit_wait import was_committed
from shardckpt.run.places import Place
from shardckpt.run.tiers import Destination, Tier
from shardckpt.saver.client import SaverClient
from shardckpt.saver.granted_buffers import Memory
from shardckpt.saver.protocol import Begin, ChunkTable, Claimed, Outcome, Stage, Start
from shardckpt.saver.startup import START_TIMEOUT
from shardckpt.saving.backend import JobAttempt, Save, report_missing_part
from shardckpt.saving.handle import SaveHandle
from shardckpt.saving.staging import StagingBuffer

__all__ = ["SaverBackend"]


_SHORT = 2.0  # seconds for a saver to answer that has been silent before


@dataclass
class SaverBackend:
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
                    patience=_SHORT if self._was_silent else START_TIMEOUT,
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
        chunks = plan.locations(rank)
        message = ChunkTable(
            self._plans,
            [chunk.row for chunk in chunks],
            [chunk.offset for chunk in chunks],
            [chunk.nbytes for chunk in chunks],
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
        waited_for = [destination.tier.name for destination in save.destinations if save.is_shared]
        client.begin(Begin(memory.number, save.info, save.rank, waited_for))
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
            save.info,
            save.rank,
            save.local_ranks,
            [destination.tier.name for destination in save.destinations],
            msgspec.json.encode(save.values),
            proposal,
        )

        def done(outcome: Outcome) -> None:
            kind = type(client.loss) if client.is_lost else SaveError
            error = kind(outcome.error) if outcome.error else None
            goals = [goal for goal in save.destinations if goal.tier.name == outcome.tier]
            if outcome.path:
                goals = [replace(goal, place=Place(goal.place.root, outcome.path)) for goal in goals]
                handle.moved(outcome.tier, goals[0].place)
            # A saver that has died may have committed it, and not told. One that lives knows, and its next
            # messages are not to wait for a storage.
            if (
                client.is_lost
                and error is not None
                and any(was_committed(g.place, save.info.id) for g in goals)
            ):
                error = None
            handle.note(outcome.tier, error, committed=True)
            if isinstance(error, SaverError):  # which cannot tell it itself any more
                self.report_missing_part(save, goals, error)

        client.stage(stage, done)
        if not client.is_lost:
            handle.submitted()

    def abandon(self, save: Save, error: BaseException, /) -> None:
        """See Sink."""
        if self._client is not None:
            self._client.abandon(save.info.id, error)
        self.report_missing_part(save, save.destinations, error)

    def report_missing_part(
        self, save: Save, destinations: Sequence[Destination], error: BaseException
    ) -> None:
        job = self._job
        keeper = None
        if job is not None:
            keeper = AttemptKeeper(job.attempt, lambda: job.root)
            keeper.learn(self._name)
        report_missing_part(save, keeper, destinations, error, self.commit_timeout)

    def close(self) -> None:
        """See Sink."""
        if self._client is not None:
            self._client.close()
            self._client = None


def _error_of(claimed: Claimed) -> Exception:
    """What a saver has said is wrong with a claim."""
    kind = getattr(errors, claimed.kind, StorageError)
    return kind(claimed.error)
