"""The rendezvous of nodes whose numbers the scheduler has assigned."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.conf import join_timeout
from launcher.rendezvous.member.protocol import GenerationInfo
from launcher.rendezvous.member.refusals import too_few_nodes
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.stores import SignedStore

__all__ = ["StaticRendezvous"]

_POLL = 0.1  # seconds between two looks at which nodes have come


class StaticRendezvous:
    """A `Rendezvous` with the same `max_nodes` nodes in each generation.

    Each node that joins writes a ticket, a random text, under its rank. When node 0 has a new ticket of every
    rank, it maps all of them to the name of the next generation; a ticket is used once.

    Args:
        settings: this node's rendezvous. Raises `Refused` if its node rank is missing or out of range.
        store: the job's store.
        is_host: true if this process serves `store`.
    """

    def __init__(self, settings: RendezvousSettings, store: SignedStore, is_host: bool) -> None:
        if settings.node_rank is None or not 0 <= settings.node_rank < settings.max_nodes:
            raise Refused(
                "usage",
                f"--rdzv-backend static wants --node-rank from 0 to {settings.max_nodes - 1}, "
                f"found {settings.node_rank}",
            )
        self._settings = settings
        self._join_timeout = join_timeout(settings)
        self._rank = settings.node_rank
        self._size = settings.max_nodes
        self.node_id = str(settings.node_rank)
        self.store: SignedStore | None = store
        self._tickets = store.part("static")
        self.is_host = is_host
        self._has_left = False
        self._ticket_keys = [f"ticket/{rank}" for rank in range(self._size)]
        self._is_used: dict[str, bool] = {}  # tickets that node 0 has looked at

    def next_generation(self) -> GenerationInfo:
        ticket = uuid.uuid4().hex
        self._tickets.set(f"ticket/{self._rank}", ticket)
        deadline = time.monotonic() + self._join_timeout
        while (name := self._tickets.get(f"generation/{ticket}")) is None:
            if self._rank == 0:
                self._begin_if_complete()
            if time.monotonic() > deadline:
                raise too_few_nodes(self._settings, self._count_that_came(), self._join_timeout)
            if self._has_left:
                raise RendezvousConnectionError("this node has left")
            time.sleep(_POLL)
        return GenerationInfo(self._rank, self._size, self._tickets.part(name), self.is_host)

    def _begin_if_complete(self) -> None:
        """Begin a generation if every node has a new ticket."""
        if not self._tickets.exist(self._ticket_keys):
            return
        new = self._new_tickets(self._tickets.get_all(self._ticket_keys))
        if len(new) == self._size:
            name = uuid.uuid4().hex
            for ticket in new:
                self._tickets.set(f"generation/{ticket}", name)
                self._is_used[ticket] = True

    def _count_that_came(self) -> int | None:
        """How many nodes have a new ticket, as node 0 knows; None on others."""
        if self._rank != 0:
            return None
        return len(self._new_tickets([self._tickets.get(key) for key in self._ticket_keys]))

    def _new_tickets(self, tickets: Sequence[str | None]) -> list[str]:
        """Those of `tickets` that are in no generation yet. Only node 0 begins one: it asks once for each."""
        new = []
        for ticket in tickets:
            if ticket is not None and ticket not in self._is_used:
                self._is_used[ticket] = self._tickets.get(f"generation/{ticket}") is not None
            if ticket is not None and not self._is_used[ticket]:
                new.append(ticket)
        return new

    def running_without(self) -> int:
        return 0  # no generation is without this node

    def is_in(self) -> bool:
        return True  # its rank is reserved

    def waiting(self) -> int:
        return 0  # every node that comes is in the generation already

    def end_job(self, exit_code: int) -> None:
        pass  # later nodes wait for the others in vain; torch's static rendezvous is never closed either

    def remove_node(self, node_id: str) -> None:
        pass  # its rank is reserved

    def withdraw(self) -> None:
        self._has_left = True
