"""The stream of JSON lines between this process and its agent."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["Link"]


class Link:
    """Orders come in, events go out; `tell` is safe to call from any thread."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._lock = threading.Lock()

    def orders(self) -> Iterator[dict[str, Any]]:
        """What the agent wants, until it hangs up or is dead."""
        unread = b""
        while received := self._receive():
            *lines, unread = (unread + received).split(b"\n")
            yield from map(json.loads, lines)

    def tell(self, **event: Any) -> None:
        """Send an event; nothing happens if nobody is there to read it."""
        with self._lock:
            try:
                self._socket.sendall(json.dumps(event).encode() + b"\n")
            except (BrokenPipeError, ConnectionResetError):
                pass

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(1 << 16)
        except ConnectionResetError:
            return b""
