"""One totally ordered log of messages in a store, which every node reads, and to which one node appends for all.

Entry n has the key `log/n`. A node creates it with a compare-and-set, and only after it has read all entries
before n: so there are no holes, whichever node dies in between, and a node knows every message before its own.

If every node created the entries for its own messages, all would read each other's in turns: requests in
proportion to the square of the number of nodes. Instead, each node puts its messages into the inbox of the next
entry, `inbox/n`, and one node, the relay, makes an entry of what it finds there. Who finds an entry without its
own messages puts them into the next inbox. Any node may create an entry at any time, and is the relay from then
on: which node relays decides how fast messages arrive, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.rendezvous.member.packed_json import pack_json, unpack_json
from launcher.rendezvous.member.stores import SignedStore

__all__ = ["Inbox", "LogReader", "LogState", "LogWriter", "Record"]

_WAIT = 30.0
"""Seconds that one call waits for an entry, or for something in an inbox.

A wait in vain is better avoided: torch then resolves the names of both ends of the connection. That takes
seconds where no server for names answers.
"""

_MAX_ENTRY = 4 << 20  # characters; a store refuses values of 8 MiB
_FORGED_PATIENCE = 6.0  # seconds for a node to replace a forged entry


@dataclass(frozen=True)
class Record:
    """A message in the log: the `serial`-th of its node, from 1."""

    node: int
    serial: int
    message: dict[str, Any]

    def to_json(self) -> list[Any]:
        return [self.node, self.serial, self.message]


@dataclass(frozen=True)
class LogEntry:
    """What node `by` has appended at once."""

    by: int
    records: Sequence[Record]

    def encode(self) -> str:
        return pack_json([self.by, [record.to_json() for record in self.records]])

    @classmethod
    def decode(cls, text: str) -> LogEntry:
        by, records = unpack_json(text)
        return cls(by, [Record(*record) for record in records])


@dataclass
class LogState:
    """What follows from the log up to an entry. Pure: the same for every node that has read so far.

    Args:
        size: how many nodes there are.
        entries: how many entries have been read, which is the number of the next.
        lost: the nodes that are reported as lost.
    """

    size: int
    entries: int = 0
    lost: set[int] = field(default_factory=set)
    _last_by: int = 0
    _serials: dict[int, int] = field(default_factory=dict)  # by node: of its last message

    @property
    def relay(self) -> int:
        """The node that appends for all: the one that has appended last, or else the first that is not lost."""
        if self._last_by not in self.lost:
            return self._last_by
        return next((node for node in range(self.size) if node not in self.lost), self._last_by)

    def copy(self) -> LogState:
        return LogState(self.size, self.entries, set(self.lost), self._last_by, dict(self._serials))

    def add(self, entry: LogEntry) -> list[Record]:
        """Take in the next entry; return its records that count, in their order.

        Later messages of a lost node do not count, nor do further reports of its loss.
        """
        self.entries += 1
        self._last_by = entry.by
        return [record for record in entry.records if self._add(record)]

    def new_records(self, records: Iterable[Record]) -> list[Record]:
        """Those of `records`, in their order, that the log has not, and that continue those of their nodes."""
        state = self.copy()
        return [record for record in records if state._continues(record)]

    def _continues(self, record: Record) -> bool:
        is_next = record.node not in self.lost and record.serial == self._serials.get(record.node, 0) + 1
        if is_next:
            self._serials[record.node] = record.serial
        return is_next

    def _add(self, record: Record) -> bool:
        if not self._continues(record):
            return False
        if record.message.get("kind") == "lost":
            if record.message["node"] in self.lost:
                return False
            self.lost.add(record.message["node"])
        return True


class LogReader:
    """Reads the log from its beginning.

    Args:
        store: a connection that nothing else uses: `next` blocks it.
    """

    def __init__(self, store: SignedStore) -> None:
        self._store = store
        self._next = 0

    def next(self) -> LogEntry | None:
        """Wait for the next entry; None if there is none after half a minute.

        Raises RuntimeError if the store is gone, and `ForgedError` if the entry, which other nodes may have read,
        was overwritten.
        """
        text = self._store.receive(f"log/{self._next}", _WAIT, _FORGED_PATIENCE)
        if text is None:
            return None
        self._next += 1
        return LogEntry.decode(text)


class LogWriter:
    """Appends entries for node `node`, which has read the log up to `state`."""

    def __init__(self, store: SignedStore, node: int, state: LogState) -> None:
        self._store = store
        self._node = node
        self.state = state.copy()

    def append(self, records: Iterable[Record]) -> bool:
        """Create the next entry, of those of `records` that the log has not.

        Returns False if there was one already. Either way, `state` includes that entry.

        Raises:
            RuntimeError: the store is gone; the entry may exist or not.
            ForgedError: another process overwrites the entry again and again.
        """
        own = self._encode(self.state.new_records(records))
        found = self._store.create(f"log/{self.state.entries}", own)
        self.state.add(LogEntry.decode(found))
        return found == own

    def _encode(self, records: Sequence[Record]) -> str:
        """An entry of `records`, or of as many of the first as a store takes: the others are sent again."""
        while len(text := LogEntry(self._node, records).encode()) > _MAX_ENTRY and len(records) > 1:
            records = records[: len(records) // 2]
        return text


class Inbox:
    """The messages that wait to become an entry of the log.

    Args:
        store: a connection that `receive` blocks.
    """

    def __init__(self, store: SignedStore) -> None:
        self._store = store

    def put(self, entry: int, records: Iterable[Record]) -> None:
        """Have the relay append `records` as a part of entry number `entry`, if it does not exist yet."""
        self._store.add_line(f"inbox/{entry}", pack_json([record.to_json() for record in records]))

    def wait(self, entry: int) -> bool:
        """Wait for something in the inbox of `entry`; False if there is nothing after half a minute."""
        return self._store.wait_for_any(f"inbox/{entry}", _WAIT)

    def take(self, entry: int) -> list[Record]:
        """The records in the inbox of `entry`, in which something is."""
        texts = self._store.lines(f"inbox/{entry}")
        return [Record(*record) for text in texts for record in unpack_json(text)]

    def remove(self, entry: int) -> None:
        """Delete the inbox of an entry that exists."""
        self._store.delete(f"inbox/{entry}")
