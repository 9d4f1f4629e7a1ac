"""torch's elastic rendezvous, where nodes may come and go."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid

from torch.distributed import DistStoreError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousTimeoutError,
)

from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.connect import node_name, seconds_of, settings_of, too_few
from launcher.rendezvous.member.endpoint import listening_address
from launcher.rendezvous.member.gate import Gate, known_as
from launcher.rendezvous.member.heartbeat import Arrivals
from launcher.rendezvous.member.protocol import Seat
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.signing import Signer
from launcher.rendezvous.member.stores import (
    SignedStore,
    Store,
    TCPStore,
    connect,
    serve,
)

__all__ = ["Elastic"]


_WORD = 10.0  # seconds at most, for node 0 of a generation to tell where its store is
_MISSED_SIGNS = 4  # of a node that waits, after which it is not counted on


_TIMEOUTS_ALTHOUGH_ENOUGH = 2
"""How often a node goes on although its join_timeout is over, if enough nodes have come."""


class Elastic:
    """A rendezvous of torch's, in which nodes come and go."""

    def __init__(
        self,
        settings: RendezvousSettings,
        addr: str,
        handler: RendezvousHandler,
        gate: Gate | None,
        signer: Signer,
        store: SignedStore | None = None,
        is_host: bool = False,
    ) -> None:
        conf = settings_of(settings)
        self._settings = settings
        self._patience = seconds_of(conf, "join_timeout")
        self._addr = addr
        self._handler = handler
        self._gate = gate
        self.name = f"{node_name(addr)}/{os.getpid()}"
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
            raise too_few(self._settings, self._came(), self._patience) from None
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

    def remove_node(self, node: str) -> None:
        if self._gate is not None:
            self._gate.remove_node(node)

    def withdraw(self) -> None:
        if self._gate is not None:
            self._gate.shut()
            self._gate.remove_node(self.name)

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
