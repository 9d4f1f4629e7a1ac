"""torch's rendezvous state in a backend: signed, repaired when overwritten, and open to questions of our own.

torch's handler cannot leave a rendezvous without closing it for all nodes, and cannot take out a node that is
known to be dead: all would wait until its keep-alive has expired. And it unpickles whatever it finds, whoever
wrote it. `SignedBackend` stands between the handler and the backend and mends all three.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    Token,
)

from launcher.rendezvous.member.signing import Signer
from launcher.rendezvous.member.state_codec import State, decode_state, encode_state, from_torch, to_torch
from launcher.rendezvous.member.stores import Store

__all__ = ["OverwrittenError", "SignedBackend", "StoreBackend", "node_id_of"]

_KEY = "state"
_EMPTY = b"-"
_MAX_REPAIRS = 20  # of a state that other processes overwrite again and again
_REPAIR_PAUSE = 0.3  # seconds for nodes that know the state to repair it


class OverwrittenError(RendezvousStateError):
    """The state is not of this job's nodes, and this node cannot repair it."""


class StoreBackend(RendezvousBackend):
    """Keeps torch's state under one key of a store that can compare and set."""

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key

    @property
    def name(self) -> str:
        return "c10d"

    def get_state(self) -> tuple[bytes, Token] | None:
        found = self._compare_set(b"", _EMPTY)
        return None if found == _EMPTY else (found, found)

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        found = self._compare_set(_EMPTY if token is None else token, state)
        return None if found == _EMPTY else (found, found, found == state)

    def _compare_set(self, expected: bytes, wanted: bytes) -> bytes:
        try:
            return self._store.compare_set(self._key, expected, wanted)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise RendezvousConnectionError(str(error)) from error


@dataclass(frozen=True)
class _Record:
    """A state as it is stored: the `serial`-th that the nodes of a job have agreed on."""

    state: State
    serial: int
    outcome: int | None  # the exit code with which the job has ended

    def pack(self, signer: Signer) -> bytes:
        content = {"serial": self.serial, "outcome": self.outcome, "state": encode_state(self.state)}
        return signer.sign(_KEY, json.dumps(content).encode())

    @classmethod
    def unpack(cls, stored: bytes, signer: Signer) -> _Record | None:
        """The record in `stored`; None if no node of the job has written it."""
        text = signer.read(_KEY, stored)
        try:
            found = None if text is None else json.loads(text)
            match found:
                case {"serial": int(serial), "outcome": int() | None as outcome, "state": str(state)}:
                    return cls(decode_state(state), serial, outcome)
        except ValueError:
            pass
        return None


class SignedBackend(RendezvousBackend):
    """The state of a rendezvous, for torch's handler and for this node's own questions.

    A value that no node of the job has written, or that is older than one that this node has seen, is replaced
    by the newest state that this node knows. A node that knows none waits for others to do so. Methods may be
    called from several threads; those that read raise `OverwrittenError` if the state cannot be repaired.

    Args:
        backend: where the state is stored.
        signer: signs for the job.
        pause: seconds between two looks of a node that knows no state.
    """

    def __init__(self, backend: RendezvousBackend, signer: Signer, pause: float = _REPAIR_PAUSE) -> None:
        self._backend = backend
        self._pause = pause
        self._signer = signer
        self._lock = threading.RLock()  # serializes this process's reads and writes
        self._newest: _Record | None = None
        self._outcome: int | None = None  # of the job, as this node records it
        self._round: dict[str, int] = {}
        self._is_shut_down = False
        self.was_open = False
        """True if this node has seen the job before its end."""

    @property
    def name(self) -> str:
        return self._backend.name

    def get_state(self) -> tuple[bytes, Token] | None:
        self._check()
        found = self._read()
        return None if found is None else self._for_torch(*found)

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        self._check()
        has_set, found = self._write(from_torch(state), token)
        return None if found is None else (*self._for_torch(*found), has_set)

    def round_of(self, node_id: str) -> int:
        """The last round that torch's handler has seen complete with the node in it."""
        return self._round[node_id]

    def state(self) -> State:
        """The current state; an empty one if no node has come yet."""
        found = self._read()
        return State() if found is None else found[0].state

    @property
    def outcome(self) -> int | None:
        """The exit code with which the job has ended; None as far as this node has not seen one."""
        return None if self._newest is None else self._newest.outcome

    def participants(self) -> list[str]:
        """The node ids in the current generation."""
        return [node_id_of(desc) for desc in self.state().participants]

    def waiting(self) -> Mapping[str, str]:
        """The last heartbeat of each node that waits to be taken in."""
        state = self.state()
        return {str(desc): str(state.last_heartbeats.get(desc)) for desc in state.wait_list}

    def shut_down(self) -> None:
        """Refuse the handler's calls from now on. It goes on trying; its log messages are turned off."""
        self._is_shut_down = True
        logging.getLogger(DynamicRendezvousHandler.__module__).setLevel(logging.CRITICAL)

    def record_outcome(self, exit_code: int) -> None:
        """Add the job's exit code to every state that this node writes from now on."""
        self._outcome = exit_code

    def remove_node(self, node_id: str) -> None:
        """Set a node's keep-alive to long ago, so that all nodes remove it the next time they look."""
        has_set = False
        while not has_set and (found := self._read()) is not None:
            record, token = found
            state = from_torch(to_torch(record.state))
            dead = [desc for desc in state.last_heartbeats if node_id_of(desc) == node_id]
            if not dead:
                return
            state.last_heartbeats.update(dict.fromkeys(dead, datetime.min.replace(tzinfo=UTC)))
            has_set, _ = self._write(state, token)

    def _for_torch(self, record: _Record, token: Token) -> tuple[bytes, Token]:
        if record.state.complete:
            for desc in record.state.participants:
                self._round[node_id_of(desc)] = record.state.round
        return to_torch(record.state), token

    def _write(self, state: State, token: Token | None) -> tuple[bool, tuple[_Record, Token] | None]:
        """Replace the record of `token` by `state`; return whether that succeeded, and the current record."""
        with self._lock:
            outcome = self.outcome if self._outcome is None else self._outcome
            record = _Record(state, self._serial + 1, outcome)
            written = self._backend.set_state(record.pack(self._signer), token)
            if written is not None and written[2]:
                self._newest = record
                return True, (record, written[1])
            return False, self._read()

    def _read(self) -> tuple[_Record, Token] | None:
        """The record on which the nodes of this job have agreed, and its token; None if there is none yet."""
        for _ in range(_MAX_REPAIRS):
            with self._lock:
                stored, token = self._backend.get_state() or (None, None)
                if stored is None and self._newest is None:
                    return None
                record = None if stored is None else _Record.unpack(stored, self._signer)
                if record is not None and record.serial >= self._serial:
                    self._newest = record
                    self.was_open = self.was_open or not record.state.closed
                    return record, token
                if self._newest is not None:
                    self._backend.set_state(self._newest.pack(self._signer), token)
            if self._newest is None:
                time.sleep(self._pause)
        raise OverwrittenError("the state of the rendezvous is not what the nodes of this job have written")

    @property
    def _serial(self) -> int:
        return 0 if self._newest is None else self._newest.serial

    def _check(self) -> None:
        if self._is_shut_down:
            raise RendezvousConnectionError("this node has left")


def node_id_of(desc: Any) -> str:
    """The `node_id` of the node that `desc`, of torch's state, describes."""
    return f"{desc.addr}/{desc.pid}"
