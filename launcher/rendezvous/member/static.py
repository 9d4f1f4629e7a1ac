"""The rendezvous of nodes whose numbers the scheduler has assigned."""

from __future__ import annotations

import time
import uuid

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

    def next_generation(self) -> GenerationInfo:
        ticket = uuid.uuid4().hex
        self._tickets.set(f"ticket/{self._rank}", ticket)
        deadline = time.monotonic() + self._join_timeout
        while (name := self._tickets.get(f"generation/{ticket}")) is None:
            came = self._begin_if_complete() if self._rank == 0 else None
            if time.monotonic() > deadline:
                raise too_few_nodes(self._settings, came, self._join_timeout)
            if self._has_left:
                raise RendezvousConnectionError("this node has left")
            time.sleep(_POLL)
        return GenerationInfo(self._rank, self._size, self._tickets.part(name), self.is_host)

    def _begin_if_complete(self) -> int:
        """Begin a generation if every node has a new ticket; return how many have."""
        tickets = [self._tickets.get(f"ticket/{rank}") for rank in range(self._size)]
        new = [one for one in tickets if one is not None and not self._tickets.get(f"generation/{one}")]
        if len(new) == self._size:
            name = uuid.uuid4().hex
            for ticket in new:
                self._tickets.set(f"generation/{ticket}", name)
        return len(new)

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
