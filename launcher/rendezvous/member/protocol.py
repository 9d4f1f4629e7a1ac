"""What a node asks of a rendezvous: a seat in each generation, and word of nodes that come and go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from launcher.rendezvous.member.stores import (
    SignedStore,
)

__all__ = ["Meeting", "Seat"]


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

    def remove_node(self, node: str) -> None:
        """Let nobody wait for a node that is lost; `node` is the `name` of its meeting."""

    def withdraw(self) -> None:
        """Be no part of the rendezvous any more, and let nobody wait for this node."""


Tell = Callable[[str], None]
"""To be called with lines for the user."""
