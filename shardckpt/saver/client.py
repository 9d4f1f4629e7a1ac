"""A trainer's end: buffers to stage into, word of what became of saves, and snapshots to restore from."""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from shardckpt.environment import is_first_on_node, saver_address, subprocess_environment
from shardckpt.errors import SaverError, SaverSilentError
from shardckpt.progress import alive
from shardckpt.run.tiers import Tier
from shardckpt.saver.buffers import map_buffer
from shardckpt.saver.channel import Channel, address_of, connect
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
    Request,
    Reserve,
    Reserved,
    Snapshot,
    Stage,
    Start,
    Welcome,
)
from shardckpt.saver.silence import Silence, describe_process

__all__ = ["AttachedSnapshot", "Memory", "SaverClient"]

_log = logging.getLogger("shardckpt")

_PATIENCE = 30.0  # seconds for a saver to start and to answer
_INTERVAL = 2.0  # seconds without a message after which a saver is asked whether it answers
_PAUSE = 0.02
_BEAT = 1.0  # seconds between two signs of life of a trainer that waits
_GONE = "the saver of this node is gone"
_LOST = (
    "and with it the snapshots that were in memory only; checkpoints are untouched, and the next save finds a "
    "new saver"
)

A = TypeVar("A", bound=Answer)


@dataclass(frozen=True, eq=False)
class Memory:
    """A snapshot buffer, mapped into this process."""

    number: int
    content: mmap.mmap


@dataclass(frozen=True)
class AttachedSnapshot:
    """A snapshot's packs in this node's memory, by rank, and what else this node knows of it."""

    contents: Contents
    packs: Mapping[int, memoryview]


class SaverClient:
    """A connection to this node's saver. Raises SaverError from any method once the saver is gone.

    Methods are for one thread; word of outcomes comes from another.
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
        patience: float | None = None,
        interval: float = _INTERVAL,
    ) -> None:
        """Connect to the saver of LAUNCH_SAVER; without a launcher, to the run's own, started if need be.

        One that answers nothing for `patience` seconds, now or later, is given up: methods raise
        SaverSilentError then. It is asked after each `interval` without a message. Raises SaverError if there is
        none, and none can be started.
        """
        patience = _PATIENCE if patience is None else patience
        self._patience = patience
        self._silence = Silence(patience, min(interval, patience))
        self._loss: Callable[[], SaverError] = lambda: SaverError(_GONE)
        self._changed = threading.Condition()
        self._granted: deque[Memory] = deque()
        self._mapped: dict[int, mmap.mmap] = {}
        self._plan = ChunkTable(0, [], [], [], 0, b"")
        self._unasked = 0  # buffers still to be asked for
        self._is_full = False
        self._refused = ""
        self._is_lost = False
        self._heard = 0  # messages
        self._is_closed = False
        self._answers: queue.SimpleQueue[tuple[Any, list[int]]] = queue.SimpleQueue()
        self._waiting: dict[tuple[str, str], Callable[[Outcome], object]] = {}
        self._sending = threading.Lock()
        self._claimed: dict[str, Claimed] = {}
        self._on_claimed: Callable[[Claimed], object] = lambda _claimed: None
        named = saver_address()
        address = named or address_of(run)
        hello = Hello(run, list(tiers), snapshots, commit_timeout, outage_timeout)
        self._channel, welcome = _greeted(address, hello, linger, patience, may_start=named is None)
        self._pid = welcome.pid
        self.id = welcome.saver
        """Equal for two ranks only if they have the same saver."""
        self.newest = welcome.newest
        """The number of the run's newest attempt that the saver knew of when this trainer came."""
        threading.Thread(target=self._listen, name="shardckpt-saver", daemon=True).start()

    @property
    def is_lost(self) -> bool:
        """Whether the saver is gone, and with it all that was in memory only."""
        return self._is_lost

    @property
    def loss(self) -> SaverError:
        """What to raise once the saver is lost."""
        return self._loss()

    def limit_silence(self, seconds: float) -> None:
        """Give the saver up if it has not answered for so many seconds, if that is sooner than before."""
        self._silence.limit(seconds)

    def probe(self, seconds: float) -> bool:
        """Whether the saver answers within so many seconds. One that does not is given up."""
        with contextlib.suppress(SaverError):
            with self._changed:
                before = self._heard
            if self._channel.is_writable:
                self._send(Ping())
            with self._changed:
                self._changed.wait_for(lambda: self._is_lost or self._heard != before, seconds)
                is_silent = self._heard == before and not self._is_lost
            if is_silent:
                self._give_up(seconds)
        return not self._is_lost

    # -- the attempt

    def start(self, start: Start, on_claimed: Callable[[Claimed], object]) -> None:
        """Say which attempt the next saves are of. `on_claimed` is called, by another thread, with what the
        saver tells of it."""
        with self._changed:
            self._on_claimed = on_claimed
        self._send(start)

    def wait_claimed(self, attempt: str, patience: float, *, is_urgent: bool) -> Claimed | None:
        """What is known of this attempt, once that is where it is or why it is nowhere; None after `patience`
        seconds.

        `is_urgent`: also as soon as the storage has been found to be out of reach.
        """

        def is_known() -> bool:
            told = self._claimed.get(attempt)
            return self._is_lost or (
                told is not None and bool(told.name or (told.error and (is_urgent or not told.is_passing)))
            )

        with self._changed:
            if not self._changed.wait_for(is_known, patience):
                return None
            if attempt not in self._claimed:
                raise self.loss
            return self._claimed[attempt]

    # -- saving

    def plan(self, plan: ChunkTable, count: int) -> None:
        """Say where the chunks of the next packs lie, and ask for `count` buffers for them.

        Buffers of the plan before are given back.
        """
        with self._changed:
            self._plan = plan
            self._granted.clear()
            self._mapped.clear()
            self._refused = ""
            self._is_full = False
            self._unasked = count - 1  # every rank's first buffer comes before any second
        self._send(plan)
        self._send(Reserve(plan.size))

    @property
    def is_full(self) -> bool:
        """Whether `take` would wait for earlier saves, rather than for new memory, or not at all."""
        with self._changed:
            return not self._granted and (bool(self._mapped) or self._is_full)

    def take(self) -> Memory:
        """A buffer to stage a pack in. Waits until there is one, as long as the saver answers.

        Raises MemoryError if there is no memory for it; the next call tries again.
        """
        with self._changed:
            while not self._changed.wait_for(
                lambda: self._granted or self._is_lost or self._refused, _BEAT
            ):
                alive()  # so is the saver, or it would be given up
            if self._is_lost:
                raise self.loss
            if self._granted:
                return self._granted.popleft()
            refused, self._refused = self._refused, ""
            size = self._plan.size
        self._send(Reserve(size))
        raise MemoryError(refused)

    def begin(self, begin: Begin) -> None:
        """Say that a buffer is about to be written to."""
        self._send(begin)

    def stage(self, stage: Stage, done: Callable[[Outcome], object]) -> None:
        """Hand a staged pack over, and ask for the next buffer. From here on the saver answers for it.

        `done` is called, by another thread, for "memory" and for each tier; with an error if the saver is lost.
        """
        tiers = ("memory", *stage.tiers)
        with self._changed:
            is_lost, size = self._is_lost, self._plan.size
            if not is_lost:
                self._waiting.update({(stage.info.id, tier): done for tier in tiers})
        if is_lost:
            for tier in tiers:
                done(Outcome(stage.info.id, tier, str(self.loss)))
            return
        with contextlib.suppress(SaverError):  # which is told to those that wait
            self._send(stage)  # the kernel keeps it for the saver, should this process end now
            self._send(Reserve(size))

    def abandon(self, save_id: str, error: BaseException) -> None:
        """Say that this rank will not stage its part of a save."""
        with contextlib.suppress(SaverError):
            self._send(Abandon(save_id, f"{type(error).__name__}: {error}"))

    # -- restoring

    def snapshots(self) -> list[Snapshot]:
        """The run's snapshots that this node holds parts of."""
        return self._ask(Find(), Found)[0].snapshots

    def recall(self, save_id: str) -> AttachedSnapshot | None:
        """Map a snapshot's packs, which stay until `release`. None if it is not there any more."""
        packs: dict[int, memoryview] = {}
        contents: Contents | None = None
        answer, descriptors = self._ask(Attach(save_id), Attached)
        while True:
            if not descriptors:
                return None
            first, *others = descriptors
            with os.fdopen(first, "rb") as file:
                file.seek(0)
                contents = contents or msgspec.msgpack.decode(file.read(), type=Contents)
            for rank, size, descriptor in zip(answer.ranks, answer.sizes, others, strict=True):
                packs[rank] = _readable(descriptor, size)
            if not answer.more:
                return AttachedSnapshot(contents, packs)
            answer, descriptors = self._next(Attached)

    def release(self) -> None:
        """Say that recalled packs are not read any more."""
        with contextlib.suppress(SaverError):
            self._send(Detach())

    def close(self) -> None:
        """Say goodbye: this trainer is done, and will not be restarted."""
        self._is_closed = True
        self._loss = lambda: SaverSilentError("the saver was not waited for any longer")
        with contextlib.suppress(SaverError):
            self._send(Bye())
        self._channel.shut()

    # -- details

    def _listen(self) -> None:
        """Take what the saver says, until its end."""
        try:
            while (received := self._receive()) is not None:
                self._take_in(*received)
        except (OSError, EOFError, ValueError) as error:
            _log.warning("the connection to the saver is lost: %s", error)
        finally:
            self._lose()
            with self._sending:
                self._channel.close()

    def _receive(self) -> tuple[Any, list[int]] | None:
        """The saver's next message; None when it is gone, or given up."""
        while (received := self._channel.next_message()) is None:
            if not self._channel.wait_readable(self._silence.interval):
                if self._silence.passed():
                    self._give_up(self._silence.seconds)
                    return None
                if not self._silence.is_asked and self._channel.is_writable:
                    self._send(Ping())
                self._silence.is_asked = True
            elif not self._channel.read_some():
                return None
        self._silence.heard()
        with self._changed:
            self._heard += 1
            self._changed.notify_all()
        return received

    def _take_in(self, message: Any, descriptors: list[int]) -> None:
        if isinstance(message, Reserved):
            self._take_buffer(message, descriptors)
        elif isinstance(message, GiveBack):
            self._give_back(message.buffer)
        elif isinstance(message, Note):
            if is_first_on_node():
                _log.warning("%s", message.text)
        elif isinstance(message, Pong):
            pass
        elif isinstance(message, Outcome):
            with self._changed:
                done = self._waiting.pop((message.id, message.tier), None)
            if done is not None:
                done(message)
        elif isinstance(message, Claimed):
            with self._changed:
                if message.name or message.error:
                    self._claimed[message.id] = message
                tell = self._on_claimed
                self._changed.notify_all()
            tell(message)
        else:
            self._answers.put((message, descriptors))

    def _take_buffer(self, reserved: Reserved, descriptors: list[int]) -> None:
        with self._changed:
            is_current = reserved.plan == self._plan.number
            mapping = self._mapped.get(reserved.buffer)
        if mapping is None and is_current and descriptors:
            mapping = map_buffer(descriptors[0], reserved.size)
        for descriptor in descriptors:
            os.close(descriptor)
        with self._changed:
            if reserved.plan != self._plan.number:
                return
            is_next = False
            if mapping is None:
                self._refused = reserved.error
                self._is_full = not reserved.error
            else:
                self._mapped[reserved.buffer] = mapping
                self._granted.append(Memory(reserved.buffer, mapping))
                is_next = self._unasked > 0
                self._unasked -= is_next
            self._changed.notify_all()
        if is_next:
            with contextlib.suppress(SaverError):  # which is told to those that wait
                self._send(Reserve(self._plan.size))

    def _give_back(self, number: int) -> None:
        """Do without a buffer, unless it is being written to."""
        with self._changed:
            kept = [memory for memory in self._granted if memory.number != number]
            if len(kept) == len(self._granted):
                return
            self._granted = deque(kept)
            self._mapped.pop(number, None)
        with contextlib.suppress(SaverError):  # which is told to those that wait
            self._send(GivenBack(number))

    def _lose(self) -> None:
        """The saver is gone: what waits for it has failed."""
        with self._changed:
            is_news = not self._is_lost and not self._is_closed
            self._is_lost = True
            self._granted.clear()
            self._mapped.clear()
            waiting, self._waiting = self._waiting, {}
            self._changed.notify_all()
        self._answers.put((None, []))
        if is_news and is_first_on_node():
            loss = self.loss
            what = "training goes on without it" if isinstance(loss, SaverSilentError) else _LOST
            _log.warning("%s, %s", loss, what)
        for (save_id, tier), done in waiting.items():
            done(Outcome(save_id, tier, str(self.loss)))

    def _send(self, request: Request) -> None:
        try:
            with self._sending:
                self._channel.send(request)
        except BlockingIOError as error:  # it has not taken in anything for so long
            self._give_up(self._patience)
            raise self.loss from error
        except OSError as error:
            self._give_up()
            loss = self.loss
            raise loss if isinstance(loss, SaverSilentError) else SaverError(f"{_GONE}: {error}") from error

    def _give_up(self, silent: float = 0.0) -> None:
        """Go on without this saver from now on, whatever it still does, if it is `silent` for so many seconds."""
        if silent and not self._is_lost:
            text = (
                f"the saver of this node ({describe_process(self._pid)}) has not answered for {silent:g} s"
            )
            self._loss = lambda: SaverSilentError(text)
        self._channel.shut()
        self._lose()

    def _ask(self, request: Request, kind: type[A]) -> tuple[A, list[int]]:
        self._send(request)
        return self._next(kind)

    def _next(self, kind: type[A]) -> tuple[A, list[int]]:
        try:
            answer, descriptors = self._answers.get(timeout=self._patience)
        except queue.Empty:
            self._give_up(self._patience)
            raise self.loss from None
        if not isinstance(answer, kind):
            raise self.loss if answer is None else SaverError(f"the saver answered {type(answer).__name__}")
        return answer, descriptors


def _readable(descriptor: int, size: int) -> memoryview:
    """The memory behind a descriptor, mapped for reading; the descriptor is closed."""
    try:
        return (
            memoryview(mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ))
            if size
            else memoryview(b"")
        )
    finally:
        os.close(descriptor)


def _greeted(
    address: str, hello: Hello, linger: float, patience: float, *, may_start: bool
) -> tuple[Channel, Welcome]:
    """A connection to the saver at `address`, which is started if there is none, and if it may be."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        connection = _connected(address, linger, deadline, patience, may_start=may_start)
        channel = Channel(connection)
        try:
            channel.send(hello)
            answer = _answer(channel, patience)
        except TimeoutError as error:
            channel.close()
            raise SaverSilentError(
                f"the saver at {address!r} has not answered for {patience:g} s"
            ) from error
        except (OSError, EOFError) as error:
            channel.close()
            raise SaverError(f"the saver at {address!r} does not answer: {error}") from error
        if answer is not None:
            welcome = answer[0]
            assert isinstance(welcome, Welcome)
            return channel, welcome
        channel.close()  # it was about to end: the next one will be a new one
        if time.monotonic() > deadline:
            raise SaverError(f"the saver at {address!r} ends at once")


def _answer(channel: Channel, patience: float) -> tuple[Any, list[int]] | None:
    """The first message; None if the other end has gone. Raises TimeoutError if none comes in time."""
    deadline = time.monotonic() + patience
    while (message := channel.next_message()) is None:
        if not channel.wait_readable(min(_BEAT, patience)):
            alive()
            if time.monotonic() > deadline:
                raise TimeoutError
        elif not channel.read_some():
            return None
    return message


def _connected(
    address: str, linger: float, deadline: float, patience: float, *, may_start: bool
) -> socket.socket:
    while True:
        try:
            return connect(address, patience)
        except PermissionError as error:
            raise SaverError(str(error)) from error
        except OSError as error:
            if not may_start or time.monotonic() > deadline:
                raise SaverError(f"no saver answers at {address!r}: {error}") from error
        # The local ranks want one at the same time, so all but the first leave it to that one for a while.
        if is_first_on_node() or time.monotonic() > deadline - _PATIENCE / 2:
            _start(address, linger)
        else:
            time.sleep(_PAUSE)


def _start(address: str, linger: float) -> None:
    """Start a saver that outlives this process. Returns when it listens, or another one does."""
    command = [sys.executable, "-P", "-m", "shardckpt.saver", "--address", address, "--linger", str(linger)]
    try:
        # Not this process's streams: whoever waits for their end would wait for the saver.
        subprocess.run(
            command,
            env=subprocess_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SaverError(f"the saver could not be started: {error}") from error
