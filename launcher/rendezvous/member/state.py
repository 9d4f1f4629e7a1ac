"""The state of torch's elastic rendezvous as plain JSON: what comes from other nodes is never unpickled.

torch hands its state to a backend as a pickle, and unpickles what it gets back. Here it gets back a pickle
that was made in this process, of values whose types were looked at one by one.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

__all__ = ["State", "StateError", "decode_state", "encode_state", "from_torch", "to_torch"]

State = _RendezvousState


class StateError(ValueError):
    """A text that is no state of a rendezvous."""


def from_torch(bits: bytes) -> State:
    """The state that torch, in this process, has made `bits` of."""
    state = pickle.loads(bits)
    assert isinstance(state, State)
    return state


def to_torch(state: State) -> bytes:
    """`state` as torch wants to get it."""
    return pickle.dumps(state)


def encode_state(state: State) -> str:
    """`state` as JSON: equal texts for equal states."""
    return json.dumps(
        {name: _FIELDS[name][0](value) for name, value in vars(state).items()}, sort_keys=True
    )


def decode_state(text: str) -> State:
    """The state that `text` was made of. Raises `StateError` for anything else."""
    state = State()
    try:
        plain = json.loads(text)
        if not isinstance(plain, dict) or set(plain) != set(vars(state)):
            raise StateError(f"expected {sorted(vars(state))}")
        for name, value in plain.items():
            setattr(state, name, _FIELDS[name][1](value))
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise StateError(str(error)) from None
    return state


def _exactly(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise StateError(f"expected {kind.__name__}, found {type(value).__name__}")
        return value

    return check


def _time(value: str) -> datetime:
    time = datetime.fromisoformat(_exactly(str)(value))
    if time.tzinfo is None:
        raise StateError("expected a time with its zone")
    return time


def _node(value: Any) -> _NodeDesc:
    addr, pid, local_id = _exactly(list)(value)
    return _NodeDesc(_exactly(str)(addr), _exactly(int)(pid), _exactly(int)(local_id))


def _plain_node(node: _NodeDesc) -> list[Any]:
    return [node.addr, node.pid, node.local_id]


def _plain_nodes(nodes: set[_NodeDesc]) -> list[Any]:
    return [_plain_node(node) for node in sorted(nodes)]


def _plain_table(write: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda table: [[_plain_node(node), write(table[node])] for node in sorted(table)]


def _table(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda pairs: {_node(node): read(value) for node, value in _exactly(list)(pairs)}


def _same(value: Any) -> Any:
    return value


def _nodes(value: Any) -> set[_NodeDesc]:
    return set(map(_node, _exactly(list)(value)))


_FIELDS: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "round": (_same, _exactly(int)),
    "complete": (_same, _exactly(bool)),
    "closed": (_same, _exactly(bool)),
    "deadline": (
        lambda time: time and time.isoformat(),
        lambda text: None if text is None else _time(text),
    ),
    "participants": (_plain_table(_same), _table(_exactly(int))),
    "wait_list": (_plain_nodes, _nodes),
    "redundancy_list": (_plain_nodes, _nodes),
    "last_heartbeats": (_plain_table(datetime.isoformat), _table(_time)),
}
"""Each of the state's attributes: how it is written, and how read."""
