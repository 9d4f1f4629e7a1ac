"""What a member needs of a rendezvous, whatever the backend: generations, and which nodes wait or are lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from launcher.rendezvous.member.stores import SignedStore

__all__ = ["GenerationInfo", "Notify", "Rendezvous"]

Notify = Callable[[str], None]
"""Called with lines for the user."""


@dataclass(frozen=True)
class GenerationInfo:
    """A generation that has formed, as one of its nodes sees it.

    Args:
        rank: this node's number.
        size: how many nodes there are.
        store: a store whose keys no other generation reads.
        is_host: true if this process serves `store`.
    """

    rank: int
    size: int
    store: SignedStore
    is_host: bool


class Rendezvous(Protocol):
    """Forms generations, one after the other."""

    node_id: str
    """Identifies this node, in this process, to the other nodes."""

    store: SignedStore | None
    """The job's store for what outlives a generation; None: each generation has a store of its own."""

    is_host: bool
    """True if this process serves `store`."""

    def next_generation(self) -> GenerationInfo:
        """Leave the current generation, and wait for the next one with this node in it.

        Raises `Refused`; RuntimeError or RendezvousConnectionError if the store is gone.
        """

    def running_without(self) -> int:
        """How many nodes the job runs on while this one waits; 0: it does not run, or that is not known."""

    def is_in(self) -> bool:
        """True if this node is in the current generation, as far as is known.

        False from the moment `next_generation` leaves one until the next one has formed.
        """

    def waiting(self) -> int:
        """How many nodes wait to be taken in, and have sent heartbeats since the last generation formed."""

    def end_job(self, exit_code: int) -> None:
        """Refuse all nodes that wait or come from now on: the job has ended with `exit_code`."""

    def remove_node(self, node_id: str) -> None:
        """Take a lost node out, so that no other node waits for it."""

    def withdraw(self) -> None:
        """Take this node out for good, so that no other node waits for it."""
