"""The member: carries out its agent's orders, and reports what happens to the team."""

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
from launcher.rendezvous.member.agent_events import AgentEvents
from launcher.rendezvous.member.agent_link import AgentLink
from launcher.rendezvous.member.bounded_call import call_within
from launcher.rendezvous.member.compatibility import Compatibility, check_hellos
from launcher.rendezvous.member.conf import join_timeout
from launcher.rendezvous.member.endpoint import (
    accepts_connections,
    format_endpoint,
    local_address,
    wait_until_resolvable,
)
from launcher.rendezvous.member.generation import Generation
from launcher.rendezvous.member.heartbeat import PERIOD
from launcher.rendezvous.member.protocol import Rendezvous
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.rendezvous import open_rendezvous
from launcher.rendezvous.member.signed_backend import OverwrittenError
from launcher.rendezvous.member.signing import ForgedError
from launcher.rendezvous.member.store_users import StoreUsers
from launcher.rendezvous.member.stores import SignedStore

__all__ = ["Member"]

_HELLO_TIMEOUT = 10.0  # seconds for all nodes of a generation to publish hellos; then another one forms
_STORE_TIMEOUT = 5.0  # seconds without an answer of the store, after which this node leaves
_DYING = 1.0  # seconds in which a killed process stops listening
_LEAVE_TIMEOUT = 2.0  # seconds for each thing done when leaving
_LINGER = 10.0  # seconds that a store is served after the job's end
_OTHERS_CAN_WRITE = "others can reach that port: see docs/security.md"
_POLL = 1.0  # seconds between two looks at the state of the rendezvous


class Member:
    """Represents one node in the team, until no other node depends on this process.

    Args:
        link: the connection to the agent.
        settings: how the nodes meet.
    """

    def __init__(self, link: AgentLink, settings: RendezvousSettings) -> None:
        self._events = AgentEvents(link)
        self._settings = settings
        self._rendezvous: Rendezvous | None = None
        self._store_users: StoreUsers | None = None  # of the store that carries the team's messages
        self._is_host = False  # of that store
        self._generation: Generation | None = None
        self._is_spare = False  # as the user was notified
        self._has_reported_forgery = False
        self._joins: queue.SimpleQueue[tuple[int, Mapping[str, Any]]] = queue.SimpleQueue()
        self._store_has_answered = threading.Event()  # since the last look
        threading.Thread(target=self._run_joins, daemon=True).start()

    def join(self, number: int, hello: Mapping[str, Any]) -> None:
        """Leave the current generation, if any, and take part in the next; returns at once."""
        self._events.number = number
        self._joins.put((number, hello))

    def broadcast(self, number: int, message: dict[str, Any]) -> None:
        """Send `message` to the generation, if it is still that of the agent's join `number`."""
        if self._generation is not None and number == self._events.number:
            self._generation.broadcast(message)

    def leave(self, outcome: int | None) -> None:
        """Leave for good, and return when no other node needs this process.

        Args:
            outcome: the exit code with which the job has ended, if it has.
        """
        self._events.end()
        if self._generation is not None:
            self._generation.flush(_LEAVE_TIMEOUT)
            self._attempt(self._generation.retire)
        if outcome is not None and self._rendezvous is not None:
            self._attempt(partial(self._rendezvous.end_job, outcome))
        self._withdraw()
        self._serve_while_needed(math.inf if outcome is None else _LINGER)

    def abort(self) -> None:
        """The agent is dead or has reported a failure: notify the others, and return when none needs this one."""
        why = "its launch was killed" if self._events.end() else "it lost sight of the others"
        if self._generation is not None:
            self._generation.report_lost(self._generation.rank, why)
            self._generation.flush(_LEAVE_TIMEOUT)
            self._generation.stop()
        self._withdraw()
        self._serve_while_needed(math.inf)

    # -- joining

    def _run_joins(self) -> None:
        try:
            while True:
                self._join_generation(*self._joins.get())
        except Refused as refused:
            self._events.failed(refused.kind, refused.reason, refused.outcome)
        except (OverwrittenError, ForgedError) as error:
            where = format_endpoint(self._settings.endpoint)
            self._events.failed("unavailable", f"{error} ({where}): {_OTHERS_CAN_WRITE}")
        except (RuntimeError, RendezvousError) as error:
            self._on_store_lost(error)
        except Exception as error:
            traceback.print_exc()
            self._on_lost(f"the rendezvous failed: {type(error).__name__}: {error}")

    def _join_generation(self, number: int, hello: Mapping[str, Any]) -> None:
        """Take part in generations until one has all its nodes."""
        former, self._generation = self._generation, None
        if former is not None:
            former.flush(_LEAVE_TIMEOUT)
            former.retire()
        if self._rendezvous is None:
            wait_until_resolvable(self._settings.endpoint, join_timeout(self._settings), self._events.news)
        own = {**self._default_hello(), **hello}
        rendezvous = self._rendezvous = self._rendezvous or self._open_rendezvous(own["addr"])
        own["member"] = rendezvous.node_id
        store = rendezvous.store
        compatibility = None if store is None else Compatibility(store.connect_again())
        if compatibility is not None and former is None:
            compatibility.check(own)
        while number == self._events.number:
            info = rendezvous.next_generation()
            if store is None:
                self._use_store(info.store, info.is_host)
            generation = Generation(
                info, partial(self._events.message, number), self._on_lost, self._on_store_lost
            )
            try:
                hellos = generation.exchange_hellos(own, _HELLO_TIMEOUT)
            except TimeoutError:
                first = generation.first_hello()
                check_hellos([first or own, own], 1)  # a node 0 of another version may have gathered none
                continue
            check_hellos(hellos, generation.rank)
            if number != self._events.number:
                generation.abandon("it has other plans")
                break
            if compatibility is not None and generation.rank == 0:
                compatibility.record(own)
            self._generation = generation  # first: the agent may broadcast as soon as it has joined
            self._events.joined(number, generation.rank, hellos)
            generation.start()
            break

    def _default_hello(self) -> dict[str, Any]:
        """What every node sends about itself."""
        try:
            version = importlib.metadata.version("shardckpt")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        addr = self._settings.local_addr or local_address(self._settings.endpoint)
        return {"host": socket.gethostname(), "addr": addr, "version": version}

    def _open_rendezvous(self, addr: str) -> Rendezvous:
        rendezvous = open_rendezvous(self._settings, addr, self._events.news, self._on_forged)
        if rendezvous.store is not None:
            self._use_store(rendezvous.store, rendezvous.is_host)
        threading.Thread(target=self._run_heartbeats, args=(rendezvous,), daemon=True).start()
        threading.Thread(target=self._watch_store, daemon=True).start()
        return rendezvous

    def _use_store(self, store: SignedStore, is_host: bool) -> None:
        """Register as a user of `store`, and no longer of the one before; `is_host`: this process serves it."""
        former, users = self._store_users, StoreUsers(store.connect_again().counters)
        users.register()
        self._store_users, self._is_host = users, is_host
        if former is not None:
            self._attempt(former.unregister)

    # -- watching

    def _run_heartbeats(self, rendezvous: Rendezvous) -> None:
        """Send heartbeats and watch those of others, until the end."""
        newcomers = _Newcomers(rendezvous)
        polled = -math.inf
        try:
            while not self._events.is_ended:
                if self._store_users is not None:
                    self._store_users.beat()
                generation, now = self._generation, time.monotonic()
                if generation is not None:
                    for lost in generation.check_heartbeats(now):
                        rendezvous.remove_node(generation.hellos[lost]["member"])
                if now - polled >= _POLL:
                    polled = now
                    if generation is None:
                        self._report_spare(rendezvous)
                    else:
                        newcomers.announce(generation)
                        self._check_still_in(rendezvous, generation)
                self._store_has_answered.set()
                time.sleep(PERIOD)
        except (RuntimeError, RendezvousError) as error:
            self._on_store_lost(error)

    def _report_spare(self, rendezvous: Rendezvous) -> None:
        """Notify the user, once, that this node waits for the loss of another one."""
        running = rendezvous.running_without()
        is_spare = running >= self._settings.max_nodes
        if is_spare and not self._is_spare:
            full = f"the job runs on {count(running, 'node')}, the most that --nnodes allows"
            until = "until one of them is lost or the job has ended"
            self._events.news(f"{full}: this node waits as a spare, {until}", phase="waiting as a spare")
        self._is_spare = is_spare

    def _check_still_in(self, rendezvous: Rendezvous, generation: Generation) -> None:
        """Leave if the others removed this node while it, and perhaps the store, was suspended."""
        is_in = rendezvous.is_in()
        if not is_in and self._generation is generation:  # else it is joining the next one by itself
            self._on_lost("the other nodes have gone on without this one")

    def _watch_store(self) -> None:
        """Leave if the store does not answer; time in which this process was suspended does not count."""
        missed = 0
        while not self._events.is_ended:
            missed = 0 if self._store_has_answered.is_set() else missed + 1
            self._store_has_answered.clear()
            if missed * PERIOD >= _STORE_TIMEOUT:
                where = format_endpoint(self._settings.endpoint)
                self._on_lost(f"the store at {where} has not answered for {missed * PERIOD:g} s")
            time.sleep(PERIOD)

    def _on_forged(self, key: str) -> None:
        """Notify the user, once, of a value in a store that no node of this job has written."""
        if not self._has_reported_forgery:
            self._has_reported_forgery = True
            where = format_endpoint(self._settings.endpoint)
            what = f"the store at {where} holds what no node of this job has written ({key}): it is passed over"
            self._events.news(f"{what}; {_OTHERS_CAN_WRITE}", is_bad=True)

    # -- leaving

    def _on_lost(self, reason: str) -> None:
        self._events.failed("lost", reason)
        self._withdraw()  # at once, since the agent may be suspended

    def _on_store_lost(self, error: Exception) -> None:
        """The store is gone; `error` is torch's, and goes to the log."""
        if not self._events.is_ended:
            print(error, file=sys.stderr)
        where = format_endpoint(self._settings.endpoint)
        if self._is_still_served():
            first_line = str(error).partition("\n")[0]
            self._on_lost(
                f"the store at {where} refuses what it should not ({first_line}); {_OTHERS_CAN_WRITE}"
            )
        else:
            self._on_lost(f"{self._settings.server} ({where}) is gone, or cannot be reached")

    def _is_still_served(self) -> bool:
        """True if the store is served, also a second later: a dying process loses its connections first."""
        deadline = time.monotonic() + _DYING
        while accepts_connections(self._settings.endpoint, _LEAVE_TIMEOUT):
            if time.monotonic() > deadline:
                return True
            time.sleep(0.05)
        return False

    def _withdraw(self) -> None:
        if self._rendezvous is not None:
            self._attempt(self._rendezvous.withdraw)

    def _serve_while_needed(self, seconds: float) -> None:
        """Serve the store while other nodes use it, for at most `seconds`."""
        if self._store_users is not None:
            self._attempt(self._store_users.unregister)
            if self._is_host:
                self._store_users.wait_until_unused(seconds)

    def _attempt(self, act: Callable[[], None]) -> None:
        """Do something as a courtesy to the others, if the store is still there."""
        try:
            call_within(_LEAVE_TIMEOUT, act)
        except (RuntimeError, RendezvousError, TimeoutError) as error:
            print(error, file=sys.stderr)


class _Newcomers:
    """Announces to a generation, from its node 0, the nodes that wait to be taken in."""

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._rendezvous = rendezvous
        self._generation: Generation | None = None
        self._announced = 0

    def announce(self, generation: Generation) -> None:
        """Broadcast how many nodes wait, if that has changed."""
        if generation.rank != 0:
            return
        if generation is not self._generation:
            self._generation, self._announced = generation, 0
        waiting = self._rendezvous.waiting()
        if waiting not in (0, self._announced):
            generation.broadcast({"kind": "waiting", "count": waiting})
        self._announced = waiting
