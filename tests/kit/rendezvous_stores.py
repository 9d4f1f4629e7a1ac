"""Clients of a rendezvous's store beside its members, and torch's state as members write it. Imports torch."""

from __future__ import annotations

import pickle
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

from launcher.rendezvous.member.stores import TCPStore, connect
from tests.kit.teams import SLOW, Team

_CONNECTIONS: list[TCPStore] = []  # closed with this process: threads of former generations wait at them


def connect_to(team: Team) -> TCPStore:
    """A connection to the store of a team, which lasts as long as this process."""
    _CONNECTIONS.append(store := connect(*team.endpoint, SLOW))
    return store


class Attacker:
    """A process that reaches the store, but is no node of the job. As a pickle it would leave a trace."""

    def __init__(self, team: Team) -> None:
        self.store = connect_to(team)
        self.trace = team.path / "trace"

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)

    def overwrite(self, *keys: str) -> None:
        """Put a pickle of this object under each of `keys`, which exist."""
        for key in keys:
            assert self.store.check([key])
            self.store.set(key, pickle.dumps(self))

    def all_keys(self) -> list[str]:
        return list(self.store.list_keys())


def torch_state(*addresses: str) -> bytes:
    """A pickled state of torch's rendezvous with every field set and a node at each address."""
    state = _RendezvousState()
    nodes = [_NodeDesc(address, 7, 0) for address in addresses]
    state.round, state.complete, state.deadline = 3, True, datetime.now(UTC)
    state.participants = {node: rank for rank, node in enumerate(nodes)}
    state.wait_list, state.redundancy_list = set(nodes), set(nodes[:1])
    state.last_heartbeats = dict.fromkeys(nodes, datetime.now(UTC))
    return pickle.dumps(state)


def join_generation_threads() -> None:
    """Wait for the threads of generations: they must outlive neither their store nor this process."""
    for thread in threading.enumerate():
        if thread.name == "generation":
            thread.join(SLOW)
