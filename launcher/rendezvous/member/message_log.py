"""One totally ordered log of messages on a store, to which every node appends and from which every node reads.

Entry n is the key `log/n`. A node creates it with a compare-and-set, and only after it has seen all entries
before n: so there are no holes, whatever dies in between, and a node knows all that was said before its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.rendezvous.member.signing import ForgedError
from launcher.rendezvous.member.stores import SignedStore

__all__ = ["Entry", "Reader", "Writer"]

_WHILE = 2.0  # seconds of waiting for an entry at a time
_FORGED = 3  # of these, in which something else is in its place


@dataclass(frozen=True)
class Entry:
    """What one node appended at once: its `serial`-th entry."""

    node: int
    serial: int
    messages: Sequence[dict[str, Any]]


def _decode(value: str) -> Entry:
    return Entry(**json.loads(value))


class Reader:
    """Reads the log from its beginning. `store` must be a connection of its own: `next` blocks it."""

    def __init__(self, store: SignedStore) -> None:
        self._store = store
        self._next = 0
        self._forged = 0  # times that something else was found in its place, in a row

    def next(self) -> Entry | None:
        """Wait for the next entry; None: there is none yet, after a while.

        Raises RuntimeError if the store is gone, `ForgedError` if the entry is lost, which others may have
        read.
        """
        key = f"log/{self._next}"
        texts = self._store.wait(key, seconds=_WHILE)
        if texts is not None:
            self._next += 1
            self._forged = 0
            return _decode(texts[0])
        self._forged = self._forged + 1 if self._store.exist([key]) else 0
        if self._forged == _FORGED:
            raise ForgedError(f"{key} is not what a node of this job has written")
        return None


class Writer:
    """Appends to the log for node `node`, one entry at a time."""

    def __init__(self, store: SignedStore, node: int) -> None:
        self._store = store
        self._node = node
        self._next = 0
        self._serial = 0

    def append(
        self,
        messages: Sequence[dict[str, Any]],
        seen: Callable[[Entry], None],
        still: Callable[[dict[str, Any]], bool],
    ) -> None:
        """Append those `messages` for which `still` is true when all entries before have gone through `seen`.

        Raises RuntimeError if the store is gone; the entry may then exist or not. `ForgedError`: others write
        there.
        """
        self._serial += 1
        while kept := [message for message in messages if still(message)]:
            own = Entry(self._node, self._serial, kept)
            found = _decode(self._store.create(f"log/{self._next}", json.dumps(asdict(own))))
            self._next += 1
            seen(found)
            if (found.node, found.serial) == (own.node, own.serial):
                return
