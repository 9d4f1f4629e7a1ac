"""Where the nodes of a job meet: torch's elastic rendezvous, or the ranks that a scheduler gave them.

torch's part, for the backends "c10d", "etcd-v2" and those of its registry, is to agree on who is in the
next generation. What is said in one goes through a `TCPStore`: that of the c10d backend, which lives at the
endpoint, or else one that node 0 of the generation serves.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar

from torch.distributed import DistStoreError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
    create_backend as create_c10d_backend,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    Token,
    create_handler,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launcher.member.endpoint import is_here, reach, resolve, show
from launcher.member.pulse import Arrivals
from launcher.member.refusal import Refused
from launcher.member.stores import PrefixStore, Store, TCPStore
from launcher.membership import Rendezvous

__all__ = ["Meeting", "Seat", "bounded", "meet"]

_ANSWER = timedelta(seconds=5)
"""How long an operation of a store may take."""

_HANDSHAKE = 10.0  # seconds at most, for what listens at the endpoint to show that it is a store
_ROLL_CALL = 0.1  # seconds between two looks at who has come
_MISSED_SIGNS = 4  # of a node that waits, after which it is not counted on
_DEFAULTS = {
    "join_timeout": "600",
    "last_call_timeout": "2",  # who comes later is taken in at a step boundary
    "keep_alive_interval": "1",
    "keep_alive_max_attempt": "30",  # by the clocks of several hosts, which need not agree better than that
    "read_timeout": "60",
}

# Workers have a store of their own. With torch's shared one, the address of the first generation's is remembered
# and not told in later ones: a node that comes then waits for it in vain (2.13).
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

_Value = TypeVar("_Value")


def bounded(seconds: float, call: Callable[[], _Value]) -> _Value:
    """What `call` returns or raises; TimeoutError if it takes more than `seconds`, and it is left behind."""
    outcome: list[tuple[_Value | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # handed to whoever waits
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


@dataclass(frozen=True)
class Seat:
    """This node's place in a generation, and a store whose keys no other generation reads."""

    rank: int
    size: int
    store: Store
    is_host: bool
    """Whether this process serves `store`."""


class Meeting(Protocol):
    """Where generations are formed."""

    name: str
    """What this node, in this process, is known by."""

    store: Store | None
    """The job's store, as long as it exists; None: each generation has one of its own."""

    is_host: bool
    """Whether this process serves `store`."""

    def next(self) -> Seat:
        """Leave the generation before, and wait for the next one with this node in it.

        Raises `Refused`, or RuntimeError or RendezvousConnectionError if the store is gone.
        """

    def is_in(self) -> bool:
        """Whether the rendezvous has this node in its generation, as far as can be known.

        Not so from when `next` leaves one generation until the next one has formed.
        """

    def waiting(self) -> int:
        """How many nodes wait to be taken in, and have given signs of life since the last generation formed."""

    def end_job(self) -> None:
        """Have every node that comes from now on refused: the job is finished."""

    def count_out(self, node: str) -> None:
        """Let nobody wait for a node that is lost; `node` is the `name` of its meeting."""

    def withdraw(self) -> None:
        """Be no part of the rendezvous any more, and let nobody wait for this node."""


def meet(settings: Rendezvous, addr: str, tell: Callable[[str], None]) -> Meeting:
    """Connect to the rendezvous, or begin to serve its store if the endpoint is this machine.

    Raises `Refused`. `tell` is called with lines for the user, meanwhile.
    """
    try:
        return _meet(settings, {**_DEFAULTS, **settings.conf}, addr, tell)
    except ValueError as error:
        raise Refused("usage", f"--rdzv-conf cannot be used: {error}") from None


def _meet(settings: Rendezvous, conf: Mapping[str, str], addr: str, tell: Callable[[str], None]) -> Meeting:
    if settings.backend in ("c10d", "static"):
        backend, store, is_host = _connect(settings, conf, tell)
        if settings.backend == "static":
            return _Fixed(settings, _seconds(conf, "join_timeout"), store, is_host)
        gate = _Gate(backend)
        handler: RendezvousHandler = create_handler(store, gate, _parameters(settings, conf, addr))
        return _Elastic(settings, conf, addr, handler, gate, store, is_host)
    resolve(settings.endpoint)
    parameters = _parameters(settings, conf, addr)
    try:
        if settings.backend == "etcd-v2":
            from torch.distributed.elastic.rendezvous.etcd_rendezvous_backend import create_backend

            backend, etcd_store = create_backend(parameters)
            gate = _Gate(backend)
            handler = create_handler(etcd_store, gate, parameters)
            return _Elastic(settings, conf, addr, handler, gate, None, False)
        handler = get_rendezvous_handler(parameters)
        return _Elastic(settings, conf, addr, handler, None, None, False)
    except RendezvousConnectionError:
        _reach(settings, conf, tell)
        raise _not_a_store(settings) from None
    except Exception as error:
        raise Refused(
            "usage", f"--rdzv-backend {settings.backend} cannot be used: {_line(error)}"
        ) from error


def _parameters(
    settings: Rendezvous, conf: Mapping[str, str], addr: str, **more: Any
) -> RendezvousParameters:
    return RendezvousParameters(
        backend=settings.backend,
        endpoint=show(settings.endpoint),
        run_id=settings.run_id,
        min_nodes=settings.min_nodes,
        max_nodes=settings.max_nodes,
        local_addr=_name(addr),
        **{**conf, **more},
    )


def _name(addr: str) -> str:
    """What torch knows this node by. It numbers nodes in the order of these: by host, as under torchrun."""
    return f"{socket.gethostname()}/{addr}"


def _connect(
    settings: Rendezvous, conf: Mapping[str, str], tell: Callable[[str], None]
) -> tuple[RendezvousBackend, TCPStore, bool]:
    """A connection to the store at the endpoint, which this process serves if it is the first there."""
    wants_to_host = _parameters(settings, conf, "").get_as_bool("is_host")
    if wants_to_host is None:
        wants_to_host = is_here(settings.endpoint)
    if wants_to_host:
        try:
            return *_create(settings, conf, is_host=True), True
        except RendezvousConnectionError:
            pass  # another process of this machine has the port; it should be one like this
    _reach(settings, conf, tell)
    try:
        seconds = min(_patience(conf), _HANDSHAKE)
        return *bounded(seconds, lambda: _create(settings, conf, is_host=False)), False
    except (RendezvousConnectionError, TimeoutError):
        raise _not_a_store(settings) from None


def _reach(settings: Rendezvous, conf: Mapping[str, str], tell: Callable[[str], None]) -> None:
    """Wait until somebody accepts connections at the endpoint; raises `Refused` if nobody does in time."""
    try:
        reach(settings.endpoint, _patience(conf), tell)
    except TimeoutError as error:
        raise _unavailable(settings, str(error), "start the first node, or check --rdzv-endpoint") from None


def _patience(conf: Mapping[str, str]) -> float:
    """How many seconds to wait for somebody at the endpoint."""
    return min(_seconds(conf, "read_timeout"), _seconds(conf, "join_timeout"))


def _seconds(conf: Mapping[str, str], key: str) -> float:
    try:
        return float(conf[key])
    except ValueError:
        raise ValueError(f"{key}: expected seconds, found {conf[key]}") from None


def _unavailable(settings: Rendezvous, what: str, advice: str) -> Refused:
    """There is `what` instead of a rendezvous; `advice` is for a node that has not seen it there before."""
    if settings.has_met:
        again = "start the job again, it goes on from its checkpoints"
        advice = f"{settings.server} is gone, frozen or cut off; {again}"
    return Refused("unavailable", f"{what}: {advice}")


def _not_a_store(settings: Rendezvous) -> Refused:
    return _unavailable(
        settings,
        f"what listens at {show(settings.endpoint)} does not answer as the store of a rendezvous would",
        "it is frozen, or another program has that port and --rdzv-endpoint needs another one",
    )


def _create(
    settings: Rendezvous, conf: Mapping[str, str], is_host: bool
) -> tuple[RendezvousBackend, TCPStore]:
    parameters = _parameters(settings, conf, "", is_host=is_host, read_timeout=int(_HANDSHAKE))
    backend, store = create_c10d_backend(parameters)
    assert isinstance(store, TCPStore)
    store.set_timeout(_ANSWER)
    return backend, store


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _too_few(settings: Rendezvous, came: int | None, seconds: float) -> Refused:
    found = "fewer than" if came is None else f"{came} of at least"
    nodes = "node" if settings.min_nodes == 1 else "nodes"
    return Refused("quorum", f"{found} {settings.min_nodes} {nodes} came within {seconds:g} s")


class _Gate(RendezvousBackend):
    """Stands between torch's handler and its backend, to end a wait and to take nodes out.

    torch's handler has no way to leave a rendezvous without closing it for all, and none to take out a node
    that is known to be dead; so all would wait until its keep-alive is too old.
    """

    def __init__(self, backend: RendezvousBackend) -> None:
        self._backend = backend
        self._is_shut = False

    @property
    def name(self) -> str:
        return self._backend.name

    def get_state(self) -> tuple[bytes, Token] | None:
        self._check()
        return self._backend.get_state()

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        self._check()
        return self._backend.set_state(state, token)

    def participants(self) -> list[str]:
        """The nodes that take part, by the `name` of their meetings."""
        found = self._backend.get_state()
        return [] if found is None else [_known_as(desc) for desc in pickle.loads(found[0]).participants]

    def waiting(self) -> Mapping[str, str]:
        """Who waits to be taken in, each with its last sign of life."""
        found = self._backend.get_state()
        if found is None:
            return {}
        state = pickle.loads(found[0])
        return {str(desc): str(state.last_heartbeats.get(desc)) for desc in state.wait_list}

    def shut(self) -> None:
        """Let the handler through no more. It goes on to try, and need not say so each time."""
        self._is_shut = True
        logging.getLogger(DynamicRendezvousHandler.__module__).setLevel(logging.CRITICAL)

    def count_out(self, node: str) -> None:
        """Mark a node as dead since long; all count it out at their next look, as one without keep-alive."""
        has_set = False
        while not has_set and (found := self._backend.get_state()) is not None:
            bits, token = found
            state = pickle.loads(bits)
            dead = [desc for desc in state.last_heartbeats if _known_as(desc) == node]
            if not dead:
                return
            state.last_heartbeats.update(dict.fromkeys(dead, datetime.min.replace(tzinfo=UTC)))
            outcome = self._backend.set_state(pickle.dumps(state), token)
            has_set = outcome is not None and outcome[2]

    def _check(self) -> None:
        if self._is_shut:
            raise RendezvousConnectionError("this node has left")


def _known_as(desc: Any) -> str:
    """The `name` of the meeting of a node that torch's state describes so."""
    return f"{desc.addr}/{desc.pid}"


class _Elastic:
    """A rendezvous of torch's, in which nodes come and go."""

    def __init__(
        self,
        settings: Rendezvous,
        conf: Mapping[str, str],
        addr: str,
        handler: RendezvousHandler,
        gate: _Gate | None,
        store: TCPStore | None,
        is_host: bool,
    ) -> None:
        self._settings = settings
        self._patience = _seconds(conf, "join_timeout")
        self._addr = addr
        self._handler = handler
        self._gate = gate
        self.name = f"{_name(addr)}/{os.getpid()}"
        self.store: Store | None = store
        self.is_host = is_host
        self._sign_patience = _MISSED_SIGNS * float(conf["keep_alive_interval"])
        self._arrivals = Arrivals(self._sign_patience)
        self._served: list[TCPStore] = []  # by this process, for generations whose node 0 it was

    def next(self) -> Seat:
        try:
            info = self._take_part()
        except RendezvousTimeoutError:
            came = None if self._gate is None else len(self._gate.participants()) + 1  # it has gone again
            raise _too_few(self._settings, came, self._patience) from None
        except (RendezvousClosedError, RendezvousGracefulExitError):
            raise Refused(
                "closed",
                f"the job with the id {self._settings.run_id} has ended: choose another --rdzv-id for a new one",
            ) from None
        self._arrivals = Arrivals(self._sign_patience)
        if self.store is not None:
            return Seat(info.rank, info.world_size, info.store, self.is_host)
        return Seat(info.rank, info.world_size, self._serve(info.store, info.rank), info.rank == 0)

    def is_in(self) -> bool:
        return self._gate is None or self.name in self._gate.participants()

    def waiting(self) -> int:
        if self._gate is None:
            return self._handler.num_nodes_waiting()
        return self._arrivals.look(self._gate.waiting(), time.monotonic())

    def end_job(self) -> None:
        self._handler.set_closed()  # type: ignore[no-untyped-call]

    def count_out(self, node: str) -> None:
        if self._gate is not None:
            self._gate.count_out(node)

    def withdraw(self) -> None:
        if self._gate is not None:
            self._gate.shut()
            self._gate.count_out(self.name)

    def _take_part(self) -> RendezvousInfo:
        while True:
            try:
                return self._handler.next_rendezvous()
            except DistStoreError as error:  # an answer that others owe: one of them has died meanwhile
                print(error, file=sys.stderr)

    def _serve(self, agreed: Store, rank: int) -> TCPStore:
        """A store for a generation, where the one of the rendezvous cannot compare and set."""
        if rank == 0:
            served = TCPStore(self._addr, 0, is_master=True, wait_for_workers=False, timeout=_ANSWER)
            self._served.append(served)
            agreed.set("launch/port", str(served.port))
            agreed.set("launch/addr", self._addr)
            return served
        addr, port = agreed.get("launch/addr").decode(), int(agreed.get("launch/port"))
        return TCPStore(addr, port, is_master=False, wait_for_workers=False, timeout=_ANSWER)


class _Fixed:
    """The same `max_nodes` nodes in each generation, with ranks that they were given.

    Each node that comes leaves a ticket. When node 0 has a new ticket of every rank it gives them the number
    of the generation; a ticket is good for one.
    """

    def __init__(self, settings: Rendezvous, patience: float, store: Store, is_host: bool) -> None:
        if settings.node_rank is None or not 0 <= settings.node_rank < settings.max_nodes:
            raise Refused(
                "usage",
                f"--rdzv-backend static wants --node-rank from 0 to {settings.max_nodes - 1}, "
                f"found {settings.node_rank}",
            )
        self._settings = settings
        self._patience = patience
        self._rank = settings.node_rank
        self._size = settings.max_nodes
        self.name = str(settings.node_rank)
        self.store: Store | None = store
        self._tickets = PrefixStore(f"static.{settings.run_id}", store)
        self.is_host = is_host
        self._has_left = False

    def next(self) -> Seat:
        ticket = uuid.uuid4().hex
        self._tickets.set(f"ticket/{self._rank}", ticket)
        deadline = time.monotonic() + self._patience
        while not self._tickets.check([f"generation/{ticket}"]):
            came = self._give_out() if self._rank == 0 else None
            if time.monotonic() > deadline:
                raise _too_few(self._settings, came, self._patience)
            if self._has_left:
                raise RendezvousConnectionError("this node has left")
            time.sleep(_ROLL_CALL)
        number = self._tickets.get(f"generation/{ticket}").decode()
        return Seat(self._rank, self._size, PrefixStore(number, self._tickets), self.is_host)

    def _give_out(self) -> int:
        """Begin a generation if every node has come; returns how many have."""
        came = [key for rank in range(self._size) if self._tickets.check([key := f"ticket/{rank}"])]
        tickets = [ticket.decode() for ticket in self._tickets.multi_get(came)]
        new = [ticket for ticket in tickets if not self._tickets.check([f"generation/{ticket}"])]
        if len(new) == self._size:
            number = str(self._tickets.add("generations", 1))
            for ticket in new:
                self._tickets.set(f"generation/{ticket}", number)
        return len(new)

    def is_in(self) -> bool:
        return True  # its place is kept

    def waiting(self) -> int:
        return 0  # nobody comes that is not in it already

    def end_job(self) -> None:
        pass  # who comes now waits for the others, in vain; torch's static rendezvous is never closed either

    def count_out(self, node: str) -> None:
        pass  # its place is kept

    def withdraw(self) -> None:
        self._has_left = True
