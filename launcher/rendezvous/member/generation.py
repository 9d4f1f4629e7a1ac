"""One generation of a team, as one of its nodes: greets, says, hears, and watches the others."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from launcher.rendezvous.member.heartbeat import GONE, Watch
from launcher.rendezvous.member.message_log import Entry, Reader, Writer
from launcher.rendezvous.member.protocol import Seat
from launcher.rendezvous.member.signing import ForgedError

__all__ = ["Generation"]

Message = dict[str, Any]


class Generation:
    """This node's part in one generation.

    `hear(node, message)` is called for every message in the order of the log, `fail(reason)` if the team goes
    on without this node, `lose(error)` if the store is gone; all from threads of this object, and not after
    `stop`. Its methods raise RuntimeError if the store is gone.
    """

    def __init__(
        self,
        seat: Seat,
        hear: Callable[[int, Message], None],
        fail: Callable[[str], None],
        lose: Callable[[RuntimeError], None],
    ) -> None:
        self.rank = seat.rank
        self.size = seat.size
        self.hellos: list[Message] = []
        self._store = seat.store.connect_again()
        self._hear = hear
        self._fail = fail
        self._lose = lose
        self._reader = Reader(seat.store.connect_again())
        self._writer = Writer(seat.store.connect_again(), seat.rank)
        self._said: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None: the end
        self._unsaid = 0  # of what is in the queue or on its way
        self._all_said = threading.Condition()
        self._watch = Watch()
        self._silent: set[int] = set()
        self._beats = 0
        self._beat_lock = threading.Lock()
        self._is_over = False
        self._lost_when_written: set[int] = set()
        self._lost_when_read: set[int] = set()

    def greet(self, hello: Mapping[str, Any], seconds: float) -> list[Message]:
        """Say hello; returns the hellos of all nodes, by rank, and keeps them in `hellos`.

        Raises TimeoutError if not all have come within `seconds`.
        """
        self._beat()
        self._store.set(f"hello/{self.rank}", json.dumps(hello))
        texts = self._store.wait(*(f"hello/{node}" for node in range(self.size)), seconds=seconds)
        if texts is None:
            raise TimeoutError(f"not all of {self.size} nodes said hello within {seconds:g} s")
        self.hellos = list(map(json.loads, texts))
        return self.hellos

    def start(self) -> None:
        """Begin to hear and to speak."""
        for run in (self._run_reader, self._run_writer):
            threading.Thread(target=self._guarded, args=(run,), name="generation", daemon=True).start()

    def say(self, message: Message) -> None:
        """Have all nodes hear `message`; returns at once."""
        with self._all_said:
            self._unsaid += 1
        self._said.put(message)

    def tell_lost(self, node: int, why: str) -> None:
        """Have all nodes hear that `node` is lost, unless they have heard it before."""
        self.say({"kind": "lost", "node": node, "why": why})

    def flush(self, seconds: float) -> None:
        """Wait until all that was said is in the log, for so long at most."""
        with self._all_said:
            self._all_said.wait_for(lambda: self._unsaid == 0, seconds)

    def look(self, now: float) -> list[int]:
        """Give a sign of life, and tell of nodes that give none any more; to be called every `PERIOD`.

        Node 0 looks at all the others, and they at it. Returns the nodes that were found lost for the first
        time.
        """
        with self._beat_lock:
            if self._is_over:
                return []
            self._beat()
        watched = list(range(1, self.size)) if self.rank == 0 else [0]
        signs = self._store.get_all([f"beat/{node}" for node in watched]) if watched else []
        silent = self._watch.look(dict(zip(watched, signs, strict=True)), now)
        new = [node for node in silent if node not in self._silent]
        self._silent.update(new)
        for node in new:
            self.tell_lost(node, f"no sign of life for {silent[node]:.1f} s")
        return new

    def retire(self) -> None:
        """Be in it no more, in peace: the others expect no sign of life from now on."""
        self.stop()
        with self._beat_lock:
            self._store.set(f"beat/{self.rank}", GONE)

    def abandon(self, why: str) -> None:
        """Instead of `start`: have the others form another generation, because this node is not in it."""
        self._is_over = True
        farewell = {"kind": "lost", "node": self.rank, "why": why}
        self._writer.append([farewell], self._see, self._is_still_news)
        self._store.set(f"beat/{self.rank}", GONE)

    def stop(self) -> None:
        """Hear and speak no more."""
        self._is_over = True
        self._said.put(None)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self.rank}", str(self._beats))

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except ForgedError as error:
            if not self._is_over:
                self._fail(f"what the nodes say to each other was overwritten: {error}")
        except RuntimeError as error:
            if not self._is_over:
                self._lose(error)

    def _run_reader(self) -> None:
        while not self._is_over:
            entry = self._reader.next()
            if entry is None or entry.node in self._lost_when_read:
                continue  # a node that is lost is heard no more, the same everywhere
            for message in entry.messages:
                if not self._is_over and _is_news(message, self._lost_when_read):
                    _note(message, self._lost_when_read)
                    self._hear(entry.node, message)
                    if self.rank in self._lost_when_read:
                        self._fail(f"the other nodes have given this one up: {message['why']}")
                        return

    def _run_writer(self) -> None:
        while messages := self._take_said():
            self._writer.append(messages, self._see, self._is_still_news)
            with self._all_said:
                self._unsaid -= len(messages)
                self._all_said.notify_all()

    def _take_said(self) -> list[Message]:
        """Wait for something to say, and take all that there is; nothing after `stop`."""
        taken = [self._said.get()]
        while not self._said.empty():
            taken.append(self._said.get())
        return [] if None in taken else [message for message in taken if message is not None]

    def _see(self, entry: Entry) -> None:
        if entry.node not in self._lost_when_written:
            for message in entry.messages:
                _note(message, self._lost_when_written)

    def _is_still_news(self, message: Message) -> bool:
        return _is_news(message, self._lost_when_written)


def _is_news(message: Message, lost: set[int]) -> bool:
    return message.get("kind") != "lost" or message["node"] not in lost


def _note(message: Message, lost: set[int]) -> None:
    if message.get("kind") == "lost":
        lost.add(message["node"])
