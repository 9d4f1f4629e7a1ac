"""A rendezvous of nodes whose ranks the scheduler assigned."""

from __future__ import annotations

import time
import uuid

from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
)

from launcher.rendezvous.client import RendezvousSettings
from launcher.rendezvous.member.connect import (
    too_few,
)
from launcher.rendezvous.member.protocol import Seat
from launcher.rendezvous.member.refused import Refused
from launcher.rendezvous.member.stores import (
    SignedStore,
)

__all__ = ["Fixed"]


_ROLL_CALL = 0.1  # seconds between two looks at who has come


class Fixed:
    """The same `max_nodes` nodes in each generation, with ranks that they were given.

    Each node that comes leaves a ticket. When node 0 has a new ticket of every rank it gives them the number
    of the generation; a ticket is good for one.
    """

    def __init__(
        self, settings: RendezvousSettings, patience: float, store: SignedStore, is_host: bool
    ) -> None:
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
                raise too_few(self._settings, came, self._patience)
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

    def remove_node(self, node: str) -> None:
        pass  # its place is kept

    def withdraw(self) -> None:
        self._has_left = True
