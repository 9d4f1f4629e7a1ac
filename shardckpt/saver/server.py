"""The saver's loop: it serves trainers, and has what they staged persisted whether they live or not.

One thread serves; what takes long (allocating, persisting) is done by others, which come back to it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import secrets
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from shardckpt.environment import SAVER_LINGER
from shardckpt.errors import OutOfReachError, SupersededError
from shardckpt.format.chunks import ChunkLocation
from shardckpt.run.attempt_keeper import Condition
from shardckpt.run.commit_wait import wait_committed, was_committed
from shardckpt.run.failure_reports import report_lost
from shardckpt.run.lease import Terms
from shardckpt.run.persist import StagedPack, persist_save
from shardckpt.run.places import Place
from shardckpt.run.proposal import Proposal
from shardckpt.run.tiers import Destination, Tier
from shardckpt.saver.attempts import KeptAttempts
from shardckpt.saver.buffers import Pressure, SnapshotMemory, map_buffer, rounded
from shardckpt.saver.channel import Channel, encode, peer
from shardckpt.saver.checks import RequestError, check, decode_values
from shardckpt.saver.outage import until_it_answers
from shardckpt.saver.outbox import Outbox
from shardckpt.saver.protocol import (
    Abandon,
    Answer,
    Attach,
    Attached,
    Begin,
    Bye,
    ChunkTable,
    Claimed,
    Contents,
    Detach,
    Find,
    Found,
    GiveBack,
    GivenBack,
    Hello,
    Note,
    Outcome,
    Ping,
    Pong,
    Reserve,
    Reserved,
    Snapshot,
    Stage,
    Start,
    Welcome,
)
from shardckpt.saver.snapshots import HeldSnapshot, PackPlan, Part, SnapshotStore, Trainer
from shardckpt.saver.tasks import Progress, Task, TierQueues
from shardckpt.storage import Storage, open_storage

__all__ = ["SaverServer"]

_log = logging.getLogger("shardckpt.saver")

_PACKS_AT_ONCE = 64  # descriptors in a message
_LAST_READS = 64  # of what a trainer has sent before its death, more than the kernel keeps of that
_MOST_REQUESTS = 1024  # for buffers
_TELL_EVERY = 0.2  # seconds between two lines of progress
_ACCEPT_AGAIN = 1.0  # seconds until connections are taken in again, once there were too many
_END_TIMEOUT = 10.0  # seconds for a run's storage to take note that its job has ended
_STALLED = (
    10.0  # seconds in which a storage has taken nothing, after which what waits for it may be replaced
)
_LOOK_EVERY = 1.0  # seconds between two looks whether one does
_GRACE = 5.0  # seconds for trainers to end once a drain was asked for
_FIRST = 30.0  # seconds for the first trainer to come
_LOST = "a rank ended before it had staged its part"


@dataclass(eq=False)
class _Client(Trainer):
    """A connected trainer."""

    channel: Channel = field(kw_only=True)
    outbox: Outbox = field(kw_only=True)
    pidfd: int = field(kw_only=True)
    tiers: dict[str, Tier] = field(default_factory=dict)
    commit_timeout: float = 0.0
    outage_timeout: float = 0.0
    plan: PackPlan | None = None
    has_greeted: bool = False
    requests: deque[int] = field(default_factory=deque)
    """Sizes of the buffers that it waits for."""
    is_told: bool = False
    """Whether it knows that there is no buffer for this plan yet."""
    asked_back: set[int] = field(default_factory=set)
    """Buffers that it is to do without, if it can."""
    begun: Begin | None = None
    """The part that it is writing."""
    attempt: str = ""
    """Which its saves are of, by the name that it began with."""
    has_left: bool = False


@dataclass(frozen=True)
class _End:
    """What became of the newest save of a run that was to go to a tier."""

    order: tuple[int, int, str, int]
    is_durable: bool


class SaverServer:
    """Serves until it is told to drain, or until the last trainer is gone, and everything is durable.

    Args:
        listener: a listening unix socket. Connections of other users are closed at once.
        control: a connection to who started it, to whom it tells in lines of JSON what it persists, and whose
            end means: drain. None: it ends by itself, `linger` seconds after the last trainer.
        linger: seconds that it waits for a restarted job. Not after all trainers said goodbye.
        opener: how to open a tier's URL.
        memory: makes the buffers.
        terms: of the leases that it keeps.
    """

    def __init__(
        self,
        listener: socket.socket,
        control: socket.socket | None = None,
        *,
        linger: float = SAVER_LINGER,
        opener: Callable[[str, dict[str, Any] | None], Storage] = open_storage,
        memory: SnapshotMemory | None = None,
        terms: Terms | None = None,
    ) -> None:
        self._listener = listener
        self._control = control
        self._agent = None if control is None else Outbox(control)
        self._linger = linger
        self._open = opener
        self._memory = memory or SnapshotMemory()
        self._looked = 0.0
        self._shortages = (
            0  # of memory: 1 if there has been any, and more for each after which the kernel killed
        )
        self._id = secrets.token_hex(8)
        self._shelf = SnapshotStore()
        self._lanes = TierQueues()
        self._attempts = KeptAttempts(is_job=control is not None, terms=terms)
        self._clients: set[_Client] = set()
        self._roots: dict[bytes, Storage] = {}
        self._opening = threading.Lock()
        self._tasks = 0  # of other threads, that are to be over before this process ends
        self._finished: set[str] = set()  # runs whose trainers said goodbye
        self._ends: dict[tuple[str, str], _End] = {}  # by run and tier
        self._outages: set[tuple[str, str]] = set()  # that are told of, by run and tier
        self._is_draining = False
        self._may_linger = True
        self._empty_since = time.monotonic() + max(0.0, _FIRST - linger)  # nobody has come yet
        self._told = 0.0
        self._accept_at = 0.0  # when it takes in connections again
        self._drain_until = 0.0
        self._has_flushed = False
        self._selector = selectors.DefaultSelector()
        self._returned: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    def run(self) -> int:
        """Serve. Returns the exit code: 0 if the newest save that was to go to a tier is durable there, else 1.

        An older save that failed is no failure of the job: a newer one has taken its place.
        """
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._wake)
        if self._control is not None:
            self._control.setblocking(False)
            self._watch_control()
        while not self._is_over():
            for key, _ in self._selector.select(self._patience()):
                key.data()
            while self._returned:
                self._returned.popleft()()
            self._accept_again()
            self._watch_memory()
            self._tidy()
            if self._is_draining:
                self._flush()
            self._tell_progress()
        self._listener.close()
        self._tell(event="drained")
        self._shelf.close()
        for descriptor in (self._selector, self._wake_read, self._wake_write):
            descriptor.close()
        return int(not all(end.is_durable for end in self._ends.values()))

    # -- the loop

    def _is_over(self) -> bool:
        if self._tasks or self._returned:
            return False
        if self._is_draining:
            return self._has_flushed
        if self._clients or self._control is not None:
            return False
        return not self._may_linger or time.monotonic() >= self._empty_since + self._linger

    def _patience(self) -> float | None:
        """How long to wait for something to happen before the next look at all."""
        patience = [self._patience_of_clients()]
        if self._shelf.buffers:
            patience.append(self._memory.look_every)
        if self._accept_at:
            patience.append(_ACCEPT_AGAIN)
        return min((seconds for seconds in patience if seconds is not None), default=None)

    def _patience_of_clients(self) -> float | None:
        if self._is_draining and not self._has_flushed:
            return max(0.0, self._drain_until - time.monotonic())
        if self._tasks:  # whose end wakes this thread
            waits = _LOOK_EVERY if self._clients else None
            return waits if self._control is None else _TELL_EVERY
        if self._control is None and not self._clients:
            return max(0.0, self._empty_since + self._linger - time.monotonic())
        return None

    def _later(self, function: Callable[[], None]) -> None:
        """Have `function` called by the serving thread. Safe from any thread."""
        self._returned.append(function)
        with contextlib.suppress(OSError):  # it is full, or there is nobody to wake any more
            self._wake_write.send(b"\0")

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(1 << 12)

    def _hear_control(self) -> None:
        assert self._control is not None
        assert self._agent is not None
        try:
            self._agent.flush()
            if not self._is_draining and not self._control.recv(1 << 12):
                self._drain()
        except BlockingIOError:
            pass
        except OSError:
            self._agent.close()
            if not self._is_draining:
                self._drain()
        self._watch_control()

    def _watch_control(self) -> None:
        """Have `_hear_control` called when the agent has something to say, or takes more of what it is told."""
        assert self._control is not None
        assert self._agent is not None
        events = 0 if self._is_draining else selectors.EVENT_READ
        events |= 0 if self._agent.is_empty else selectors.EVENT_WRITE
        self._set_events(self._control, events, self._hear_control)

    def _set_events(
        self, connection: Channel | socket.socket, events: int, serve: Callable[[], None]
    ) -> None:
        """Have a connection served when one of the events, or none of them, is there."""
        known = self._selector.get_map().get(connection)
        if known is None and events:
            self._selector.register(connection, events, serve)
        elif known is not None and not events:
            self._selector.unregister(connection)
        elif known is not None and known.events != events:
            self._selector.modify(connection, events, serve)

    def _drain(self) -> None:
        """Nobody is to come any more: have what is in memory only persisted, and end after that."""
        self._is_draining = True
        self._drain_until = time.monotonic() + _GRACE

    def _flush(self) -> None:
        """The rest of a drain, once the trainers are gone and all that they sent has been taken in."""
        if self._has_flushed or (self._clients and time.monotonic() < self._drain_until):
            return
        self._has_flushed = True
        for run in self._attempts.runs():
            self._end_attempts(run)
        for run in {held.run for held in self._shelf.snapshots.values()}:
            self._persist_newest(run, again=True)

    def _persist_newest(self, run: str, *, again: bool) -> None:
        """Have the newest snapshot persisted in all tiers, if it is in memory only.

        `again`: also where it has failed before, or where an older save has that it can take the place of.
        """
        newest = self._shelf.newest(run)
        if newest is None or newest.tasks or (newest.failed and not again):
            return
        tiers = list(_client_of(newest).tiers)
        if newest.is_persisted:
            tiers = self._lacking(newest) if again else []
        self._persist(newest, tiers)

    def _lacking(self, newest: HeldSnapshot) -> list[str]:
        """Tiers whose last save has failed, and that the run's newest snapshot is not durable in either."""
        failed = {
            tier for (run, tier), end in self._ends.items() if run == newest.run and not end.is_durable
        }
        return [tier for tier in _client_of(newest).tiers if tier in failed - newest.durable]

    def _tell(self, **line: object) -> None:
        """A line to who started this process, who may be dead, or stopped."""
        if self._agent is not None:
            with contextlib.suppress(OSError):
                self._agent.send(json.dumps(line).encode() + b"\n")
            self._watch_control()

    def _tell_progress(self) -> None:
        now = time.monotonic()
        if self._agent is None or not self._agent.is_empty or now < self._told + _TELL_EVERY:
            return
        for task in self._lanes.under_way():
            done, total = task.progress.done, task.progress.total
            self._tell(event="persisting", step=task.step, tier=task.tier, done=done, total=total)
            self._told = now

    def _tidy(self) -> None:
        """Hand out what buffers there are, and give up what nobody will ask for."""
        if self._shortages:
            self._relieve(may_give_up_newest=self._shortages > 1)
        self._note_stalled()
        for client in self._clients:
            self._serve_requests(client)
            self._take_surplus(client)
        for run in {buffer.run for buffer in self._shelf.buffers.values()}:
            clients = [client for client in self._clients if client.run == run]
            served = bool(clients) and all(self._has_its_buffers(client) for client in clients)
            self._shelf.tidy(run, everyone_is_served=served)
        for run in self._finished:
            newest = self._shelf.newest(run)
            self._shelf.release(run, keep=newest if newest and self._lacking(newest) else None)

    def _note_stalled(self) -> None:
        """Note which snapshots wait for a storage that does not answer, so that newer ones may take their
        place."""
        stalled = self._lanes.stalled(_STALLED)
        for held in self._shelf.snapshots.values():
            held.is_stalled = bool(held.tasks and stalled & _client_of(held).tiers.keys())

    # -- clients

    def _accept_again(self) -> None:
        """Take in connections again, once there were too many."""
        if self._accept_at and time.monotonic() >= self._accept_at:
            self._accept_at = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it has gone again
            return
        except OSError as error:  # there are too many: those that wait are taken in when others have gone
            _log.warning("a trainer cannot connect yet: %s", error)
            self._selector.unregister(self._listener)
            self._accept_at = time.monotonic() + _ACCEPT_AGAIN
            return
        pid, uid = peer(connection)
        if uid != os.getuid():
            connection.close()
            return
        connection.setblocking(False)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:  # dead already, or in another process namespace: the connection's end must do
            pidfd = -1
        channel = Channel(connection, takes_descriptors=False)
        client = _Client(channel=channel, outbox=Outbox(connection), pidfd=pidfd)
        self._clients.add(client)
        self._watch(client)
        if pidfd >= 0:
            # Its forked children may keep the connection open after its death.
            self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._hear_last(client))

    def _hear(self, client: _Client) -> None:
        """Take in what has arrived from a trainer, and act on it."""
        if client not in self._clients:
            return
        is_open = True
        try:
            self._flush_to(client)
            is_open = client.channel.read_some()
            while (received := client.channel.next_message()) is not None:
                self._dispatch(client, received[0])
        except BlockingIOError:
            is_open = not _is_dead(client)
        except Exception as error:  # whatever it sent, it must not end this process, which others rely on
            expected = isinstance(error, EOFError | LookupError | OSError | RequestError)
            _log.warning("a trainer is let go: %s", error, exc_info=not expected)
            is_open = False
        if not is_open:
            self._disconnect(client)

    def _hear_last(self, client: _Client) -> None:
        """A trainer is dead, whoever else has its connection open: act on what it still sent."""
        for _ in range(_LAST_READS):
            self._hear(client)
        if client in self._clients:
            self._disconnect(client)

    def _disconnect(self, client: _Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client.channel)
        client.outbox.close()
        client.channel.close()
        if client.pidfd >= 0:
            self._selector.unregister(client.pidfd)
            os.close(client.pidfd)
        for lost in self._shelf.forget(client):
            self._report_lost(lost, _LOST)
        self._report_unstaged(client, _LOST)
        if client.has_left and all(other.run != client.run for other in self._clients):
            self._finished.add(client.run)
            self._persist_newest(client.run, again=self._control is None)  # else the drain does that
        if self._control is None and all(other.run != client.run for other in self._clients):
            self._end_attempts(client.run)
        if not self._clients:
            self._empty_since = time.monotonic()
            self._may_linger = not client.has_left

    def _send(self, client: _Client, answer: Answer, descriptors: Sequence[int] = ()) -> None:
        if client not in self._clients:
            return
        try:
            client.outbox.send(encode(answer, len(descriptors)), descriptors)
        except OSError as error:  # it is dead, which the loop is about to hear, or does not read
            if isinstance(error, BlockingIOError):
                _log.warning("a trainer is let go: %s", error)
            client.outbox.close()
            client.channel.shut()
        self._watch(client)

    def _flush_to(self, client: _Client) -> None:
        """Send what a trainer has not taken yet. If it is gone, what it has sent before counts all the same."""
        if not client.outbox.is_empty:
            try:
                client.outbox.flush()
            except OSError:
                client.outbox.close()
            self._watch(client)

    def _watch(self, client: _Client) -> None:
        """Have `_hear` called when a trainer has sent something, or takes more."""
        events = selectors.EVENT_READ | (0 if client.outbox.is_empty else selectors.EVENT_WRITE)
        self._set_events(client.channel, events, lambda: self._hear(client))

    def _dispatch(self, client: _Client, message: Any) -> None:
        check(message, client.tiers if client.has_greeted else None)
        match message:
            case Hello():
                client.has_greeted = True
                client.run = message.run
                client.snapshots = 1 if self._shortages else message.snapshots
                client.tiers = {tier.name: tier for tier in message.tiers}
                client.commit_timeout = message.commit_timeout
                client.outage_timeout = min(message.commit_timeout, message.outage_timeout)
                self._finished.discard(client.run)
                self._shelf.join(client)
                self._send(client, Welcome(self._id, os.getpid(), self._newest_attempt(client.run)))
            case Start():
                self._start_attempt(client, message)
            case ChunkTable():
                writes = list(map(ChunkLocation, message.row, message.offset, message.nbytes))
                client.plan = PackPlan(message.number, writes, message.size, message.whole)
                client.requests.clear()
                client.asked_back.clear()
                client.is_told = False
                self._shelf.take_back(client)
            case Reserve():
                if len(client.requests) == _MOST_REQUESTS:
                    raise RequestError("it asks for too many buffers")
                client.wanted = rounded(message.size)
                client.requests.append(client.wanted)
            case Begin():
                self._shelf.begin(client, message.buffer, message.info.id)
                client.asked_back.discard(message.buffer)
                client.begun = message
            case Stage():
                self._take(client, message)
            case Abandon():
                if (lost := self._shelf.abandon(message.id, client.run)) is not None:
                    self._report_lost(lost, message.error)
                self._report_unstaged(client, message.error)
            case Find():
                self._send(client, Found(self._usable(client.run)))
            case Attach():
                self._attach(client, message.id)
            case Detach():
                for held in self._shelf.snapshots.values():
                    held.readers.discard(client)
            case GivenBack():
                self._shelf.give_back(client, message.buffer)
                client.asked_back.discard(message.buffer)
                client.requests.append(client.wanted)
            case Ping():
                self._send(client, Pong())
            case Bye():
                client.has_left = True
            case _:
                raise EOFError(f"a trainer does not send {type(message).__name__}")

    # -- attempts

    def _newest_attempt(self, run: str) -> int:
        """The number of the newest attempt of a run that is known here."""
        held = [held.order[0] for held in self._shelf.whole(run)]
        return max([self._attempts.newest(run), *held])

    def _start_attempt(self, client: _Client, start: Start) -> None:
        client.attempt = start.attempt.name
        run, root = client.run, list(client.tiers.values())[-1]

        def is_wanted() -> bool:
            return any(
                other.run == run and other.attempt == start.attempt.name for other in list(self._clients)
            )

        def tell(condition: Condition) -> None:
            self._later(lambda: self._tell_condition(run, start, condition))

        condition = self._attempts.start(
            run,
            start.attempt,
            claims=start.claims,
            name=start.name,
            opener=lambda: self._root(root),
            tell=tell,
            is_wanted=is_wanted,
        )
        if condition != Condition():
            self._tell_condition(run, start, condition)

    def _tell_condition(self, run: str, start: Start, condition: Condition) -> None:
        """Tell an attempt's trainers how it stands."""
        error = condition.error
        claimed = Claimed(
            start.attempt.id,
            condition.name,
            str(error) if error is not None else "",
            type(error).__name__ if error is not None else "",
            isinstance(error, OutOfReachError),
            condition.notice,
        )
        if claimed.error or claimed.notice:
            _log.info("%s: %s", start.attempt.name, claimed.error or claimed.notice)
        for client in list(self._clients):
            if client.run == run and client.attempt == start.attempt.name:
                self._send(client, claimed)

    def _end_attempts(self, run: str) -> None:
        """A run's job has ended, which is told in the run; this process waits for that, but not for long."""
        self._tasks += 1

        def end() -> None:
            self._attempts.end(run, _END_TIMEOUT)
            self._later(done)

        def done() -> None:
            self._tasks -= 1

        threading.Thread(target=end, daemon=True).start()

    # -- buffers

    def _has_its_buffers(self, client: _Client) -> bool:
        return len(self._shelf.owned(client)) >= client.snapshots and not client.allocating

    def _serve_requests(self, client: _Client) -> None:
        while client.requests and not client.allocating:
            size = client.requests[0]
            if (buffer := self._shelf.grant(client, size)) is not None:
                client.requests.popleft()
                answer = Reserved(_number(client), buffer.number, buffer.size)
                self._send(client, answer, [buffer.descriptor])
            elif self._shelf.may_allocate(client, size) and self._can_afford(client):
                self._allocate(client, size)
            else:
                if not client.is_told and not self._shelf.owned(client):
                    client.is_told = True
                    self._send(client, Reserved(_number(client)))
                return

    def _can_afford(self, client: _Client) -> bool:
        """Whether there is memory for one more buffer for each of the run's trainers, as a snapshot takes one of
        each. Of a first buffer that is found out by making it."""
        own = len(self._shelf.owned(client))
        if own == 0 or not (reason := self._memory.lacking(self._shelf.lacking(client.run, own + 1))):
            return True
        self._keep_fewer(client.run, own, reason)
        return False

    def _keep_fewer(self, run: str, count: int, reason: str) -> None:
        """Hold no more than `count` snapshots of a run from now on."""
        clients = [client for client in self._clients if client.run == run and client.snapshots > count]
        snapshots = "one snapshot" if count == 1 else f"{count} snapshots"
        text = f"holding {snapshots} only in memory: {reason}"
        if clients:
            _log.warning("%s", text)
        for client in clients:
            client.snapshots = count
            self._send(client, Note(text))

    def _take_surplus(self, client: _Client) -> None:
        """Have the trainer do without what it has beyond its number of snapshots."""
        for buffer in self._shelf.surplus(client):
            if not buffer.is_granted:
                self._shelf.discard(buffer)
            elif buffer.number not in client.asked_back:
                client.asked_back.add(buffer.number)
                self._send(client, GiveBack(buffer.number))

    def _watch_memory(self) -> None:
        """Keep no spare snapshots once memory has run short.

        If the kernel has killed although there were none, then not even the last one of trainers that are gone,
        if it is durable: those that come after them need the memory more.
        """
        now = time.monotonic()
        if not self._shelf.buffers or now < self._looked + self._memory.look_every:
            return
        self._looked = now
        match self._memory.pressure(sum(buffer.size for buffer in self._shelf.buffers.values())):
            case Pressure.KILLED:
                self._shortages += 1
                reason = "the kernel has killed for want of memory"
            case Pressure.SHORT:
                if self._shortages:
                    self._relieve(may_give_up_newest=True)
                self._shortages = max(1, self._shortages)
                reason = "memory is short"
            case Pressure.NONE:
                return
        for run in {client.run for client in self._clients}:
            self._keep_fewer(run, 1, reason)

    def _relieve(self, *, may_give_up_newest: bool) -> bool:
        """Give back what nobody needs. Whether there was any."""
        if freed := self._shelf.relieve(may_give_up_newest=may_give_up_newest):
            _log.warning(
                "memory is short: %.1f GB of snapshots that nobody needs are given back", freed / 1e9
            )
        return freed > 0

    def _allocate(self, client: _Client, size: int) -> None:
        """Get new memory, which takes the kernel a second per GiB, so by another thread."""
        self._shelf.make_room(client.run, size)
        client.allocating = size

        def work() -> None:
            try:
                descriptor, found = self._memory.allocate(size)
                content = map_buffer(descriptor, found)
            except Exception as error:  # whatever it is, training goes on without
                reason = f"no memory for a snapshot of {size} bytes: {error}"
                self._later(lambda: refuse(reason))
            else:
                self._later(lambda: take(descriptor, found, content))

        def refuse(reason: str) -> None:
            client.allocating = 0
            if own := len(self._shelf.owned(client)):
                self._keep_fewer(client.run, own, reason)
            elif not self._relieve(may_give_up_newest=True):  # else it is tried again
                client.requests.clear()
                client.wanted = 0
                self._send(client, Reserved(_number(client), error=reason))

        def take(descriptor: int, found: int, content: mmap.mmap) -> None:
            client.allocating = 0
            self._shelf.add(client, descriptor, found, content)

        threading.Thread(target=work, daemon=True).start()

    # -- snapshots

    def _take(self, client: _Client, stage: Stage) -> None:
        if client.plan is None:
            raise LookupError("it staged a pack without a plan")
        held = self._shelf.stage(client, stage, client.plan, decode_values(stage))
        client.begun = None
        if held is None:
            for tier in ("memory", *stage.tiers):
                self._send(client, Outcome(stage.info.id, tier, _LOST))
        elif held.is_whole:
            self._tell(event="staged", step=held.info.step)
            self._tell_trainers(held, Outcome(held.info.id, "memory"))
            self._persist(held, stage.tiers)

    def _persist(self, held: HeldSnapshot, tiers: Sequence[str]) -> None:
        """Have a snapshot persisted in these tiers."""
        client = _client_of(held)
        held.is_replaced = held.is_at_risk and held.is_replaced
        packs = [_staged_pack(part) for part in held.parts.values()]
        for name in tiers:
            held.tasks += 1
            self._tasks += 1
            self._lanes.submit(self._task(held, list(client.tiers), client.tiers[name], packs))

    def _task(self, held: HeldSnapshot, tiers: list[str], tier: Tier, packs: list[StagedPack]) -> Task:
        timeout = _client_of(held).commit_timeout
        url = f"{tier.url.rstrip('/')}/{held.info.path}"
        path = ""  # in the run, once that is known
        started = time.monotonic()
        superseded = ""
        is_again = False

        def is_replaced() -> bool:
            return held.is_replaced

        def is_given_up() -> bool:
            return self._shelf.is_outdated(held)

        def persist(progress: Progress) -> None:
            nonlocal path, url
            own = "" if tier.name == tiers[-1] else tier.name
            path = self._attempts.wait_path(held.run, held.info.path, own, timeout, is_replaced)
            place = Place(self._root(tier), path)
            task.url = url = place.url
            if is_again and was_committed(place, held.info.id):
                return  # only the answer that said so was lost
            if not held.begin_reading():
                raise SupersededError(f"a newer save has taken its place while {tier.url} took nothing")
            destination = Destination(tier, place)
            proposal = _proposal(held, path)
            begun = time.monotonic()
            try:
                persist_save(
                    destination,
                    held.info.id,
                    packs,
                    proposal,
                    timeout,
                    progress.reach,
                    is_given_up,
                    reports_outage=False,
                )
            finally:
                held.end_reading()
            if proposal is None:  # the commit is another node's affair, and without it nothing is safe
                own_seconds = time.monotonic() - begun
                wait_committed(place, held.info.id, timeout, is_given_up, own_seconds=own_seconds)

        def may_wait(error: OutOfReachError) -> bool:
            nonlocal is_again
            if not path:  # it was waited for already, to claim the attempt
                return False
            is_again = True
            self._later(lambda: self._note_outage(held, tier, error))
            return True

        def work(progress: Progress) -> None:
            nonlocal superseded
            seconds = 0.0 if tier.name in held.failed else _client_of(held).outage_timeout
            try:
                until_it_answers(partial(persist, progress), seconds, may_wait)
            except SupersededError as error:  # the job goes on without it, so nothing has failed
                superseded = str(error)
                _log.info("%s: %s", url, superseded)
            except OutOfReachError as error:
                if path:  # other nodes may wait for these parts, which are not tried again
                    ranks, reason = [pack.rank for pack in packs], f"{type(error).__name__}: {error}"
                    report_lost(self._root(tier).at(path), ranks, held.info.id, reason)
                raise

        def note(error: str) -> None:
            held.tasks -= 1
            self._tasks -= 1
            for pack in packs:
                if pack.rank in held.parts:
                    held.parts[pack.rank].checksums = pack.checksums
            if superseded:
                self._tell(event="superseded", step=held.info.step, tier=tier.name, url=url)
                self._tell_trainers(held, Outcome(held.info.id, tier.name, superseded, path))
                if held.is_replaced and self._has_flushed:  # by a trainer that never came to write
                    self._persist_newest(held.run, again=True)
            elif not error:
                self._shelf.note_persisted(held, tier.name)
                self._note_end(held, tier.name, is_durable=True)
                if (held.run, tier.name) in self._outages:
                    self._outages.remove((held.run, tier.name))
                    self._warn(held.run, f"{tier.url} answers again")
                seconds = time.monotonic() - started
                self._tell(event="persisted", step=held.info.step, tier=tier.name, url=url, seconds=seconds)
                self._tell_trainers(held, Outcome(held.info.id, tier.name, path=path))
            else:
                again = tier.name in held.failed
                self._tell(
                    event="failed", step=held.info.step, tier=tier.name, url=url, error=error, again=again
                )
                held.failed.add(tier.name)
                self._outages.discard((held.run, tier.name))
                self._note_end(held, tier.name, is_durable=False)
                self._tell_trainers(held, Outcome(held.info.id, tier.name, error, path))

        total = sum(len(pack.content) for pack in packs)
        task = Task(
            tier.name,
            held.info.step,
            url,
            work,
            lambda error: self._later(lambda: note(error)),
            Progress(total),
        )
        return task

    def _note_outage(self, held: HeldSnapshot, tier: Tier, error: OutOfReachError) -> None:
        if held.tasks and (held.run, tier.name) not in self._outages:
            self._outages.add((held.run, tier.name))
            text = "is out of reach: what is saved stays in memory until it answers"
            self._warn(held.run, f"{tier.url} {text}: {error}")

    def _warn(self, run: str, text: str) -> None:
        """A warning for the users of a run."""
        _log.warning("%s", text)
        for client in self._clients:
            if client.run == run:
                self._send(client, Note(text))

    def _note_end(self, held: HeldSnapshot, tier: str, *, is_durable: bool) -> None:
        known = self._ends.get((held.run, tier))
        if known is None or known.order <= held.order:
            self._ends[held.run, tier] = _End(held.order, is_durable)

    def _root(self, tier: Tier) -> Storage:
        """The tier's storage. Opening may import a good deal, so it is for the threads that persist."""
        key = msgspec.msgpack.encode((tier.url, tier.options))
        with self._opening:
            if key not in self._roots:
                self._roots[key] = self._open(tier.url, tier.options or None)
            return self._roots[key]

    def _report_lost(self, lost: HeldSnapshot, reason: str) -> None:
        """Tell the ranks that have staged their part; and, in the storage, whoever waits for it there."""
        tiers = [_client_of(lost).tiers[name] for name in next(iter(lost.parts.values())).stage.tiers]
        for name in ("memory", *(tier.name for tier in tiers)):
            self._tell_trainers(lost, Outcome(lost.info.id, name, reason))

        if lost.info.world_size > lost.local_ranks:
            self._report_missing_part(
                _client_of(lost), tiers, lost.info.path, list(lost.parts), lost.info.id, reason
            )

    def _report_unstaged(self, client: _Client, reason: str) -> None:
        """Tell whoever waits in the storage for the part that a trainer was writing."""
        begun, client.begun = client.begun, None
        if begun is not None:
            tiers = [tier for tier in client.tiers.values() if tier.name in begun.tiers]
            self._report_missing_part(client, tiers, begun.info.path, [begun.rank], begun.info.id, reason)

    def _report_missing_part(
        self,
        client: _Client,
        tiers: Sequence[Tier],
        path: str,
        ranks: list[int],
        save_id: str,
        reason: str,
    ) -> None:
        """Report in the storage that these ranks' parts will not come. This process does not end before that."""
        run, timeout = client.run, client.commit_timeout
        last = list(client.tiers)[-1]

        def report(tier: Tier) -> None:
            own = "" if tier.name == last else tier.name
            try:
                place = self._attempts.wait_path(run, path, own, timeout, lambda: False)
                report_lost(self._root(tier).at(place), ranks, save_id, reason)
            except Exception as error:
                _log.warning("nobody is told that a part of %s/%s will not come: %s", tier.url, path, error)
            finally:
                self._later(done)

        def done() -> None:
            self._tasks -= 1

        for tier in tiers:
            self._tasks += 1
            threading.Thread(target=report, args=(tier,), daemon=True).start()

    def _tell_trainers(self, held: HeldSnapshot, outcome: Outcome) -> None:
        for part in held.parts.values():
            self._send(_client(part.trainer), outcome)

    def _usable(self, run: str) -> list[Snapshot]:
        """The run's whole snapshots that no trainer may write into."""
        return [
            Snapshot(held.info.at(self._attempts.path(run, held.info.path)), sorted(held.parts))
            for held in self._shelf.whole(run)
            if not held.is_at_risk
        ]

    def _attach(self, client: _Client, save_id: str) -> None:
        """Hand over what a snapshot is, and its packs' memory, a number of packs at a time."""
        held = self._shelf.snapshots.get(save_id)
        if held is None or held.run != client.run or not held.is_whole or held.is_at_risk:
            self._send(client, Attached([], []))
            return
        held.readers.add(client)
        contents = _sealed(msgspec.msgpack.encode(_contents(held)))
        try:
            parts = [held.parts[rank] for rank in sorted(held.parts)]
            for start in range(0, len(parts), _PACKS_AT_ONCE):
                batch = parts[start : start + _PACKS_AT_ONCE]
                answer = Attached(
                    [part.stage.rank for part in batch],
                    [part.plan.size for part in batch],
                    more=start + len(batch) < len(parts),
                )
                descriptors = [part.buffer.descriptor for part in batch]
                self._send(client, answer, [contents, *descriptors])
        finally:
            os.close(contents)


def _number(client: _Client) -> int:
    """The number of the plan that a trainer goes by."""
    return client.plan.number if client.plan else 0


def _client(trainer: Trainer) -> _Client:
    assert isinstance(trainer, _Client)
    return trainer


def _client_of(held: HeldSnapshot) -> _Client:
    """Who says where a save is to be persisted: all of its ranks say the same."""
    return _client(next(iter(held.parts.values())).trainer)


def _staged_pack(part: Part) -> StagedPack:
    return StagedPack(
        part.stage.rank,
        memoryview(part.buffer.content)[: part.plan.size],
        part.plan.writes,
        part.values,
        part.checksums,
    )


def _proposal(held: HeldSnapshot, path: str) -> Proposal | None:
    """What rank 0 has said of the save, if it staged here; `path` is where the save lies in its run."""
    if (part := held.parts.get(0)) is None:
        return None
    return Proposal.decode(part.stage.proposal, part.plan.whole).at(path)


def _contents(held: HeldSnapshot) -> Contents:
    first = held.parts.get(0)
    return Contents(
        proposal=first.stage.proposal if first else b"",
        plan=first.plan.encoded if first else b"",
        values={rank: part.stage.values for rank, part in held.parts.items()},
        checksums={rank: p.checksums for rank, p in held.parts.items() if p.checksums is not None},
    )


def _sealed(data: bytes) -> int:
    """A descriptor of memory with this content."""
    descriptor = os.memfd_create("shardckpt", os.MFD_CLOEXEC)
    try:
        with open(os.dup(descriptor), "wb") as file:
            file.write(data)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_dead(client: _Client) -> bool:
    """Whether a trainer has ended, as far as this process can see."""
    if client.pidfd < 0:
        return False
    poll = select.poll()  # `select.select` takes no descriptors from 1024 on
    poll.register(client.pidfd, select.POLLIN)
    return bool(poll.poll(0))
