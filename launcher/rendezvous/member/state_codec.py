"""The state of torch's elastic rendezvous as plain JSON: nothing that other nodes send is ever unpickled.

torch passes its state to a backend as a pickle, and unpickles what the backend returns. Here the backend returns
a pickle made in this process, from values whose types were checked one by one.
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
    """A text that does not encode a rendezvous state."""


def from_torch(bits: bytes) -> State:
    """The state that torch, in this process, has pickled as `bits`."""
    state = pickle.loads(bits)
    assert isinstance(state, State)
    return state


def to_torch(state: State) -> bytes:
    """`state` pickled, as torch expects it."""
    return pickle.dumps(state)


def encode_state(state: State) -> str:
    """`state` as JSON; equal states give equal texts."""
    return json.dumps(
        {name: _FIELDS[name][0](value) for name, value in vars(state).items()}, sort_keys=True
    )


def decode_state(text: str) -> State:
    """The state that `encode_state` has encoded as `text`. Raises `StateError` for any other text."""
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
"""Encoder and decoder of each attribute of the state."""
