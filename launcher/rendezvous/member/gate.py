"""What stands between torch's rendezvous and the place where its state is kept.

torch's handler has no way to leave a rendezvous without closing it for all, and none to take out a node that
is known to be dead, so that all would wait until its keep-alive is too old. And it unpickles whatever it
finds, from whomever.
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
from launcher.rendezvous.member.state import State, decode_state, encode_state, from_torch, to_torch
from launcher.rendezvous.member.stores import Store

__all__ = ["Gate", "OverwrittenError", "StoreBackend", "known_as"]

_KEY = "state"
_NOTHING = b"-"
_REPAIRS = 20  # of a state that others overwrite, one after the other, before that is given up
_REPAIR_PAUSE = 0.3  # seconds that nodes which know the state get to put it right


class OverwrittenError(RendezvousStateError):
    """The state is not of this job's nodes, and this node cannot put it right."""


class StoreBackend(RendezvousBackend):
    """Keeps torch's state under one key of a store that can compare and set."""

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key

    @property
    def name(self) -> str:
        return "c10d"

    def get_state(self) -> tuple[bytes, Token] | None:
        found = self._compare_set(b"", _NOTHING)
        return None if found == _NOTHING else (found, found)

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        found = self._compare_set(_NOTHING if token is None else token, state)
        return None if found == _NOTHING else (found, found, found == state)

    def _compare_set(self, expected: bytes, wanted: bytes) -> bytes:
        try:
            return self._store.compare_set(self._key, expected, wanted)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise RendezvousConnectionError(str(error)) from error


@dataclass(frozen=True)
class _Record:
    """A state as it is kept: the `serial`-th that the nodes of a job have agreed on."""

    state: State
    serial: int
    outcome: int | None  # the exit code that the job has ended with

    def pack(self, signer: Signer) -> bytes:
        head = {"serial": self.serial, "outcome": self.outcome, "state": encode_state(self.state)}
        return signer.sign(_KEY, json.dumps(head).encode())

    @classmethod
    def unpack(cls, stored: bytes, signer: Signer) -> _Record | None:
        """The record that was packed so; None if no node of the job has."""
        text = signer.read(_KEY, stored)
        try:
            found = None if text is None else json.loads(text)
            match found:
                case {"serial": int(serial), "outcome": int() | None as outcome, "state": str(state)}:
                    return cls(decode_state(state), serial, outcome)
        except ValueError:
            pass
        return None


class Gate(RendezvousBackend):
    """The state of a rendezvous in `backend`, for torch's handler and for this node's own questions.

    What no node of the job has written, and what is older than what this node has seen, is put right with the
    newest state that this node knows. One that knows none waits for others to do so, `pause` seconds at a
    time. May be used by several threads.
    """

    def __init__(self, backend: RendezvousBackend, signer: Signer, pause: float = _REPAIR_PAUSE) -> None:
        self._backend = backend
        self._pause = pause
        self._signer = signer
        self._lock = threading.RLock()  # of what this process reads and writes, one after the other
        self._newest: _Record | None = None
        self._outcome: int | None = None  # of the job, as this node tells it
        self._round: dict[str, int] = {}
        self._is_shut = False
        self.was_open = False
        """Whether this node has seen the job while it had not ended."""

    @property
    def name(self) -> str:
        return self._backend.name

    def get_state(self) -> tuple[bytes, Token] | None:
        self._check()
        found = self._read()
        return None if found is None else self._hand_over(*found)

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        self._check()
        has_set, found = self._write(from_torch(state), token)
        return None if found is None else (*self._hand_over(*found), has_set)

    def round_of(self, name: str) -> int:
        """The last round of the rendezvous that torch's handler has seen complete, with the node `name` in
        it."""
        return self._round[name]

    def look(self) -> State:
        """The state as it is; that of a rendezvous which nobody has come to yet if there is none."""
        found = self._read()
        return State() if found is None else found[0].state

    @property
    def outcome(self) -> int | None:
        """The exit code that the job has ended with, if it has, as far as this node has seen."""
        return None if self._newest is None else self._newest.outcome

    def participants(self) -> list[str]:
        """The nodes that take part, by the `name` of their meetings."""
        return [known_as(desc) for desc in self.look().participants]

    def waiting(self) -> Mapping[str, str]:
        """Who waits to be taken in, each with its last sign of life."""
        state = self.look()
        return {str(desc): str(state.last_heartbeats.get(desc)) for desc in state.wait_list}

    def shut(self) -> None:
        """Let the handler through no more. It goes on to try, and need not say so each time."""
        self._is_shut = True
        logging.getLogger(DynamicRendezvousHandler.__module__).setLevel(logging.CRITICAL)

    def record_outcome(self, exit_code: int) -> None:
        """Have what this node writes from now on say what the job has ended with."""
        self._outcome = exit_code

    def remove_node(self, node: str) -> None:
        """Mark a node as dead since long; all count it out at their next look, as one without keep-alive."""
        has_set = False
        while not has_set and (found := self._read()) is not None:
            record, token = found
            state = from_torch(to_torch(record.state))
            dead = [desc for desc in state.last_heartbeats if known_as(desc) == node]
            if not dead:
                return
            state.last_heartbeats.update(dict.fromkeys(dead, datetime.min.replace(tzinfo=UTC)))
            has_set, _ = self._write(state, token)

    def _hand_over(self, record: _Record, token: Token) -> tuple[bytes, Token]:
        if record.state.complete:
            for desc in record.state.participants:
                self._round[known_as(desc)] = record.state.round
        return to_torch(record.state), token

    def _write(self, state: State, token: Token | None) -> tuple[bool, tuple[_Record, Token] | None]:
        """Whether `state` is written now, in place of the one that `token` stands for, and what there is
        then."""
        with self._lock:
            record = _Record(
                state, self._serial + 1, self.outcome if self._outcome is None else self._outcome
            )
            written = self._backend.set_state(record.pack(self._signer), token)
            if written is not None and written[2]:
                self._newest = record
                return True, (record, written[1])
            return False, self._read()

    def _read(self) -> tuple[_Record, Token] | None:
        """The state that the nodes of this job have agreed on, and what stands for it; None: none as yet."""
        for _ in range(_REPAIRS):
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
        if self._is_shut:
            raise RendezvousConnectionError("this node has left")


def known_as(desc: Any) -> str:
    """The `name` of the meeting of a node that torch's state describes so."""
    return f"{desc.addr}/{desc.pid}"
