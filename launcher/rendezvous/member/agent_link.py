"""The stream of JSON lines between this process and its agent."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["AgentLink"]


class AgentLink:
    """Receives orders and sends events; `send` may be called from any thread.

    Args:
        fd: this process's end of the socket pair; owned by the link from now on.
    """

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._lock = threading.Lock()

    def orders(self) -> Iterator[dict[str, Any]]:
        """Yield the agent's orders until it closes the connection or dies."""
        unread = b""
        while received := self._receive():
            *lines, unread = (unread + received).split(b"\n")
            yield from map(json.loads, lines)

    def send(self, **event: Any) -> None:
        """Send an event; has no effect if the agent is gone."""
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
