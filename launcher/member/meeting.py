"""Where the nodes of a job meet: torch's elastic rendezvous, or the ranks that a scheduler gave them.

torch's part, for the backends "c10d", "etcd-v2" and those of its registry, is to agree on who is in the
next generation. What is said in one goes through a `TCPStore`: that of the c10d backend, which lives at the
endpoint, or else one that node 0 of the generation serves.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

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
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, create_handler
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launcher.member.endpoint import is_here, listening_address, reach, resolve, show
from launcher.member.gate import Gate, StoreBackend, known_as
from launcher.member.pulse import Arrivals
from launcher.member.refusal import Refused
from launcher.member.seal import open_seal
from launcher.member.signing import Signer
from launcher.member.stores import (
    PortTakenError,
    SignedStore,
    Store,
    TCPStore,
    connect,
    serve,
)
from launcher.membership import Rendezvous

__all__ = ["Meeting", "Seat", "bounded", "join_patience", "meet", "meet_through"]

_WORD = 10.0  # seconds at most, for node 0 of a generation to tell where its store is
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
    store: SignedStore
    is_host: bool
    """Whether this process serves `store`."""


class Meeting(Protocol):
    """Where generations are formed."""

    name: str
    """What this node, in this process, is known by."""

    store: SignedStore | None
    """What the job keeps beside its generations; None: each generation has a store of its own."""

    is_host: bool
    """Whether this process serves `store`."""

    def next(self) -> Seat:
        """Leave the generation before, and wait for the next one with this node in it.

        Raises `Refused`, or RuntimeError or RendezvousConnectionError if the store is gone.
        """

    def running_without(self) -> int:
        """How many nodes the job runs on, to be asked when this is none of them; 0: it does not, or nobody
        knows."""

    def is_in(self) -> bool:
        """Whether the rendezvous has this node in its generation, as far as can be known.

        Not so from when `next` leaves one generation until the next one has formed.
        """

    def waiting(self) -> int:
        """How many nodes wait to be taken in, and have given signs of life since the last generation formed."""

    def end_job(self, exit_code: int) -> None:
        """Have every node that waits, or comes from now on, refused: the job has ended with `exit_code`."""

    def count_out(self, node: str) -> None:
        """Let nobody wait for a node that is lost; `node` is the `name` of its meeting."""

    def withdraw(self) -> None:
        """Be no part of the rendezvous any more, and let nobody wait for this node."""


Tell = Callable[[str], None]
"""To be called with lines for the user."""


def meet(settings: Rendezvous, addr: str, tell: Tell, suspect: Tell) -> Meeting:
    """Connect to the rendezvous, or begin to serve its store if the endpoint is this machine.

    Raises `Refused`. `tell` is called with lines for the user, meanwhile, and `suspect` at any time with what
    is found in a store that no node of this job has written.
    """
    try:
        return _meet(settings, _conf(settings), addr, tell, suspect)
    except ValueError as error:
        raise Refused("usage", f"--rdzv-conf cannot be used: {error}") from None


def join_patience(settings: Rendezvous) -> float:
    """How many seconds to wait for the other nodes."""
    try:
        return _seconds(_conf(settings), "join_timeout")
    except ValueError as error:
        raise Refused("usage", f"--rdzv-conf cannot be used: {error}") from None


def _conf(settings: Rendezvous) -> Mapping[str, str]:
    given = {key: value for key, value in settings.conf.items() if key != "secret"}
    if "timeout" in given:  # the one that the static and the old etcd rendezvous have
        given.setdefault("join_timeout", given["timeout"])
    return {**_DEFAULTS, **given}


def _meet(settings: Rendezvous, conf: Mapping[str, str], addr: str, tell: Tell, suspect: Tell) -> Meeting:
    signer = Signer(settings.secret_key, settings.run_id, suspect=suspect)
    if settings.backend in ("c10d", "static"):
        store, signer, is_host = _connect(settings, conf, signer, tell)
        own = SignedStore(store, signer, f"launch.{settings.run_id}/")
        if settings.backend == "static":
            return _Fixed(settings, _seconds(conf, "join_timeout"), own, is_host)
        gate = Gate(StoreBackend(store, f"launch.{settings.run_id}/state"), signer)
        handler: RendezvousHandler = create_handler(store, gate, _parameters(settings, conf, addr))
        return _Elastic(settings, addr, handler, gate, signer, own, is_host)
    resolve(settings.endpoint)
    parameters = _parameters(settings, conf, addr)
    try:
        if settings.backend == "etcd-v2":
            from torch.distributed.elastic.rendezvous.etcd_rendezvous_backend import create_backend

            return meet_through(settings, addr, signer, *create_backend(parameters))
        return _Elastic(settings, addr, get_rendezvous_handler(parameters), None, signer)  # JSON in etcd
    except RendezvousConnectionError:
        _reach(settings, conf, tell)
        raise _not_a_store(settings) from None
    except Exception as error:
        raise Refused(
            "usage", f"--rdzv-backend {settings.backend} cannot be used: {_line(error)}"
        ) from error


def meet_through(
    settings: Rendezvous, addr: str, signer: Signer, backend: RendezvousBackend, store: Store
) -> Meeting:
    """Meet where torch's state is in a `backend` whose `store` cannot compare and set, as etcd's."""
    gate = Gate(backend, signer)
    handler = create_handler(store, gate, _parameters(settings, _conf(settings), addr))
    return _Elastic(settings, addr, handler, gate, signer)


def _parameters(settings: Rendezvous, conf: Mapping[str, str], addr: str) -> RendezvousParameters:
    return RendezvousParameters(
        backend=settings.backend,
        endpoint=show(settings.endpoint),
        run_id=settings.run_id,
        min_nodes=settings.min_nodes,
        max_nodes=settings.max_nodes,
        local_addr=_name(addr),
        **conf,
    )


def _name(addr: str) -> str:
    """What torch knows this node by. It numbers nodes in the order of these: by host, as under torchrun."""
    return f"{socket.gethostname()}/{addr}"


def _connect(
    settings: Rendezvous, conf: Mapping[str, str], signer: Signer, tell: Tell
) -> tuple[TCPStore, Signer, bool]:
    """A connection to the store at the endpoint, and what signs for the job there.

    Also, whether this process serves it, which it does if it is the first there.
    """
    host, port = settings.endpoint
    wants_to_host = _parameters(settings, conf, "").get_as_bool("is_host")
    if wants_to_host is None:
        wants_to_host = is_here(settings.endpoint)
    if wants_to_host:
        try:
            store = serve(host, listening_address(settings.endpoint, settings.local_addr), port)
            return store, open_seal(store, settings, signer, is_host=True, is_first=True), True
        except PortTakenError:
            pass  # another process of this machine has the port; it should be one like this
        except OSError as error:
            why = f"{show(settings.endpoint)} cannot be served from here: {error.strerror}"
            raise Refused("usage", f"{why}: correct --rdzv-endpoint") from None
    _reach(settings, conf, tell)
    seconds = min(_patience(conf), _HANDSHAKE)

    def shake_hands() -> tuple[TCPStore, Signer, bool]:
        store = connect(host, port, seconds)
        return store, open_seal(store, settings, signer, is_host=False, is_first=bool(wants_to_host)), False

    try:
        return bounded(seconds, shake_hands)
    except (RuntimeError, TimeoutError):
        raise _not_a_store(settings) from None


def _reach(settings: Rendezvous, conf: Mapping[str, str], tell: Tell) -> None:
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


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _too_few(settings: Rendezvous, came: int | None, seconds: float) -> Refused:
    found = "fewer than" if came is None else f"{came} of at least"
    nodes = "node" if settings.min_nodes == 1 else "nodes"
    return Refused("quorum", f"{found} {settings.min_nodes} {nodes} came within {seconds:g} s")


_TIMEOUTS_ALTHOUGH_ENOUGH = 2
"""How often a node goes on although its join_timeout is over, if enough nodes have come."""


class _Elastic:
    """A rendezvous of torch's, in which nodes come and go."""

    def __init__(
        self,
        settings: Rendezvous,
        addr: str,
        handler: RendezvousHandler,
        gate: Gate | None,
        signer: Signer,
        store: SignedStore | None = None,
        is_host: bool = False,
    ) -> None:
        conf = _conf(settings)
        self._settings = settings
        self._patience = _seconds(conf, "join_timeout")
        self._addr = addr
        self._handler = handler
        self._gate = gate
        self.name = f"{_name(addr)}/{os.getpid()}"
        self._signer = signer
        self.store: SignedStore | None = store
        self.is_host = is_host
        self._sign_patience = _MISSED_SIGNS * float(conf["keep_alive_interval"])
        self._arrivals = Arrivals(self._sign_patience)
        self._served: list[TCPStore] = []  # by this process, for generations whose node 0 it was

    def next(self) -> Seat:
        try:
            info = self._take_part()
        except RendezvousTimeoutError:
            raise _too_few(self._settings, self._came(), self._patience) from None
        except (RendezvousClosedError, RendezvousGracefulExitError):
            raise self._too_late() from None
        self._arrivals = Arrivals(self._sign_patience)
        if self.store is not None and self._gate is not None:
            part = self.store.part(f"generation-{self._gate.round_of(self.name)}")
            return Seat(info.rank, info.world_size, part, self.is_host)
        return Seat(info.rank, info.world_size, self._serve(info.store, info.rank), info.rank == 0)

    def _too_late(self) -> Refused:
        """The job has ended: while this node waited, so that it has nothing to do, or before it came."""
        outcome = None if self._gate is None else self._gate.outcome
        if self._gate is None or outcome is None or not (self._gate.was_open or self._settings.has_met):
            advice = "choose another --rdzv-id for a new one"
            return Refused("closed", f"the job with the id {self._settings.run_id} has ended: {advice}")
        how = "has finished" if outcome == 0 else f"has ended with exit code {outcome}"
        return Refused("over", f"the job {how}; this node was not needed", outcome)

    def running_without(self) -> int:
        if self._gate is None:
            return 0
        state = self._gate.look()
        is_out = self.name not in map(known_as, state.participants)
        return len(state.participants) if is_out and state.complete and not state.closed else 0

    def is_in(self) -> bool:
        return self._gate is None or self.name in self._gate.participants()

    def waiting(self) -> int:
        if self._gate is None:
            return self._handler.num_nodes_waiting()
        return self._arrivals.look(self._gate.waiting(), time.monotonic())

    def end_job(self, exit_code: int) -> None:
        if self._gate is not None:
            self._gate.record_outcome(exit_code)
        self._handler.set_closed()  # type: ignore[no-untyped-call]

    def count_out(self, node: str) -> None:
        if self._gate is not None:
            self._gate.count_out(node)

    def withdraw(self) -> None:
        if self._gate is not None:
            self._gate.shut()
            self._gate.count_out(self.name)

    def _came(self) -> int | None:
        """How many nodes have come, as far as that is known: this one, which has gone again, and the others."""
        return None if self._gate is None else len(self._gate.participants()) + 1

    def _take_part(self) -> RendezvousInfo:
        again = _TIMEOUTS_ALTHOUGH_ENOUGH
        while True:
            try:
                return self._handler.next_rendezvous()
            except DistStoreError as error:  # an answer that others owe: one of them has died meanwhile
                print(error, file=sys.stderr)
            except RendezvousTimeoutError:
                if self.running_without():
                    continue  # a spare, or one that is to be taken in, waits for as long as the job runs
                if not again or (self._came() or 0) < self._settings.min_nodes:
                    raise
                again -= 1  # enough came, and the time was over before they had agreed

    def _serve(self, agreed: Store, rank: int) -> SignedStore:
        """A store for a generation, where the one of the rendezvous cannot compare and set.

        Node 0 serves it, and tells the others of it in the one that was `agreed` on.
        """
        number = 0 if self._gate is None else self._gate.round_of(self.name)
        word = SignedStore(agreed, self._signer, f"launch/{number}/")
        if rank == 0:
            served = serve(self._addr, listening_address((self._addr, 0), None), 0)
            self._served.append(served)
            name = uuid.uuid4().hex
            word.set("store", json.dumps([self._addr, served.port, name]))
            return self._generation(served, name)
        told = word.wait("store", seconds=_WORD)
        if told is None:
            raise Refused(
                "usage",
                "no node that has this node's secret says where the store is: give all nodes the same one",
            )
        addr, port, name = json.loads(told[0])
        return self._generation(connect(addr, port, _WORD), name)

    def _generation(self, store: Store, name: str) -> SignedStore:
        return SignedStore(store, self._signer.within(name))


class _Fixed:
    """The same `max_nodes` nodes in each generation, with ranks that they were given.

    Each node that comes leaves a ticket. When node 0 has a new ticket of every rank it gives them the number
    of the generation; a ticket is good for one.
    """

    def __init__(self, settings: Rendezvous, patience: float, store: SignedStore, is_host: bool) -> None:
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
        self.store: SignedStore | None = store
        self._tickets = store.part("static")
        self.is_host = is_host
        self._has_left = False

    def next(self) -> Seat:
        ticket = uuid.uuid4().hex
        self._tickets.set(f"ticket/{self._rank}", ticket)
        deadline = time.monotonic() + self._patience
        while (name := self._tickets.get(f"generation/{ticket}")) is None:
            came = self._give_out() if self._rank == 0 else None
            if time.monotonic() > deadline:
                raise _too_few(self._settings, came, self._patience)
            if self._has_left:
                raise RendezvousConnectionError("this node has left")
            time.sleep(_ROLL_CALL)
        return Seat(self._rank, self._size, self._tickets.part(name), self.is_host)

    def _give_out(self) -> int:
        """Begin a generation if every node has come; returns how many have."""
        tickets = [self._tickets.get(f"ticket/{rank}") for rank in range(self._size)]
        new = [one for one in tickets if one is not None and not self._tickets.get(f"generation/{one}")]
        if len(new) == self._size:
            name = uuid.uuid4().hex
            for ticket in new:
                self._tickets.set(f"generation/{ticket}", name)
        return len(new)

    def running_without(self) -> int:
        return 0  # never without this one

    def is_in(self) -> bool:
        return True  # its place is kept

    def waiting(self) -> int:
        return 0  # nobody comes that is not in it already

    def end_job(self, exit_code: int) -> None:
        pass  # who comes now waits for the others, in vain; torch's static rendezvous is never closed either

    def count_out(self, node: str) -> None:
        pass  # its place is kept

    def withdraw(self) -> None:
        self._has_left = True
