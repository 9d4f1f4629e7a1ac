"""The member itself: obeys its agent, and tells it what becomes of its team."""

from __future__ import annotations

import importlib.metadata
import math
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousError

from launcher.formatting import count
from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.agent_link import Link
from launcher.rendezvous.member.compatibility import Compatibility, check_hellos
from launcher.rendezvous.member.connect import bounded, join_patience
from launcher.rendezvous.member.endpoint import is_served, local_address, show, wait_for_name
from launcher.rendezvous.member.gate import OverwrittenError
from launcher.rendezvous.member.generation import Generation
from launcher.rendezvous.member.heartbeat import PERIOD
from launcher.rendezvous.member.meeting import meet
from launcher.rendezvous.member.protocol import Meeting
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.signing import ForgedError
from launcher.rendezvous.member.store_users import StoreUsers
from launcher.rendezvous.member.stores import SignedStore

__all__ = ["Member"]

_GREETING = 10.0  # seconds for all nodes of a generation to say hello; else there is to be another one
_UNREACHABLE = 5.0  # seconds without an answer of the store, after which this node is on its own
_DYING = 1.0  # seconds in which a process that is killed stops listening
_FAREWELL = 2.0  # seconds for each thing that is done when leaving
_LINGER = 10.0  # seconds that a store is served after the job's end
_OTHERS = "others can reach that port: see docs/security.md"
_ASK = 1.0  # seconds between two looks at what the rendezvous knows


class Member:
    """Speaks for one node, from the agent's settings to the end of what other nodes need of it."""

    def __init__(self, link: Link, settings: RendezvousSettings) -> None:
        self._link = link
        self._settings = settings
        self._meeting: Meeting | None = None
        self._presence: StoreUsers | None = None  # at the store that the team speaks through
        self._is_host = False  # of that store
        self._generation: Generation | None = None
        self._number = 0  # of the last join that was ordered
        self._is_spare = False  # this node, as the user was told
        self._has_suspected = False  # that others write to the store
        self._joins: queue.SimpleQueue[tuple[int, Mapping[str, Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the end: one failure is told, and none after the agent has left
        self._is_ending = False
        self._has_answered = threading.Event()  # the store, since the last look
        threading.Thread(target=self._run_joins, daemon=True).start()

    def join(self, number: int, hello: Mapping[str, Any]) -> None:
        """Leave the generation, if there is one, and take part in the next; returns at once."""
        self._number = number
        self._joins.put((number, hello))

    def say(self, number: int, message: dict[str, Any]) -> None:
        """Have the generation hear `message`, if it is still the one that the agent means."""
        if self._generation is not None and number == self._number:
            self._generation.say(message)

    def leave(self, outcome: int | None) -> None:
        """Leave in peace, and return when the others do not need this process any more.

        `outcome` is the exit code of the job, if it has ended with that.
        """
        self._end()
        if self._generation is not None:
            self._generation.flush(_FAREWELL)
            self._try(self._generation.retire)
        if outcome is not None and self._meeting is not None:
            self._try(partial(self._meeting.end_job, outcome))
        self._withdraw()
        self._linger(math.inf if outcome is None else _LINGER)

    def abort(self) -> None:
        """The agent is dead, or has heard of a failure: tell the others, and return when they can do
        without."""
        why = "its launch was killed" if self._end() else "it lost sight of the others"
        if self._generation is not None:
            self._generation.tell_lost(self._generation.rank, why)
            self._generation.flush(_FAREWELL)
            self._generation.stop()
        self._withdraw()
        self._linger(math.inf)

    def _end(self) -> bool:
        """Tell the agent nothing from now on; whether there was anything to end."""
        with self._lock:
            was_ending, self._is_ending = self._is_ending, True
        return not was_ending

    def _fail(self, kind: str, reason: str, outcome: int | None = None) -> None:
        if self._end():
            self._link.tell(event="failed", number=self._number, kind=kind, reason=reason, outcome=outcome)

    def _tell_news(self, text: str, **more: Any) -> None:
        with self._lock:
            if not self._is_ending:
                self._link.tell(event="news", number=self._number, text=text, **more)

    def _lose(self, reason: str) -> None:
        self._fail("lost", reason)
        self._withdraw()  # now, since its agent may be stopped

    def _miss_store(self, error: Exception) -> None:
        """The store is gone, as `error` says in torch's words, which go to the log."""
        if not self._is_ending:
            print(error, file=sys.stderr)
        where = show(self._settings.endpoint)
        if self._is_still_served():
            self._lose(f"the store at {where} refuses what it should not ({_line(error)}); {_OTHERS}")
        else:
            self._lose(f"{self._settings.server} ({where}) is gone, or cannot be reached")

    def _is_still_served(self) -> bool:
        """Whether the store is served, a moment later too: of a dying process connections break first."""
        deadline = time.monotonic() + _DYING
        while is_served(self._settings.endpoint, _FAREWELL):
            if time.monotonic() > deadline:
                return True
            time.sleep(0.05)
        return False

    def _run_joins(self) -> None:
        try:
            while True:
                self._form(*self._joins.get())
        except Refused as refused:
            self._fail(refused.kind, refused.reason, refused.outcome)
        except (OverwrittenError, ForgedError) as error:
            self._fail("unavailable", f"{error} ({show(self._settings.endpoint)}): {_OTHERS}")
        except (RuntimeError, RendezvousError) as error:
            self._miss_store(error)
        except Exception as error:
            traceback.print_exc()
            self._lose(f"the rendezvous failed: {type(error).__name__}: {error}")

    def _form(self, number: int, hello: Mapping[str, Any]) -> None:
        """Be in the next generation that has all its nodes."""
        former, self._generation = self._generation, None
        if former is not None:
            former.flush(_FAREWELL)
            former.retire()
        if self._meeting is None:
            wait_for_name(self._settings.endpoint, join_patience(self._settings), self._tell_news)
        own = {**self._introduce(), **hello}
        meeting = self._meeting = self._meeting or self._meet(own["addr"])
        own["member"] = meeting.name
        charter = None if meeting.store is None else Compatibility(meeting.store.connect_again())
        if charter is not None and former is None:
            charter.check(own)
        while number == self._number:
            seat = meeting.next()
            if meeting.store is None:
                self._depend_on(seat.store, seat.is_host)
            generation = Generation(seat, partial(self._hear, number), self._lose, self._miss_store)
            try:
                hellos = generation.greet(own, _GREETING)
            except TimeoutError as error:
                generation.abandon(str(error))
                continue
            check_hellos(hellos, generation.rank)
            if number != self._number:
                generation.abandon("it has other plans")
                break
            if charter is not None and generation.rank == 0:
                charter.write(own)
            self._generation = generation  # what the agent says after it was told must not be lost
            self._link.tell(event="joined", number=number, rank=generation.rank, hellos=hellos)
            generation.start()
            break

    def _introduce(self) -> dict[str, Any]:
        """What every node says of itself."""
        try:
            version = importlib.metadata.version("shardckpt")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        addr = self._settings.local_addr or local_address(self._settings.endpoint)
        return {"host": socket.gethostname(), "addr": addr, "version": version}

    def _meet(self, addr: str) -> Meeting:
        meeting = meet(self._settings, addr, self._tell_news, self._suspect)
        if meeting.store is not None:
            self._depend_on(meeting.store, meeting.is_host)
        threading.Thread(target=self._live, args=(meeting,), daemon=True).start()
        threading.Thread(target=self._watch_store, daemon=True).start()
        return meeting

    def _suspect(self, key: str) -> None:
        """Something is in a store that no node of this job has written: users are told once."""
        if not self._has_suspected:
            self._has_suspected = True
            where = show(self._settings.endpoint)
            what = f"the store at {where} holds what no node of this job has written ({key}): it is passed over"
            self._tell_news(f"{what}; {_OTHERS}", is_bad=True)

    def _depend_on(self, store: SignedStore, is_host: bool) -> None:
        """Be counted at `store` from now on, and not where it was before; `is_host`: this process serves it."""
        former, presence = self._presence, StoreUsers(store.connect_again().counters)
        presence.enter()
        self._presence, self._is_host = presence, is_host
        if former is not None:
            self._try(former.exit)

    def _hear(self, number: int, node: int, message: dict[str, Any]) -> None:
        with self._lock:
            if not self._is_ending:
                self._link.tell(event="heard", number=number, node=node, message=message)

    def _live(self, meeting: Meeting) -> None:
        """Give signs of life and look for those of others, until the end."""
        newcomers = _Newcomers(meeting)
        asked = -math.inf
        try:
            while not self._is_ending:
                if self._presence is not None:
                    self._presence.beat()
                generation, now = self._generation, time.monotonic()
                if generation is not None:
                    for lost in generation.look(now):
                        meeting.remove_node(generation.hellos[lost]["member"])
                if now - asked >= _ASK:
                    asked = now
                    if generation is None:
                        self._look_for_room(meeting)
                    else:
                        newcomers.look(generation)
                        self._check_place(meeting, generation)
                self._has_answered.set()
                time.sleep(PERIOD)
        except (RuntimeError, RendezvousError) as error:
            self._miss_store(error)

    def _look_for_room(self, meeting: Meeting) -> None:
        """Tell that this node waits for nothing but the loss of another one, as soon as that is so."""
        running = meeting.running_without()
        is_spare = running >= self._settings.max_nodes
        if is_spare and not self._is_spare:
            full = f"the job runs on {count(running, 'node')}, the most that --nnodes allows"
            until = "until one of them is lost or the job has ended"
            self._tell_news(f"{full}: this node waits as a spare, {until}", phase="waiting as a spare")
        self._is_spare = is_spare

    def _check_place(self, meeting: Meeting, generation: Generation) -> None:
        """Notice that the others have counted this node out while it, and perhaps their store, stood still."""
        is_in = meeting.is_in()
        if not is_in and self._generation is generation:  # else it is on its way to the next one itself
            self._lose("the other nodes have gone on without this one")

    def _watch_store(self) -> None:
        """Notice a store that does not answer; time in which this process stood still does not count."""
        missed = 0
        while not self._is_ending:
            missed = 0 if self._has_answered.is_set() else missed + 1
            self._has_answered.clear()
            if missed * PERIOD >= _UNREACHABLE:
                where = show(self._settings.endpoint)
                self._lose(f"the store at {where} has not answered for {missed * PERIOD:g} s")
            time.sleep(PERIOD)

    def _withdraw(self) -> None:
        if self._meeting is not None:
            self._try(self._meeting.withdraw)

    def _linger(self, seconds: float) -> None:
        """Serve the store as long as other nodes need it, but no longer than `seconds`."""
        if self._presence is not None:
            self._try(self._presence.exit)
            if self._is_host:
                self._presence.outlast_others(seconds)

    def _try(self, act: Callable[[], None]) -> None:
        """Do what is polite when leaving, if the store is still there."""
        try:
            bounded(_FAREWELL, act)
        except (RuntimeError, RendezvousError, TimeoutError) as error:
            print(error, file=sys.stderr)


class _Newcomers:
    """Tells a generation, as its node 0, of nodes that wait to be taken in."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._generation: Generation | None = None
        self._told = 0

    def look(self, generation: Generation) -> None:
        if generation.rank != 0:
            return
        if generation is not self._generation:
            self._generation, self._told = generation, 0
        count = self._meeting.waiting()
        if count not in (0, self._told):
            generation.say({"kind": "waiting", "count": count})
        self._told = count


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
