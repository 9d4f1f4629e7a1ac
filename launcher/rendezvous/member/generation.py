"""One generation of a team, as one of its nodes: exchanges hellos, broadcasts, receives, watches heartbeats."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from launcher.rendezvous.member.heartbeat import GONE, HeartbeatWatch
from launcher.rendezvous.member.message_log import LogEntry, LogReader, LogWriter
from launcher.rendezvous.member.protocol import GenerationInfo
from launcher.rendezvous.member.signing import ForgedError

__all__ = ["Generation"]

Message = dict[str, Any]


class Generation:
    """This node's part in one generation.

    Callbacks are called from threads of this object, and not after `stop`. Methods raise RuntimeError if the
    store is gone.

    Args:
        info: this node's number, and the store of the generation.
        on_message: called with the sending node and the message, for every message in the order of the log.
        on_excluded: called with the reason if the team goes on without this node.
        on_store_lost: called with the error if the store is gone.
    """

    def __init__(
        self,
        info: GenerationInfo,
        on_message: Callable[[int, Message], None],
        on_excluded: Callable[[str], None],
        on_store_lost: Callable[[RuntimeError], None],
    ) -> None:
        self.rank = info.rank
        self.size = info.size
        self.hellos: list[Message] = []
        self._store = info.store.connect_again()
        self._on_message = on_message
        self._on_excluded = on_excluded
        self._on_store_lost = on_store_lost
        self._reader = LogReader(info.store.connect_again())
        self._writer = LogWriter(info.store.connect_again(), info.rank)
        self._outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None: the end
        self._unwritten = 0  # messages in the queue or being written
        self._all_written = threading.Condition()
        self._watch = HeartbeatWatch()
        self._silent: set[int] = set()
        self._beats = 0
        self._beat_lock = threading.Lock()
        self._is_over = False
        self._lost_when_written: set[int] = set()
        self._lost_when_read: set[int] = set()

    def exchange_hellos(self, hello: Mapping[str, Any], seconds: float) -> list[Message]:
        """Publish this node's hello; return the hellos of all nodes, by rank, and keep them in `hellos`.

        Raises TimeoutError if not all have been published within `seconds`.
        """
        self._beat()
        self._store.set(f"hello/{self.rank}", json.dumps(hello))
        texts = self._store.wait(*(f"hello/{node}" for node in range(self.size)), seconds=seconds)
        if texts is None:
            raise TimeoutError(f"not all of {self.size} nodes said hello within {seconds:g} s")
        self.hellos = list(map(json.loads, texts))
        return self.hellos

    def start(self) -> None:
        """Start to receive and send messages."""
        for run in (self._run_reader, self._run_writer):
            threading.Thread(target=self._guarded, args=(run,), name="generation", daemon=True).start()

    def broadcast(self, message: Message) -> None:
        """Send `message` to all nodes, this one included; returns at once."""
        with self._all_written:
            self._unwritten += 1
        self._outgoing.put(message)

    def report_lost(self, node: int, why: str) -> None:
        """Tell all nodes that `node` is lost, unless they know already."""
        self.broadcast({"kind": "lost", "node": node, "why": why})

    def flush(self, seconds: float) -> None:
        """Wait until all messages of this node are in the log, for at most `seconds`."""
        with self._all_written:
            self._all_written.wait_for(lambda: self._unwritten == 0, seconds)

    def check_heartbeats(self, now: float) -> list[int]:
        """Send a heartbeat, and report the nodes that send none any more; call it every `PERIOD` seconds.

        Node 0 watches all others, and they watch node 0.

        Args:
            now: this node's monotonic clock, seconds.

        Returns:
            the nodes that were found lost for the first time.
        """
        with self._beat_lock:
            if self._is_over:
                return []
            self._beat()
        watched = list(range(1, self.size)) if self.rank == 0 else [0]
        beats = self._store.get_all([f"beat/{node}" for node in watched]) if watched else []
        silent = self._watch.silent_nodes(dict(zip(watched, beats, strict=True)), now)
        new = [node for node in silent if node not in self._silent]
        self._silent.update(new)
        for node in new:
            self.report_lost(node, f"no sign of life for {silent[node]:.1f} s")
        return new

    def retire(self) -> None:
        """Leave the generation; the others expect no heartbeat of this node from now on."""
        self.stop()
        with self._beat_lock:
            self._store.set(f"beat/{self.rank}", GONE)

    def abandon(self, why: str) -> None:
        """Call it instead of `start`: makes the others form another generation without this node."""
        self._is_over = True
        self._writer.append(
            [{"kind": "lost", "node": self.rank, "why": why}], self._on_written, self._is_wanted
        )
        self._store.set(f"beat/{self.rank}", GONE)

    def stop(self) -> None:
        """Receive and send no more."""
        self._is_over = True
        self._outgoing.put(None)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self.rank}", str(self._beats))

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except ForgedError as error:
            if not self._is_over:
                self._on_excluded(f"what the nodes say to each other was overwritten: {error}")
        except RuntimeError as error:
            if not self._is_over:
                self._on_store_lost(error)

    def _run_reader(self) -> None:
        while not self._is_over:
            entry = self._reader.next()
            if entry is None or entry.node in self._lost_when_read:
                continue  # every node ignores the later messages of a lost node
            for message in entry.messages:
                if not self._is_over and _is_news(message, self._lost_when_read):
                    _add_lost(message, self._lost_when_read)
                    self._on_message(entry.node, message)
                    if self.rank in self._lost_when_read:
                        self._on_excluded(f"the other nodes have given this one up: {message['why']}")
                        return

    def _run_writer(self) -> None:
        while messages := self._take_outgoing():
            self._writer.append(messages, self._on_written, self._is_wanted)
            with self._all_written:
                self._unwritten -= len(messages)
                self._all_written.notify_all()

    def _take_outgoing(self) -> list[Message]:
        """Wait for messages to send, and take all that there are; none after `stop`."""
        taken = [self._outgoing.get()]
        while not self._outgoing.empty():
            taken.append(self._outgoing.get())
        return [] if None in taken else [message for message in taken if message is not None]

    def _on_written(self, entry: LogEntry) -> None:
        if entry.node not in self._lost_when_written:
            for message in entry.messages:
                _add_lost(message, self._lost_when_written)

    def _is_wanted(self, message: Message) -> bool:
        return _is_news(message, self._lost_when_written)


def _is_news(message: Message, lost: set[int]) -> bool:
    """False for the loss of a node that is known to be lost."""
    return message.get("kind") != "lost" or message["node"] not in lost


def _add_lost(message: Message, lost: set[int]) -> None:
    if message.get("kind") == "lost":
        lost.add(message["node"])
