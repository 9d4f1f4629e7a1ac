"""torch's elastic rendezvous, in which nodes come and go."""

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
from launcher.rendezvous.member.conf import conf_seconds, conf_with_defaults, node_name
from launcher.rendezvous.member.endpoint import listening_address
from launcher.rendezvous.member.heartbeat import WaitingNodes
from launcher.rendezvous.member.protocol import GenerationInfo
from launcher.rendezvous.member.refusals import too_few_nodes
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.signed_backend import SignedBackend, node_id_of
from launcher.rendezvous.member.signing import Signer
from launcher.rendezvous.member.stores import SignedStore, Store, TCPStore, connect, serve

__all__ = ["ElasticRendezvous"]

_STORE_ADDRESS_TIMEOUT = 10.0  # seconds, at most, for node 0 of a generation to publish where its store is
_MISSED_HEARTBEATS = 4  # of a waiting node, after which it does not count

_RETRIES_WITH_ENOUGH_NODES = 2
"""How often a node tries again after its join_timeout although enough nodes have come."""


class ElasticRendezvous:
    """A `Rendezvous` of torch's.

    Args:
        settings: this node's rendezvous.
        addr: the address at which other nodes reach this one.
        handler: torch's.
        backend: the handler's state, for questions that the handler does not answer; None: not accessible.
        signer: signs for the job.
        store: the job's store, where the rendezvous has one that can compare and set.
        is_host: true if this process serves `store`.
    """

    def __init__(
        self,
        settings: RendezvousSettings,
        addr: str,
        handler: RendezvousHandler,
        backend: SignedBackend | None,
        signer: Signer,
        store: SignedStore | None = None,
        is_host: bool = False,
    ) -> None:
        conf = conf_with_defaults(settings)
        self._settings = settings
        self._join_timeout = conf_seconds(conf, "join_timeout")
        self._addr = addr
        self._handler = handler
        self._backend = backend
        self.node_id = f"{node_name(addr)}/{os.getpid()}"
        self._signer = signer
        self.store: SignedStore | None = store
        self.is_host = is_host
        self._heartbeat_timeout = _MISSED_HEARTBEATS * float(conf["keep_alive_interval"])
        self._waiting = WaitingNodes(self._heartbeat_timeout)
        self._served: list[TCPStore] = []  # by this process, for generations whose node 0 it was

    def next_generation(self) -> GenerationInfo:
        try:
            info = self._next_rendezvous()
        except RendezvousTimeoutError:
            raise too_few_nodes(self._settings, self._nodes_that_came(), self._join_timeout) from None
        except (RendezvousClosedError, RendezvousGracefulExitError):
            raise self._job_has_ended() from None
        self._waiting = WaitingNodes(self._heartbeat_timeout)
        rank, size = info.rank, info.world_size
        if self.store is not None and self._backend is not None:
            part = self.store.part(f"generation-{self._backend.round_of(self.node_id)}")
            return GenerationInfo(rank, size, part, self.is_host)
        return GenerationInfo(rank, size, self._generation_store(info.store, rank), rank == 0)

    def running_without(self) -> int:
        if self._backend is None:
            return 0
        state = self._backend.state()
        is_out = self.node_id not in map(node_id_of, state.participants)
        return len(state.participants) if is_out and state.complete and not state.closed else 0

    def is_in(self) -> bool:
        return self._backend is None or self.node_id in self._backend.participants()

    def waiting(self) -> int:
        if self._backend is None:
            return self._handler.num_nodes_waiting()
        return self._waiting.count_alive(self._backend.waiting(), time.monotonic())

    def end_job(self, exit_code: int) -> None:
        if self._backend is not None:
            self._backend.record_outcome(exit_code)
        self._handler.set_closed()  # type: ignore[no-untyped-call]

    def remove_node(self, node_id: str) -> None:
        if self._backend is not None:
            self._backend.remove_node(node_id)

    def withdraw(self) -> None:
        if self._backend is not None:
            self._backend.shut_down()
            self._backend.remove_node(self.node_id)

    def _next_rendezvous(self) -> RendezvousInfo:
        retries = _RETRIES_WITH_ENOUGH_NODES
        while True:
            try:
                return self._handler.next_rendezvous()
            except DistStoreError as error:  # another node died before it answered
                print(error, file=sys.stderr)
            except RendezvousTimeoutError:
                if self.running_without():
                    continue  # a spare, or a node to be taken in, waits for as long as the job runs
                if not retries or (self._nodes_that_came() or 0) < self._settings.min_nodes:
                    raise
                retries -= 1  # enough nodes came, but had not agreed before the timeout

    def _nodes_that_came(self) -> int | None:
        """This node, which has withdrawn after its timeout, and the others; None if that is not known."""
        return None if self._backend is None else len(self._backend.participants()) + 1

    def _job_has_ended(self) -> Refused:
        """The refusal of a job that ended while this node waited ("over"), or before it came ("closed")."""
        backend = self._backend
        outcome = None if backend is None else backend.outcome
        if backend is None or outcome is None or not (backend.was_open or self._settings.has_met):
            advice = "choose another --rdzv-id for a new one"
            return Refused("closed", f"the job with the id {self._settings.run_id} has ended: {advice}")
        how = "has finished" if outcome == 0 else f"has ended with exit code {outcome}"
        return Refused("over", f"the job {how}; this node was not needed", outcome)

    def _generation_store(self, agreed: Store, rank: int) -> SignedStore:
        """A store for one generation, where that of the rendezvous, `agreed`, cannot compare and set.

        Node 0 serves it, and publishes its address in `agreed`.
        """
        number = 0 if self._backend is None else self._backend.round_of(self.node_id)
        directory = SignedStore(agreed, self._signer, f"launch/{number}/")
        if rank == 0:
            served = serve(self._addr, listening_address((self._addr, 0), None), 0)
            self._served.append(served)
            nonce = uuid.uuid4().hex
            directory.set("store", json.dumps([self._addr, served.port, nonce]))
            return SignedStore(served, self._signer.within(nonce))
        published = directory.wait("store", seconds=_STORE_ADDRESS_TIMEOUT)
        if published is None:
            raise Refused(
                "usage",
                "no node that has this node's secret says where the store is: give all nodes the same one",
            )
        addr, port, nonce = json.loads(published[0])
        return SignedStore(connect(addr, port, _STORE_ADDRESS_TIMEOUT), self._signer.within(nonce))
