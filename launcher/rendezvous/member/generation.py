"""One generation of a team, as one of its nodes: exchanges hellos, broadcasts, receives, watches heartbeats."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from launcher.rendezvous.member.heartbeat import GONE, HeartbeatWatch
from launcher.rendezvous.member.packed_json import pack_json, unpack_json
from launcher.rendezvous.member.protocol import GenerationInfo
from launcher.rendezvous.member.signing import ForgedError
from launcher.rendezvous.member.team_log import Message, TeamLog

__all__ = ["Generation"]


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
        self._log = TeamLog(info.rank, info.size, info.store, self._receive, self._on_forged, on_store_lost)
        self._watch = HeartbeatWatch()
        self._silent: set[int] = set()
        self._beats = 0
        self._beat_lock = threading.Lock()
        self._is_over = False

    def exchange_hellos(self, hello: Mapping[str, Any], seconds: float) -> list[Message]:
        """Publish this node's hello; return the hellos of all nodes, by rank, and keep them in `hellos`.

        Node 0 gathers them for all. Raises TimeoutError if not all have been published within `seconds`: either
        all nodes get all hellos, or none does.
        """
        self._beat()
        self._store.set(f"hello/{self.rank}", json.dumps(hello))
        keys = [f"hello/{node}" for node in range(self.size)] if self.rank == 0 else ["hellos"]
        texts = self._store.wait(*keys, seconds=seconds)
        outcome: str = texts[0] if texts is not None else pack_json(None)
        if self.rank == 0 and texts is not None:
            outcome = pack_json(list(map(json.loads, texts)))
        if self.rank == 0 or texts is None:
            outcome = self._store.create("hellos", outcome)
        hellos = unpack_json(outcome)
        if hellos is None:
            raise TimeoutError(f"not all of {self.size} nodes said hello within {seconds:g} s")
        self.hellos = hellos
        return self.hellos

    def first_hello(self) -> Message | None:
        """The hello of node 0, if that has published one."""
        key = "hello/0"
        text = self._store.get(key)
        return None if text is None else json.loads(text)

    def start(self) -> None:
        """Start to receive and send messages."""
        self._log.start()

    def broadcast(self, message: Message) -> None:
        """Send `message` to all nodes, this one included; returns at once."""
        self._log.broadcast(message)

    def report_lost(self, node: int, why: str) -> None:
        """Tell all nodes that `node` is lost, unless they know already."""
        self.broadcast({"kind": "lost", "node": node, "why": why})

    def flush(self, seconds: float) -> None:
        """Wait until all messages of this node are in the log, for at most `seconds`."""
        self._log.flush(seconds)

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
        self._log.append_only({"kind": "lost", "node": self.rank, "why": why})
        self._store.set(f"beat/{self.rank}", GONE)

    def stop(self) -> None:
        """Receive and send no more."""
        self._is_over = True
        self._log.stop()

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self.rank}", str(self._beats))

    def _receive(self, node: int, message: Message) -> None:
        self._on_message(node, message)
        if message.get("kind") == "lost" and message["node"] == self.rank:
            self._log.stop()
            self._on_excluded(f"the other nodes have given this one up: {message['why']}")

    def _on_forged(self, error: ForgedError) -> None:
        self._on_excluded(f"what the nodes say to each other was overwritten: {error}")
