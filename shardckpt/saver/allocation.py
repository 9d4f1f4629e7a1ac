"""Memory for snapshots: trainers get the buffers that they ask for, and give spare ones back when it is short."""

from __future__ import annotations

import logging
import threading
import time

from shardckpt.huge_pages import map_shared
from shardckpt.saver.buffer_pool import BufferPool
from shardckpt.saver.buffers import Pressure, SnapshotMemory, rounded
from shardckpt.saver.checks import RequestError
from shardckpt.saver.connections import Client, Connections
from shardckpt.saver.loop import EventLoop
from shardckpt.saver.protocol import GiveBack, Reserved
from shardckpt.saver.report import Report

__all__ = ["Allocation"]

_log = logging.getLogger("shardckpt.saver")

_MOST_REQUESTS = 1024  # for buffers, of one trainer


class Allocation:
    """Gives buffers to trainers as the rules of the pool say, and allocates new ones in the background."""

    def __init__(
        self,
        pool: BufferPool,
        memory: SnapshotMemory,
        loop: EventLoop,
        connections: Connections,
        report: Report,
    ) -> None:
        self._pool = pool
        self._memory = memory
        self._loop = loop
        self._connections = connections
        self._report = report
        self._looked = 0.0
        self._shortages = 0  # 1 after the first, and one more for each after which the kernel has killed

    # -- requests

    def snapshots(self, wanted: int) -> int:
        """How many snapshots a trainer that asks for `wanted` may hold: one, once memory has been short."""
        return 1 if self._shortages else wanted

    def replan(self, client: Client) -> None:
        """The packs have another layout: forget its requests, take its buffers back."""
        client.requests.clear()
        client.asked_back.clear()
        client.is_told = False
        self._pool.take_back(client)

    def request(self, client: Client, size: int) -> None:
        """The trainer asks for a buffer of at least `size` bytes. Raises RequestError if it asks too often."""
        if len(client.requests) == _MOST_REQUESTS:
            raise RequestError("it asks for too many buffers")
        client.wanted = rounded(size)
        client.requests.append(client.wanted)

    def begin(self, client: Client, number: int, save_id: str) -> None:
        """The trainer is about to write into a buffer. Raises LookupError if that was not granted."""
        self._pool.begin(client, number, save_id)
        client.asked_back.discard(number)

    def given_back(self, client: Client, number: int) -> None:
        """The trainer does without a buffer and waits for another. Raises LookupError if it has none such."""
        self._pool.give_back(client, number)
        client.asked_back.discard(number)
        client.requests.append(client.wanted)

    def tidy(self) -> None:
        """Give out what buffers there are, and free what nobody will ask for."""
        if self._shortages:
            self._relieve(may_drop_newest=self._shortages > 1)
        for client in self._connections.clients:
            self._serve(client)
            self._take_surplus(client)
        for run in self._pool.runs:
            clients = self._connections.of_run(run)
            served = bool(clients) and all(self._has_its_buffers(client) for client in clients)
            self._pool.tidy(run, everyone_is_served=served)

    def _has_its_buffers(self, client: Client) -> bool:
        return len(self._pool.owned(client)) >= client.snapshots and not client.allocating

    def _serve(self, client: Client) -> None:
        while client.requests:
            size = client.requests[0]
            if (buffer := self._pool.grant(client, size)) is not None:
                client.requests.popleft()
                answer = Reserved(client.plan_number, buffer.number, buffer.size)
                self._connections.send(client, answer, [buffer.descriptor])
            elif client.allocating:
                return
            elif self._pool.may_allocate(client, size) and self._can_afford(client):
                self._allocate(client, size)
            else:
                if not client.is_told and not self._pool.owned(client):
                    client.is_told = True
                    self._connections.send(client, Reserved(client.plan_number))
                return

    def _take_surplus(self, client: Client) -> None:
        """Take back what the trainer has beyond its number of snapshots."""
        for buffer in self._pool.surplus(client):
            if not buffer.is_granted:
                self._pool.discard(buffer)
            elif buffer.number not in client.asked_back:
                client.asked_back.add(buffer.number)
                self._connections.send(client, GiveBack(buffer.number))

    # -- new memory

    def _can_afford(self, client: Client) -> bool:
        """True if there is memory for one more buffer for each of the run's trainers, as a snapshot needs.

        Whether there is memory for a first buffer is found out by allocating it.
        """
        own = len(self._pool.owned(client))
        if own == 0 or not (reason := self._memory.lacking(self._pool.lacking(client.run, own + 1))):
            return True
        self._keep_fewer(client.run, own, reason)
        return False

    def _allocate(self, client: Client, size: int) -> None:
        """Get new memory, in another thread: the kernel takes a second per GiB."""
        self._pool.make_room(client.run, size)
        client.allocating = size

        def work() -> None:
            try:
                descriptor, found = self._memory.allocate(size)
                content = map_shared(descriptor, found)
            except Exception as error:  # whatever it is, training goes on without
                reason = f"no memory for a snapshot of {size} bytes: {error}"
                self._loop.call(lambda: refuse(reason))
            else:
                self._loop.call(lambda: take(descriptor, found, content))

        def refuse(reason: str) -> None:
            client.allocating = 0
            if own := len(self._pool.owned(client)):
                self._keep_fewer(client.run, own, reason)
            elif not self._relieve(may_drop_newest=True):  # else it is tried again
                client.requests.clear()
                client.wanted = 0
                self._connections.send(client, Reserved(client.plan_number, error=reason))

        def take(descriptor: int, found: int, content: memoryview) -> None:
            client.allocating = 0
            self._pool.add(client, descriptor, found, content)

        threading.Thread(target=work, daemon=True).start()  # not waited for at the end

    # -- shortage

    @property
    def patience(self) -> float | None:
        """Seconds until `watch_memory` has something to do; None: there are no buffers."""
        return self._memory.look_every if self._pool.buffers else None

    def watch_memory(self) -> None:
        """Keep no spare snapshots once memory has run short.

        If the kernel has killed although there were none, drop even the last snapshot of trainers that are gone,
        if it is durable: those that come after them need the memory more.
        """
        now = time.monotonic()
        if not self._pool.buffers or now < self._looked + self._memory.look_every:
            return
        self._looked = now
        match self._memory.pressure(self._pool.nbytes):
            case Pressure.KILLED:
                self._shortages += 1
                reason = "the kernel has killed for want of memory"
            case Pressure.SHORT:
                if self._shortages:
                    self._relieve(may_drop_newest=True)
                self._shortages = max(1, self._shortages)
                reason = "memory is short"
            case Pressure.NONE:
                return
        for run in {client.run for client in self._connections.clients}:
            self._keep_fewer(run, 1, reason)

    def _keep_fewer(self, run: str, count: int, reason: str) -> None:
        """Hold no more than `count` snapshots of a run from now on."""
        clients = [client for client in self._connections.of_run(run) if client.snapshots > count]
        for client in clients:
            client.snapshots = count
        if clients:
            snapshots = "one snapshot" if count == 1 else f"{count} snapshots"
            self._report.warn(clients, f"holding {snapshots} only in memory: {reason}")

    def _relieve(self, *, may_drop_newest: bool) -> bool:
        """Free what nobody needs. True if there was any."""
        if freed := self._pool.relieve(may_drop_newest=may_drop_newest):
            _log.warning(
                "memory is short: %.1f GiB of snapshots that nobody needs are given back", freed / (1 << 30)
            )
        return freed > 0
