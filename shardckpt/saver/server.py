"""The saver's process: it serves trainers, and has what they stage persisted, whether they live or not."""

from __future__ import annotations

import os
import secrets
import socket
import time
from typing import Any

from shardckpt.environment import SAVER_LINGER
from shardckpt.format.chunks import ChunkLocation
from shardckpt.run.lease import Terms
from shardckpt.run.tiers import MEMORY
from shardckpt.saver.allocation import Allocation
from shardckpt.saver.attempt_reports import AttemptReports
from shardckpt.saver.attempts import KeptAttempts
from shardckpt.saver.buffer_pool import BufferPool
from shardckpt.saver.buffers import SnapshotMemory
from shardckpt.saver.checks import check, decode_values
from shardckpt.saver.connections import Client, Connections
from shardckpt.saver.lifetime import Lifetime
from shardckpt.saver.loop import EventLoop
from shardckpt.saver.persister import Opener, Persister
from shardckpt.saver.protocol import (
    Abandon,
    Attach,
    Attached,
    Begin,
    Bye,
    ChunkTable,
    Detach,
    Find,
    Found,
    GivenBack,
    Hello,
    Outcome,
    Ping,
    Pong,
    Reserve,
    Snapshot,
    Stage,
    Start,
    Welcome,
)
from shardckpt.saver.reading import attachable, attached
from shardckpt.saver.report import ControlConnection, Report
from shardckpt.saver.snapshots import PackPlan, SnapshotStore
from shardckpt.storage import open_storage

__all__ = ["SaverServer"]

_LOST = "a rank ended before it had staged its part"


class SaverServer:
    """Serves until it is told to flush, or until the last trainer is gone, and everything is durable.

    Args:
        listener: a listening unix socket. Connections of other users are closed at once.
        control: a connection to the launcher that started this process: it gets lines of JSON about what is
            persisted, and its end means: flush. None: the saver ends by itself, `linger` seconds after the last
            trainer.
        linger: seconds to wait for a restarted job. Not after all trainers have said goodbye.
        opener: how to open a tier's URL.
        memory: allocates the buffers.
        terms: of the leases that this saver keeps.
    """

    def __init__(
        self,
        listener: socket.socket,
        control: socket.socket | None = None,
        *,
        linger: float = SAVER_LINGER,
        opener: Opener = open_storage,
        memory: SnapshotMemory | None = None,
        terms: Terms | None = None,
    ) -> None:
        self._id = secrets.token_hex(8)
        self._has_launcher = control is not None
        self._lifetime = Lifetime.begin(time.monotonic(), linger, has_launcher=self._has_launcher)
        self._finished: set[str] = set()  # runs whose trainers have said goodbye
        self._loop = EventLoop()
        self._control = ControlConnection(self._loop, control, self._flush_soon)
        self._connections = Connections(self._loop, listener, self._dispatch, self._on_end)
        self._report = Report(self._connections, self._control)
        self._store = SnapshotStore()
        self._pool = BufferPool(self._store)
        self._allocation = Allocation(
            self._pool, memory or SnapshotMemory(), self._loop, self._connections, self._report
        )
        attempts = KeptAttempts(is_job=self._has_launcher, terms=terms)
        self._persister = Persister(
            self._store, attempts, self._loop, self._connections, self._report, opener
        )
        self._attempts = AttemptReports(attempts, self._loop, self._connections, self._persister.root)

    @property
    def buffers(self) -> int:
        """The number of buffers that there are."""
        return len(self._pool.buffers)

    def run(self) -> int:
        """Serve. Returns the exit code: 0 if the newest save that was to go to a tier is durable there, else 1.

        An older save that failed is no failure of the job: a newer one has taken its place.
        """
        self._connections.open()
        self._control.open()
        while not self._is_over():
            self._loop.turn(self._patience())
            self._connections.accept_again()
            self._allocation.watch_memory()
            self._persister.note_stalled()
            self._allocation.tidy()
            self._release_finished()
            self._flush_if_due()
            self._persister.tell_progress()
        self._connections.close()
        self._report.flushed()
        self._pool.close()
        self._loop.close()
        return int(not self._persister.is_durable)

    # -- the loop

    def _is_over(self) -> bool:
        has_trainers = bool(self._connections.clients)
        return self._lifetime.is_over(
            time.monotonic(), is_busy=self._loop.is_busy, has_trainers=has_trainers
        )

    def _patience(self) -> float | None:
        """Seconds to wait for something to happen; None: as long as it takes."""
        is_busy, has_trainers = self._loop.is_busy, bool(self._connections.clients)
        waits = (
            self._lifetime.patience(time.monotonic(), is_busy=is_busy, has_trainers=has_trainers),
            self._report.patience(is_busy=is_busy),
            self._persister.patience(is_busy=is_busy),
            self._allocation.patience,
            self._connections.patience,
        )
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def _flush_soon(self) -> None:
        """The launcher ends the connection: persist what is in memory only, and end after that."""
        self._lifetime.flush(time.monotonic())

    def _flush_if_due(self) -> None:
        """Flush, once the trainers are gone and all that they sent has been handled."""
        if self._lifetime.is_flush_due(time.monotonic(), has_trainers=bool(self._connections.clients)):
            self._lifetime.has_flushed = True
            self._attempts.end_all()
            self._persister.flush()

    def _release_finished(self) -> None:
        """Free the memory of finished runs, except for a snapshot that still has to become durable."""
        for run in self._finished:
            newest = self._store.newest(run)
            keep = newest if newest and self._persister.lacking(newest) else None
            self._pool.release(run, keep=keep)

    # -- trainers

    def _on_end(self, client: Client) -> None:
        """A trainer is gone."""
        run = client.run
        lost = self._store.forget(client)
        self._pool.take_back(client)
        for held in lost:
            self._persister.report_lost(held, _LOST)
        self._persister.report_unstaged(client, _LOST)
        if not self._connections.of_run(run):
            if client.has_left:
                self._finished.add(run)
                self._persister.persist_newest(
                    run, again=not self._has_launcher
                )  # else the flush does that
            if not self._has_launcher:
                self._attempts.end(run)
        if not self._connections.clients:
            self._lifetime.emptied(time.monotonic(), may_linger=not client.has_left)

    def _dispatch(self, client: Client, message: Any) -> None:
        """Act on a trainer's message. Raises RequestError, LookupError or EOFError if it makes no sense."""
        check(message, client.tiers if client.has_greeted else None)
        match message:
            case Hello():
                self._welcome(client, message)
            case Start():
                self._attempts.start(client, message)
            case ChunkTable():
                chunks = list(map(ChunkLocation, message.row, message.offset, message.nbytes))
                client.plan = PackPlan(message.number, chunks, message.size, message.whole)
                self._allocation.replan(client)
            case Reserve():
                self._allocation.request(client, message.size)
            case Begin():
                self._allocation.begin(client, message.buffer, message.info.id)
                client.begun = message
            case Stage():
                self._take_over(client, message)
            case Abandon():
                if (lost := self._store.abandon(message.id, client.run)) is not None:
                    self._persister.report_lost(lost, message.error)
                self._persister.report_unstaged(client, message.error)
            case Find():
                self._connections.send(client, Found(self._snapshots(client.run)))
            case Attach():
                self._attach(client, message.id)
            case Detach():
                for held in self._store.snapshots.values():
                    held.readers.discard(client)
            case GivenBack():
                self._allocation.given_back(client, message.buffer)
            case Ping():
                self._connections.send(client, Pong())
            case Bye():
                client.has_left = True
            case _:
                raise EOFError(f"a trainer does not send {type(message).__name__}")

    def _welcome(self, client: Client, hello: Hello) -> None:
        client.has_greeted = True
        client.run = hello.run
        client.snapshots = self._allocation.snapshots(hello.snapshots)
        client.tiers = {tier.name: tier for tier in hello.tiers}
        client.commit_timeout = hello.commit_timeout
        client.outage_timeout = min(hello.commit_timeout, hello.outage_timeout)
        self._finished.discard(client.run)
        self._store.join(client)
        held = [held.order[0] for held in self._store.whole(client.run)]
        newest = max([self._attempts.newest(client.run), *held])
        self._connections.send(client, Welcome(self._id, os.getpid(), newest))

    # -- snapshots

    def _take_over(self, client: Client, stage: Stage) -> None:
        """Take a staged pack over; once the save is whole, have it persisted."""
        if client.plan is None:
            raise LookupError("it staged a pack without a plan")
        values = decode_values(stage)
        buffer = self._pool.granted(client, stage.buffer)
        held = self._store.stage(client, buffer, stage, client.plan, values)
        client.begun = None
        if held is None:
            self._refuse(client, stage)
        elif held.is_whole:
            self._report.staged(held)
            self._persister.persist(held, stage.tiers)

    def _refuse(self, client: Client, stage: Stage) -> None:
        """Tell a trainer that its save is lost already."""
        for tier in (MEMORY, *stage.tiers):
            self._connections.send(client, Outcome(stage.info.id, tier, _LOST))

    def _snapshots(self, run: str) -> list[Snapshot]:
        """The run's snapshots that can be attached to, at the places where their attempts are by now."""
        return [
            Snapshot(held.info.at(self._attempts.path(run, held.info.path)), sorted(held.parts))
            for held in attachable(self._store, run)
        ]

    def _attach(self, client: Client, save_id: str) -> None:
        """Hand over what a snapshot is, and its packs' memory, a number of packs at a time."""
        held = self._store.snapshots.get(save_id)
        if held is None or held not in attachable(self._store, client.run):
            self._connections.send(client, Attached([], []))
            return
        held.readers.add(client)
        for answer, descriptors in attached(held):
            self._connections.send(client, answer, descriptors)
