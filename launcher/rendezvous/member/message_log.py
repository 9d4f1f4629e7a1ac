"""One totally ordered log of messages in a store, to which every node appends and which every node reads.

Entry n has the key `log/n`. A node creates it with a compare-and-set, and only after it has read all entries
before n: so there are no holes, whichever node dies in between, and a node knows every message before its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.rendezvous.member.signing import ForgedError
from launcher.rendezvous.member.stores import SignedStore

__all__ = ["LogEntry", "LogReader", "LogWriter"]

_WAIT = 2.0  # seconds that one call waits for an entry
_FORGED_WAITS = 3  # such calls in a row that find a forged entry, after which the entry is lost


@dataclass(frozen=True)
class LogEntry:
    """What one node has appended at once: its `serial`-th entry."""

    node: int
    serial: int
    messages: Sequence[dict[str, Any]]


def _decode(text: str) -> LogEntry:
    return LogEntry(**json.loads(text))


class LogReader:
    """Reads the log from its beginning.

    Args:
        store: a connection that nothing else uses: `next` blocks it.
    """

    def __init__(self, store: SignedStore) -> None:
        self._store = store
        self._next = 0
        self._forged = 0  # calls in a row that have found a forged entry

    def next(self) -> LogEntry | None:
        """Wait for the next entry; None if there is none after two seconds.

        Raises RuntimeError if the store is gone, and `ForgedError` if the entry, which other nodes may have read,
        was overwritten.
        """
        key = f"log/{self._next}"
        texts = self._store.wait(key, seconds=_WAIT)
        if texts is not None:
            self._next += 1
            self._forged = 0
            return _decode(texts[0])
        self._forged = self._forged + 1 if self._store.exist([key]) else 0
        if self._forged == _FORGED_WAITS:
            raise ForgedError(f"{key} is not what a node of this job has written")
        return None


class LogWriter:
    """Appends to the log for one node, an entry at a time."""

    def __init__(self, store: SignedStore, node: int) -> None:
        self._store = store
        self._node = node
        self._next = 0
        self._serial = 0

    def append(
        self,
        messages: Sequence[dict[str, Any]],
        on_entry: Callable[[LogEntry], None],
        is_wanted: Callable[[dict[str, Any]], bool],
    ) -> None:
        """Append those of `messages` that are still wanted when all earlier entries are known.

        Args:
            messages: JSON objects.
            on_entry: called with each entry, in order, up to the own one.
            is_wanted: called with each message once the earlier entries have gone through `on_entry`.

        Raises:
            RuntimeError: the store is gone; the entry may exist or not.
            ForgedError: another process overwrites the entry again and again.
        """
        self._serial += 1
        while kept := [message for message in messages if is_wanted(message)]:
            own = LogEntry(self._node, self._serial, kept)
            found = _decode(self._store.create(f"log/{self._next}", json.dumps(asdict(own))))
            self._next += 1
            on_entry(found)
            if (found.node, found.serial) == (own.node, own.serial):
                return
