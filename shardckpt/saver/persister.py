"""Snapshots become durable: each one is persisted in its tiers, in the background, and again after an outage."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from shardckpt.errors import OutOfReachError, SupersededError
from shardckpt.run.commit_wait import Patience, wait_committed, was_committed
from shardckpt.run.failure_reports import report_lost
from shardckpt.run.persist import StagedPack, persist_save
from shardckpt.run.places import Place
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.run.tiers import Destination, Tier
from shardckpt.saver.attempts import KeptAttempts
from shardckpt.saver.connections import Client, Connections, client_of
from shardckpt.saver.loop import EventLoop
from shardckpt.saver.outage import until_it_answers
from shardckpt.saver.report import Report
from shardckpt.saver.snapshots import HeldSnapshot, Part, SnapshotStore
from shardckpt.saver.tasks import Progress, TierQueues
from shardckpt.storage import Storage

__all__ = ["Opener", "PersistTask", "Persister"]

_log = logging.getLogger("shardckpt.saver")

_STALLED = (
    10.0  # seconds in which a storage has taken nothing, after which what waits for it may be replaced
)
_LOOK_EVERY = 1.0  # seconds between two looks for such a storage

Opener = Callable[[str, dict[str, Any] | None], Storage]
"""Opens a tier's URL."""


@dataclass(frozen=True)
class _End:
    """What became of the newest save of a run in a tier."""

    order: tuple[int, int, str, int]
    is_durable: bool


class Persister:
    """Persists the snapshots of a store.

    Args:
        store: the snapshots.
        attempts: where each attempt lies in its run.
        loop: runs what threads hand over.
        connections: the trainers.
        report: told what becomes of saves.
        opener: how to open a tier's URL.
    """

    def __init__(
        self,
        store: SnapshotStore,
        attempts: KeptAttempts,
        loop: EventLoop,
        connections: Connections,
        report: Report,
        opener: Opener,
    ) -> None:
        self.store = store
        self._attempts = attempts
        self._report = report
        self._loop = loop
        self._connections = connections
        self._opener = opener
        self._queues = TierQueues()
        self._roots: dict[bytes, Storage] = {}
        self._opening = threading.Lock()
        self._ends: dict[tuple[str, str], _End] = {}  # by run and tier
        self._outages: set[tuple[str, str]] = set()  # that users were told of, by run and tier
        self._is_flushing = False

    @property
    def is_durable(self) -> bool:
        """True if each run's newest save that was to go to a tier is durable there."""
        return all(end.is_durable for end in self._ends.values())

    def tell_progress(self) -> None:
        """Tell the launcher from time to time how far the work is."""
        self._report.progress(self._queues.under_way())

    # -- what to persist

    def persist(self, held: HeldSnapshot, tiers: Sequence[str]) -> None:
        """Have a whole snapshot persisted in these tiers."""
        client = client_of(held)
        held.is_replaced = held.is_at_risk and held.is_replaced
        packs = [_staged_pack(part) for part in held.parts.values()]
        for name in tiers:
            held.tasks += 1
            task = PersistTask(self, held, client.tiers[name], packs)
            task.finish = self._loop.promise(partial(self._conclude, task))
            self._queues.submit(task)

    def persist_newest(self, run: str, *, again: bool) -> None:
        """Have a run's newest snapshot persisted in all tiers, if it is in memory only.

        `again`: also where that has failed before, and where an older save has failed that it can stand in for.
        """
        newest = self.store.newest(run)
        if newest is None or newest.tasks or (newest.failed and not again):
            return
        tiers = list(client_of(newest).tiers)
        if newest.is_persisted:
            tiers = self.lacking(newest) if again else []
        self.persist(newest, tiers)

    def flush(self) -> None:
        """Have each run's newest snapshot persisted where it is not durable: no trainer will come any more."""
        self._is_flushing = True
        for run in {held.run for held in self.store.snapshots.values()}:
            self.persist_newest(run, again=True)

    def lacking(self, newest: HeldSnapshot) -> list[str]:
        """Tiers in which the run's last save has failed, and the newest snapshot is not durable either."""
        failed = {
            tier for (run, tier), end in self._ends.items() if run == newest.run and not end.is_durable
        }
        return [tier for tier in client_of(newest).tiers if tier in failed - newest.durable]

    # -- storages that do not answer

    def patience(self, *, is_busy: bool) -> float | None:
        """Seconds until `note_stalled` has something to do; None: never."""
        return _LOOK_EVERY if is_busy and self._connections.clients else None

    def note_stalled(self) -> None:
        """Note which snapshots wait for a storage that takes nothing, so that newer ones may replace them."""
        stalled = self._queues.stalled(_STALLED)
        for held in self.store.snapshots.values():
            held.is_stalled = bool(held.tasks and stalled & client_of(held).tiers.keys())

    def note_outage(self, held: HeldSnapshot, tier: Tier, error: OutOfReachError) -> None:
        """Warn the run's users that a tier is out of reach, once for each outage. Safe from any thread."""

        def note() -> None:
            if held.tasks and (held.run, tier.name) not in self._outages:
                self._outages.add((held.run, tier.name))
                text = "is out of reach: what is saved stays in memory until it answers"
                self._report.warn(self._connections.of_run(held.run), f"{tier.url} {text}: {error}")

        self._loop.call(note)

    # -- places

    def root(self, tier: Tier) -> Storage:
        """The tier's storage. For working threads: opening one may import a good deal."""
        key = msgspec.msgpack.encode((tier.url, tier.options))
        with self._opening:
            if key not in self._roots:
                self._roots[key] = tier.open(self._opener)
            return self._roots[key]

    def wait_path(
        self, client: Client, path: str, tier: Tier, is_given_up: Callable[[], bool] = lambda: False
    ) -> str:
        """The path of a save in a tier, once its attempt has its place there. For working threads.

        Raises what `KeptAttempts.wait_path` does.
        """
        own = "" if tier.name == list(client.tiers)[-1] else tier.name
        return self._attempts.wait_path(client.run, path, own, client.commit_timeout, is_given_up)

    # -- parts that will not come

    def report_lost(self, lost: HeldSnapshot, reason: str) -> None:
        """Tell those who wait for a save that it will not be whole: local ranks; other nodes, in the storage."""
        self._report.lost(lost, reason)
        client, names = client_of(lost), next(iter(lost.parts.values())).stage.tiers
        if lost.info.world_size > lost.local_ranks:
            self._report_missing(client, names, lost.info, list(lost.parts), reason)

    def report_unstaged(self, client: Client, reason: str) -> None:
        """Tell other nodes, in the storage, that the part that a trainer was writing will not come."""
        begun, client.begun = client.begun, None
        if begun is not None:
            self._report_missing(client, begun.tiers, begun.info, [begun.rank], reason)

    def _report_missing(
        self, client: Client, names: Sequence[str], info: SaveInfo, ranks: list[int], reason: str
    ) -> None:
        """Write failure markers for these ranks' parts, in the background. The process does not end before."""

        def report(tier: Tier) -> None:
            try:
                path = self.wait_path(client, info.path, tier)
                report_lost(self.root(tier).at(path), ranks, info.id, reason)
            except Exception as error:
                _log.warning(
                    "no failure marker is written for a part of %s/%s: %s", tier.url, info.path, error
                )

        for name in names:
            self._loop.start(partial(report, client.tiers[name]))

    # -- what became of it

    def _conclude(self, task: PersistTask) -> None:
        """Note and tell what became of a save in a tier."""
        held, tier = task.held, task.tier
        held.tasks -= 1
        for pack in task.packs:
            if pack.rank in held.parts:
                held.parts[pack.rank].checksums = pack.checksums
        if task.superseded:
            self._report.superseded(held, tier, task.url, task.path, task.superseded)
            if held.is_replaced and self._is_flushing:  # by a trainer that never came to write
                self.persist_newest(held.run, again=True)
        elif not task.error:
            self.store.note_persisted(held, tier.name)
            self._note_end(held, tier, is_durable=True)
            if (held.run, tier.name) in self._outages:
                self._outages.remove((held.run, tier.name))
                self._report.warn(self._connections.of_run(held.run), f"{tier.url} answers again")
            self._report.persisted(held, tier, task.url, task.path, time.monotonic() - task.submitted)
        else:
            self._report.failed(held, tier, task.url, task.path, task.error)
            held.failed.add(tier.name)
            self._outages.discard((held.run, tier.name))
            self._note_end(held, tier, is_durable=False)

    def _note_end(self, held: HeldSnapshot, tier: Tier, *, is_durable: bool) -> None:
        known = self._ends.get((held.run, tier.name))
        if known is None or known.order <= held.order:
            self._ends[held.run, tier.name] = _End(held.order, is_durable)


class PersistTask:
    """One snapshot to persist in one tier. Is a `Task`.

    Attributes:
        path: of the save in its run, once it is known; empty before.
        url: where the checkpoint will be, as far as it is known.
        superseded: why the save was given up, if it was; then nothing has failed.
        error: what went wrong, if anything did.
        submitted: when the task was made, by time.monotonic.
        finish: called by the working thread once the work is over.
    """

    finish: Callable[[], None]

    def __init__(
        self, persister: Persister, held: HeldSnapshot, tier: Tier, packs: list[StagedPack]
    ) -> None:
        self.held = held
        self.tier = tier
        self.packs = packs
        self.path = ""
        self.url = f"{tier.url.rstrip('/')}/{held.info.path}"
        self.superseded = ""
        self.error = ""
        self.progress = Progress(sum(len(pack.content) for pack in packs))
        self.submitted = time.monotonic()
        self._persister = persister
        self._client = client_of(held)
        self._is_retry = False

    @property
    def queue(self) -> str:
        """The tier's name: saves reach a tier one after another."""
        return self.tier.name

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.held.info.step

    def done(self, error: str) -> None:
        """The work is over, with this error; empty if there was none."""
        self.error = error
        self.finish()

    def work(self) -> None:
        """Persist the snapshot, and do it again while the storage is out of reach. For a working thread."""
        is_known_to_fail = self.tier.name in self.held.failed
        seconds = 0.0 if is_known_to_fail else self._client.outage_timeout
        try:
            until_it_answers(self._persist, seconds, self._may_wait)
        except SupersededError as error:  # the job goes on without it, so nothing has failed
            self.superseded = str(error)
            _log.info("%s: %s", self.url, self.superseded)
        except OutOfReachError as error:
            if self.path:  # other nodes may wait for these parts, which are not tried again
                storage = self._persister.root(self.tier).at(self.path)
                ranks, reason = [pack.rank for pack in self.packs], f"{type(error).__name__}: {error}"
                report_lost(storage, ranks, self.held.info.id, reason)
            raise

    def _persist(self) -> None:
        """Write this node's packs, then commit the save, or wait until another node does."""
        persister, held, tier = self._persister, self.held, self.tier
        save_id, timeout = held.info.id, self._client.commit_timeout
        self.path = persister.wait_path(self._client, held.info.path, tier, lambda: held.is_replaced)
        place = Place(persister.root(tier), self.path)
        self.url = place.url
        if self._is_retry and was_committed(place, save_id):
            return  # only the answer that said so was lost
        if not held.begin_reading():
            raise SupersededError(f"a newer save has taken its place while {tier.url} took nothing")
        is_given_up = partial(persister.store.is_outdated, held)
        proposal = _proposal(held, self.path)
        begun = time.monotonic()
        try:
            persist_save(
                Destination(tier, place),
                save_id,
                self.packs,
                proposal,
                timeout,
                self.progress.reach,
                is_given_up,
                reports_outage=False,
            )
        finally:
            held.end_reading()
        if proposal is None:  # another node commits, and without that nothing is safe
            wait_committed(place, save_id, Patience(timeout, is_given_up, time.monotonic() - begun))

    def _may_wait(self, error: OutOfReachError) -> bool:
        """True if the save may be tried again: not if its attempt has no place, which was waited for already."""
        if not self.path:
            return False
        self._is_retry = True
        self._persister.note_outage(self.held, self.tier, error)
        return True


def _staged_pack(part: Part) -> StagedPack:
    content = part.buffer.content[: part.plan.size]
    return StagedPack(part.stage.rank, content, part.plan.chunks, part.values, part.checksums)


def _proposal(held: HeldSnapshot, path: str) -> Proposal | None:
    """Rank 0's proposal, if it staged here, for the save at `path` in its run."""
    if (part := held.parts.get(0)) is None:
        return None
    return Proposal.decode(part.stage.proposal, part.plan.whole).at(path)
