"""One node's part in the log of a generation: sends its messages, receives all, and relays if it is its turn."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from launcher.rendezvous.member.message_log import Inbox, LogReader, LogState, LogWriter, Record
from launcher.rendezvous.member.signing import ForgedError
from launcher.rendezvous.member.stores import SignedStore

__all__ = ["Message", "TeamLog"]

Message = dict[str, Any]

_PACE = 0.0002
"""Seconds for each node of the team in which a relay looks for more messages before it appends those that it has.

Each node reads each entry, with three requests, and a store answers about 30,000 a second (scripts/bench/nodes).
"""

_MAX_PACES = 5  # for which more messages may come, until an entry is made
_PATIENCE = 1.0  # seconds for a relay to append a message, and some paces
_PATIENCE_PACES = 20


class TeamLog:
    """Sends and receives the messages of one node of a generation.

    Callbacks are called from threads of this object.

    Args:
        rank: this node.
        size: how many nodes there are.
        store: of the generation.
        on_message: called with the sending node and the message, for every message in the order of the log.
        on_forged: called with the error if the log is overwritten by other processes.
        on_store_lost: called with the error if the store is gone.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: SignedStore,
        on_message: Callable[[int, Message], None],
        on_forged: Callable[[ForgedError], None],
        on_store_lost: Callable[[RuntimeError], None],
    ) -> None:
        self._rank = rank
        self._reader = LogReader(store.connect_again())
        self._sending = store.connect_again()
        # Other nodes connect when they begin to relay.
        self._relaying = store.connect_again() if rank == 0 else None
        self._on_message = on_message
        self._on_forged = on_forged
        self._on_store_lost = on_store_lost
        self._pace = _PACE * size
        self._changed = threading.Condition()  # guards all that follows
        self._state = LogState(size)  # as far as this node has read
        self._unwritten: dict[int, Message] = {}  # messages that are not in the log yet, by serial
        self._serial = 0
        self._is_relaying = False
        self._is_over = False

    def start(self) -> None:
        """Start to receive and send messages."""
        self._run_in_thread(self._run_reader)
        self._run_in_thread(self._run_writer)
        self._relay_if_due()

    def broadcast(self, message: Message) -> None:
        """Send `message` to all nodes, this one included; returns at once."""
        with self._changed:
            self._serial += 1
            self._unwritten[self._serial] = message
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Wait until all messages of this node are in the log, for at most `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unwritten, seconds)

    def append_only(self, message: Message) -> None:
        """Call it instead of `start`: appends `message`, and nothing else."""
        writer = LogWriter(self._sending, self._rank, self._state)
        while not writer.append([Record(self._rank, 1, message)]) and self._rank not in writer.state.lost:
            pass

    def stop(self) -> None:
        """Receive and send no more."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _run_in_thread(self, run: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                run()
            except ForgedError as error:
                if not self._is_over:
                    self._on_forged(error)
            except RuntimeError as error:
                if not self._is_over:
                    self._on_store_lost(error)

        threading.Thread(target=guarded, name="generation", daemon=True).start()

    # -- receiving

    def _run_reader(self) -> None:
        while not self._is_over:
            entry = self._reader.next()
            if entry is None:
                continue
            with self._changed:
                records = self._state.add(entry)
                for record in entry.records:
                    if record.node == self._rank:
                        self._unwritten.pop(record.serial, None)
                self._changed.notify_all()
            self._relay_if_due()
            for record in records:
                if not self._is_over:
                    self._on_message(record.node, record.message)

    # -- sending

    def _run_writer(self) -> None:
        """Put messages into the inbox of the next entry, until they are in the log."""
        inbox = Inbox(self._sending)
        entry, last = -1, 0  # in whose inbox messages of this node are, and the serial of the last of them
        deadline = math.inf

        def has_unsent() -> bool:
            return bool(self._unwritten) and (self._state.entries != entry or max(self._unwritten) > last)

        while True:
            with self._changed:
                patience = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
                self._changed.wait_for(lambda: self._is_over or has_unsent(), patience)
                if self._is_over:
                    return
                state = self._state.copy()
                records = [Record(self._rank, *message) for message in self._unwritten.items()]
            if not records:
                deadline = math.inf
                continue
            if time.monotonic() >= deadline or any(_is_loss_of(state.relay, record) for record in records):
                self._take_over(LogWriter(self._sending, self._rank, state), records)
            else:
                is_same = state.entries == entry
                inbox.put(
                    state.entries, [record for record in records if not is_same or record.serial > last]
                )
            entry, last = state.entries, records[-1].serial
            deadline = time.monotonic() + _PATIENCE + _PATIENCE_PACES * self._pace

    def _take_over(self, writer: LogWriter, records: list[Record]) -> None:
        """Append without the relay, and relay from now on, unless another node was faster."""
        if writer.append(records):
            self._relay_if_due(writer.state)

    # -- relaying

    def _relay_if_due(self, state: LogState | None = None) -> None:
        """Begin to relay if this node is the relay in `state`, by default as far as it has read."""
        with self._changed:
            state = state or self._state.copy()
            if state.relay != self._rank or self._is_relaying or self._is_over:
                return
            self._is_relaying = True
        self._run_in_thread(lambda: self._run_relay(state))

    def _run_relay(self, state: LogState) -> None:
        """Make entries of what is in the inboxes, while this node is the relay."""
        store = self._relaying = self._relaying or self._sending.connect_again()
        writer, inbox = LogWriter(store, self._rank, state), Inbox(store)
        while not self._is_over and writer.state.relay == self._rank:
            entry = writer.state.entries
            if inbox.wait(entry):
                # Without a new message in it, the entry makes those who have come too late for it try again.
                writer.append(self._gather(inbox, entry))
                inbox.remove(entry)
            with self._changed:
                if self._state.entries > writer.state.entries:  # another node has taken over
                    writer = LogWriter(store, self._rank, self._state)
        self._is_relaying = False

    def _gather(self, inbox: Inbox, entry: int) -> list[Record]:
        """What is in the inbox of `entry` when no more comes, or when that has gone on for some time."""
        records: list[Record] = []
        for _ in range(_MAX_PACES):
            time.sleep(self._pace)
            found = inbox.take(entry)
            if len(found) == len(records):
                break
            records = found
        return records


def _is_loss_of(node: int, record: Record) -> bool:
    """True if a node reports that another one, `node`, is lost."""
    message = record.message
    return message.get("kind") == "lost" and message["node"] == node != record.node
