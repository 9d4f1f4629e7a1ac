"""Persist through the node's saver, which outlives the trainer."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from shardckpt import environment, errors
from shardckpt.errors import SaveError, SaverError, SaverSilentError, StorageError
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

__all__ = ["SaverBackend", "connect_saver", "make_saver_backend"]

_log = logging.getLogger("shardckpt")

_SHORT = 2.0  # seconds for a saver to answer that has been silent before


def make_saver_backend(
    run: str, tiers: Sequence[Tier], snapshots: int, commit_timeout: float
) -> SaverBackend | None:
    """Return a backend that hands saves to the node's saver; None if no other process can open the storage.

    Args:
        run: the run's URL.
        tiers: its durable tiers.
        snapshots: how many snapshots the node may hold in memory.
        commit_timeout: seconds without progress of another rank after which a save has failed.
    """
    if run.startswith("memory://"):
        return None
    try:
        msgspec.msgpack.encode(tiers)
    except TypeError as error:
        _log.warning(
            "snapshots=0: storage_options cannot be told to the saver, so saves are written by the "
            "trainers, and end with them: %s",
            error,
        )
        return None
    return SaverBackend(
        run, tiers, snapshots, commit_timeout, environment.saver_linger(), environment.drain_timeout()
    )


def connect_saver(backend: SaverBackend | None) -> SaverClient | None:
    """Return the connection to the node's saver; None if it cannot be reached, which is logged."""
    if backend is None:
        return None
    try:
        return backend.connect()
    except SaverError as error:
        _log.warning("no snapshots in memory: %s", error)
        return None


@dataclass
class SaverBackend:
    """A SaveBackend that hands over to the node's saver.

    Attributes:
        run: the run's URL.
        tiers: its durable tiers.
        snapshots: how many snapshots the node may hold in memory.
        commit_timeout: seconds without progress of another rank after which a save has failed.
        linger: seconds that a saver without launcher waits for a restarted job.
        outage_timeout: seconds that a save waits for a storage that is out of reach, and no longer than
            `commit_timeout`.
        last_staged: see SaveBackend.
    """

    run: str
    tiers: Sequence[Tier]
    snapshots: int
    commit_timeout: float
    linger: float
    outage_timeout: float = math.inf
    outlives_trainer = True
    last_staged: StagingBuffer | None = None
    _client: SaverClient | None = None
    _staging: dict[int, StagingBuffer] = field(default_factory=dict)
    _plan: SavePlan | None = None
    _rank: int = 0
    _plans: int = 0  # made so far
    _taken: Memory | None = None
    _was_silent: bool = False
    _job: JobAttempt | None = None
    _name: str = ""  # of the attempt's folder, once it is known

    @property
    def id(self) -> str:
        """See SaveBackend."""
        return self._client.id if self._client is not None else ""

    @property
    def is_ready(self) -> bool:
        """See SaveBackend. True also while the first buffers are made: waiting is better than no save."""
        client = self._client
        return client is None or client.is_lost or not client.is_full

    @property
    def is_lost(self) -> bool:
        """See SaveBackend."""
        return self._plan is not None and (self._client is None or self._client.is_lost)

    @property
    def newest(self) -> int:
        """The number of the run's newest attempt that the saver knows of; 0 if there is none."""
        try:
            return self.connect().newest
        except SaverError:
            return 0

    def connect(self) -> SaverClient:
        """Return the connection to the saver, and make it if need be. Raises SaverError.

        A saver that has been waited for in vain gets a short time to answer.
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
        """See SaveBackend."""
        if self._client is not None:
            self._client.probe(seconds)

    def limit_silence(self, seconds: float, /) -> None:
        """See SaveBackend."""
        if self._client is not None:
            self._client.limit_silence(seconds)

    def adopt(self, job: JobAttempt) -> None:
        """See SaveBackend."""
        self._job, self._name = job, ""
        known = self._client
        client = self.connect()
        if client is known:
            self._introduce(client)

    def learn(self, name: str) -> None:
        """See SaveBackend."""
        self._name = name
        if self._client is not None and not self._client.is_lost:
            with contextlib.suppress(SaverError):  # the next saver is told when it comes
                self._introduce(self._client)

    def wait_claimed(self, patience: float, *, is_urgent: bool) -> str:
        """See SaveBackend."""
        assert self._job is not None
        claimed = self.connect().wait_claimed(self._job.attempt.id, patience, is_urgent=is_urgent)
        if claimed is None or (claimed.is_passing and not claimed.name):
            return ""
        if not claimed.name:
            raise _error_of(claimed)
        return claimed.name

    def _introduce(self, client: SaverClient) -> None:
        """Tell the saver to which attempt the next saves belong."""
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
        """See SaveBackend."""
        self._staging.clear()
        self.last_staged = None
        self._plan, self._rank = plan, rank
        self._plans += 1
        chunks = plan.locations(rank)
        table = ChunkTable(
            self._plans,
            [chunk.row for chunk in chunks],
            [chunk.offset for chunk in chunks],
            [chunk.nbytes for chunk in chunks],
            plan.pack_size(rank),
            encode_plan(plan) if rank == 0 else b"",
        )
        known = self._client
        client = self.connect()
        try:
            client.plan(table, self.snapshots)
        except SaverError:
            if client is not known:
                raise
            self.connect().plan(table, self.snapshots)  # it has died since the last save

    def expect(self, nbytes: int, /) -> None:
        """See SaveBackend."""
        if self._plan is not None:
            return
        self._plans += 1
        with contextlib.suppress(SaverError):  # logged when something is saved
            self.connect().plan(ChunkTable(self._plans, [], [], [], nbytes, b""), self.snapshots)

    def begin(self, save: Save, /) -> StagingBuffer:
        """See SaveBackend."""
        client, plan, rank = self._client, self._plan, self._rank
        assert client is not None
        assert plan is not None
        memory = client.take()
        if memory.number not in self._staging:
            self._staging[memory.number] = StagingBuffer(
                plan.writes(rank), plan.pack_size(rank), memory.content
            )
        waited_for = [destination.tier.name for destination in save.destinations if save.is_shared]
        client.begin(Begin(memory.number, save.info, save.rank, waited_for))
        self._taken = memory
        self.last_staged = self._staging[memory.number]
        return self.last_staged

    def submit(self, save: Save, handle: SaveHandle) -> None:
        """See SaveBackend."""
        assert self._taken is not None
        client = self._client
        assert client is not None
        stage = Stage(
            self._taken.number,
            save.info,
            save.rank,
            save.local_ranks,
            [destination.tier.name for destination in save.destinations],
            msgspec.json.encode(save.values),
            save.proposal.encode() if save.proposal is not None else b"",
        )
        self._taken = None
        client.stage(stage, lambda outcome: self._note(client, save, handle, outcome))
        if not client.is_lost:
            handle.submitted()

    def _note(self, client: SaverClient, save: Save, handle: SaveHandle, outcome: Outcome) -> None:
        """Take in what became of a save in a tier. Called by the client's thread."""
        kind = type(client.loss) if client.is_lost else SaveError
        error = kind(outcome.error) if outcome.error else None
        goals = [goal for goal in save.destinations if goal.tier.name == outcome.tier]
        if outcome.path:
            goals = [replace(goal, place=Place(goal.place.root, outcome.path)) for goal in goals]
            handle.moved(outcome.tier, goals[0].place)
        # A saver that has died may have committed the save without a word. One that lives knows, and its next
        # messages must not wait for a storage.
        if error is not None and client.is_lost and _is_committed(goals, save.info.id):
            error = None
        handle.note(outcome.tier, error, committed=True)
        if isinstance(error, SaverError):  # so the saver cannot report it
            self._report_missing_part(save, goals, error)

    def abandon(self, save: Save, error: BaseException, /) -> None:
        """See SaveBackend."""
        if self._client is not None:
            self._client.abandon(save.info.id, error)
            if self._taken is not None:
                self._client.put_back(self._taken)
                self._taken = None
        self._report_missing_part(save, save.destinations, error)

    def _report_missing_part(
        self, save: Save, destinations: Sequence[Destination], error: BaseException
    ) -> None:
        keeper = None
        if self._job is not None:
            root = self._job.root
            keeper = AttemptKeeper(self._job.attempt, lambda: root)
            keeper.learn(self._name)
        report_missing_part(save, keeper, destinations, error, self.commit_timeout)

    def close(self) -> None:
        """See SaveBackend."""
        if self._client is not None:
            self._client.close()
            self._client = None


def _is_committed(goals: Sequence[Destination], save_id: str) -> bool:
    """Return True if the save is a checkpoint at one of these destinations, as far as their storages answer."""
    return any(was_committed(goal.place, save_id) for goal in goals)


def _error_of(claimed: Claimed) -> Exception:
    """Rebuild the error for which a saver cannot claim an attempt."""
    kind = getattr(errors, claimed.kind, StorageError)
    return kind(claimed.error)
