"""Who takes part in a job: the nodes of a team, and what they tell each other before a round. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["RankAssignment", "Ready", "Team"]


@dataclass(frozen=True)
class Team:
    """The nodes that one rendezvous brought together. This one is number `rank`."""

    rank: int
    hosts: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.hosts)


@dataclass(frozen=True)
class Ready:
    """What a node brings to the next round."""

    slots: tuple[int, ...]  # of the devices that it has workers for; as many workers as slots
    addr: str  # at which the other nodes reach it
    port: int  # at which the round's store can listen there
    number: int  # the lowest that the round can have, by this node's run directory

    def to_json(self) -> dict[str, Any]:
        return {"kind": "ready", **asdict(self)}

    @classmethod
    def from_json(cls, message: Mapping[str, Any]) -> Ready:
        slots = tuple(message["slots"])
        return cls(slots, message["addr"], message["port"], message["number"])


@dataclass(frozen=True)
class RankAssignment:
    """A round as every node works it out from all `Ready`: who has which ranks, and where they meet."""

    number: int
    node: int  # this one
    workers: tuple[int, ...]  # by node
    slots: tuple[int, ...]  # of this node's workers, by local rank
    addr: str
    port: int

    @classmethod
    def of(cls, node: int, readies: Mapping[int, Ready]) -> RankAssignment:
        host = readies[0]
        return cls(
            number=max(ready.number for ready in readies.values()),
            node=node,
            workers=tuple(len(readies[other].slots) for other in range(len(readies))),
            slots=readies[node].slots,
            addr=host.addr,
            port=host.port,
        )

    @property
    def nodes(self) -> int:
        return len(self.workers)

    @property
    def world(self) -> int:
        return sum(self.workers)

    @property
    def first_rank(self) -> int:
        return sum(self.workers[: self.node])

    @property
    def ranks(self) -> range:
        """This node's, in the order of its local ranks."""
        return range(self.first_rank, self.first_rank + len(self.slots))
