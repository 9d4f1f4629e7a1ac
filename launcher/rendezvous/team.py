"""The nodes of a team and the ranks that each of them gets in a round. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["RankAssignment", "Ready", "Team"]


@dataclass(frozen=True)
class Team:
    """The nodes of one generation.

    Args:
        rank: this node's number.
        hosts: host names, by node.
    """

    rank: int
    hosts: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.hosts)


@dataclass(frozen=True)
class Ready:
    """What a node contributes to the next round.

    Args:
        slots: device slots of its workers; one worker a slot.
        addr: the address at which the other nodes reach it.
        port: a port at which it can serve the round's store.
        number: the lowest number that the round can have, by this node's run directory.
    """

    slots: tuple[int, ...]
    addr: str
    port: int
    number: int

    def to_json(self) -> dict[str, Any]:
        return {"kind": "ready", **asdict(self)}

    @classmethod
    def from_json(cls, message: Mapping[str, Any]) -> Ready:
        slots = tuple(message["slots"])
        return cls(slots, message["addr"], message["port"], message["number"])


@dataclass(frozen=True)
class RankAssignment:
    """A round as every node computes it from all `Ready` messages: which node has which ranks.

    Args:
        number: the round.
        node: this node.
        workers: how many workers each node has, by node.
        slots: device slots of this node's workers, by local rank.
        addr: MASTER_ADDR, that of node 0.
        port: MASTER_PORT.
    """

    number: int
    node: int
    workers: tuple[int, ...]
    slots: tuple[int, ...]
    addr: str
    port: int

    @classmethod
    def of(cls, node: int, readies: Mapping[int, Ready]) -> RankAssignment:
        """The assignment that follows from what every node, by number, has sent."""
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
        """This node's ranks, in the order of its local ranks."""
        return range(self.first_rank, self.first_rank + len(self.slots))
