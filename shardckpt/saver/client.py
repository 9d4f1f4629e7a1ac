"""A trainer's end of the saver: buffers to stage into, outcomes of saves, and snapshots to restore from."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shardckpt.environment import is_first_on_node
from shardckpt.errors import SaverError
from shardckpt.huge_pages import map_shared
from shardckpt.run.tiers import MEMORY, Tier
from shardckpt.saver.client_connection import ClientConnection
from shardckpt.saver.granted_buffers import GrantedBuffers, Memory
from shardckpt.saver.protocol import (
    Abandon,
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
    Hello,
    Note,
    Outcome,
    Reserved,
    Snapshot,
    Stage,
    Start,
)
from shardckpt.saver.silence import Silence
from shardckpt.saver.startup import START_TIMEOUT, connect_to_saver

__all__ = ["AttachedSnapshot", "SaverClient"]

_log = logging.getLogger("shardckpt")

_INTERVAL = 2.0  # seconds without a message after which a saver is asked whether it answers


@dataclass(frozen=True)
class AttachedSnapshot:
    """A snapshot in this node's memory.

    Attributes:
        contents: what this node knows of it beside the packs.
        packs: this node's packs by rank.
    """

    contents: Contents
    packs: Mapping[int, memoryview]


class SaverClient:
    """This trainer's connection to its node's saver. Any method raises SaverError once the saver is gone.

    Methods are for one thread; outcomes and claims are reported by another.

    Args:
        run: the run's URL.
        tiers: its durable tiers; the last one is the run itself.
        snapshots: how many snapshots may be held in memory.
        commit_timeout: seconds without any progress of another rank after which a save has failed.
        linger: seconds that a saver which is started here waits for a restarted job.
        outage_timeout: seconds that a save waits for a storage that is out of reach, `commit_timeout` at most.
        patience: seconds without an answer after which the saver is given up, now or later: methods raise
            SaverSilentError then.
        interval: seconds without a message after which the saver is asked for one.

    Raises SaverError if there is no saver, and none can be started.
    """

    def __init__(
        self,
        run: str,
        tiers: Sequence[Tier],
        snapshots: int,
        commit_timeout: float,
        *,
        linger: float,
        outage_timeout: float = math.inf,
        patience: float = START_TIMEOUT,
        interval: float = _INTERVAL,
    ) -> None:
        self._changed = threading.Condition()
        self._outcomes: dict[tuple[str, str], Callable[[Outcome], object]] = {}  # by save and tier
        self._claims: dict[str, Claimed] = {}  # by attempt
        self._on_claimed: Callable[[Claimed], object] = lambda _claimed: None
        self._is_lost = False
        hello = Hello(run, list(tiers), snapshots, commit_timeout, outage_timeout)
        channel, welcome = connect_to_saver(hello, linger, patience)
        self.id = welcome.saver
        """Equal for two ranks only if they have the same saver."""
        self.newest = welcome.newest
        """The number of the run's newest attempt that the saver knew of when this trainer came."""
        silence = Silence(patience, min(interval, patience))
        self._connection = ClientConnection(channel, welcome.pid, silence, self._on_message, self._on_lost)
        self._buffers = GrantedBuffers(self._connection.send)
        self._connection.open()

    @property
    def is_lost(self) -> bool:
        """True once the saver is gone, and with it all that was in memory only."""
        return self._connection.is_lost

    @property
    def loss(self) -> SaverError:
        """What to raise once the saver is lost."""
        return self._connection.loss

    def limit_silence(self, seconds: float) -> None:
        """Give the saver up if it has not answered for so many seconds, if that is sooner than before."""
        self._connection.limit_silence(seconds)

    def probe(self, seconds: float) -> bool:
        """True if the saver answers within so many seconds. One that does not is given up."""
        return self._connection.probe(seconds)

    def close(self) -> None:
        """Say goodbye: this trainer is done, and will not be restarted."""
        self._connection.close(Bye())

    def disconnect(self) -> None:
        """End the connection without a goodbye, as this trainer's death would."""
        self._connection.shut()

    # -- the attempt

    def start(self, start: Start, on_claimed: Callable[[Claimed], object]) -> None:
        """Name the attempt of the next saves. `on_claimed` is called, by another thread, with what becomes of
        the claim."""
        with self._changed:
            self._on_claimed = on_claimed
        self._connection.send(start)

    def wait_claimed(self, attempt: str, patience: float, *, is_urgent: bool) -> Claimed | None:
        """Wait until an attempt is claimed, or cannot be. Returns None after `patience` seconds.

        `is_urgent`: return also as soon as the storage has been found to be out of reach.
        """

        def is_known() -> bool:
            claim = self._claims.get(attempt)
            return self._is_lost or (
                claim is not None
                and bool(claim.name or (claim.error and (is_urgent or not claim.is_passing)))
            )

        with self._changed:
            if not self._changed.wait_for(is_known, patience):
                return None
            if attempt not in self._claims:
                raise self.loss
            return self._claims[attempt]

    # -- saving

    def plan(self, plan: ChunkTable, count: int) -> None:
        """Say where the chunks of the next packs lie, and ask for `count` buffers for them.

        The buffers of the plan before are given back.
        """
        self._buffers.plan(plan, count)

    @property
    def is_full(self) -> bool:
        """True if `take` would wait for earlier saves, rather than for new memory, or not at all."""
        return self._buffers.is_full

    @property
    def has_buffer(self) -> bool:
        """True if `take` would not wait."""
        return self._buffers.has_any

    def take(self) -> Memory:
        """A buffer to stage a pack in. Waits until there is one, as long as the saver answers.

        Raises MemoryError if there is no memory for it; the next call tries again.
        """
        return self._buffers.take()

    def put_back(self, memory: Memory) -> None:
        """Return a buffer that was taken, and will not be staged: `take` gives it out again."""
        self._buffers.put_back(memory)

    def begin(self, begin: Begin) -> None:
        """Announce that a buffer is about to be written to."""
        self._connection.send(begin)

    def stage(self, stage: Stage, done: Callable[[Outcome], object]) -> None:
        """Hand a staged pack over, and ask for the next buffer. From here on the saver is responsible for it.

        `done` is called, by another thread, for "memory" and for each tier; with an error if the saver is lost.
        """
        tiers = (MEMORY, *stage.tiers)
        with self._changed:
            is_lost = self._is_lost
            if not is_lost:
                self._outcomes.update({(stage.info.id, tier): done for tier in tiers})
        if is_lost:
            for tier in tiers:
                done(Outcome(stage.info.id, tier, str(self.loss)))
            return
        with contextlib.suppress(SaverError):  # which `done` is told
            self._connection.send(stage)  # the kernel keeps it for the saver, should this process end now
            self._buffers.ask_after_use()

    def abandon(self, save_id: str, error: BaseException) -> None:
        """Announce that this rank will not stage its part of a save."""
        with contextlib.suppress(SaverError):
            self._connection.send(Abandon(save_id, f"{type(error).__name__}: {error}"))

    # -- restoring

    def snapshots(self) -> list[Snapshot]:
        """The run's snapshots that this node holds parts of."""
        return self._connection.ask(Find(), Found)[0].snapshots

    def attach(self, save_id: str) -> AttachedSnapshot | None:
        """Map a snapshot's packs, which stay until `detach`. None if the snapshot is gone."""
        packs: dict[int, memoryview] = {}
        contents: Contents | None = None
        answer, descriptors = self._connection.ask(Attach(save_id), Attached)
        while True:
            if not descriptors:
                return None
            first, *others = descriptors
            with os.fdopen(first, "rb") as file:
                file.seek(0)
                contents = contents or msgspec.msgpack.decode(file.read(), type=Contents)
            for rank, size, descriptor in zip(answer.ranks, answer.sizes, others, strict=True):
                packs[rank] = _mapped(descriptor, size)
            if not answer.more:
                return AttachedSnapshot(contents, packs)
            answer, descriptors = self._connection.next_answer(Attached)

    def detach(self) -> None:
        """Announce that attached packs are not read any more."""
        with contextlib.suppress(SaverError):
            self._connection.send(Detach())

    # -- from the saver, in another thread

    def _on_message(self, message: Any, descriptors: list[int]) -> None:
        match message:
            case Reserved():
                self._buffers.on_reserved(message, descriptors)
            case GiveBack():
                self._buffers.on_give_back(message)
            case Note():
                if is_first_on_node():
                    _log.warning("%s", message.text)
            case Outcome():
                with self._changed:
                    done = self._outcomes.pop((message.id, message.tier), None)
                if done is not None:
                    done(message)
            case Claimed():
                with self._changed:
                    if message.name or message.error:
                        self._claims[message.id] = message
                    on_claimed = self._on_claimed
                    self._changed.notify_all()
                on_claimed(message)
            case _:
                pass  # Pong

    def _on_lost(self) -> None:
        """Tell everyone who waits for the saver that it is gone."""
        self._buffers.lose(lambda: self.loss)
        with self._changed:
            self._is_lost = True
            outcomes, self._outcomes = self._outcomes, {}
            self._changed.notify_all()
        for (save_id, tier), done in outcomes.items():
            done(Outcome(save_id, tier, str(self.loss)))


def _mapped(descriptor: int, size: int) -> memoryview:
    """Map the memory behind a descriptor for reading, and close the descriptor."""
    try:
        return map_shared(descriptor, size, is_writable=False)
    finally:
        os.close(descriptor)
