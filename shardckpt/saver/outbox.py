"""Sending without waiting, over a connection whose other end may not read."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Sequence

__all__ = ["Outbox"]

_MOST_BYTES = 4 << 20
_MOST_DESCRIPTORS = 1024


class Outbox:
    """Sends in order, as much as the kernel takes at once; the rest waits for `flush`.

    Args:
        connection: a connection that does not block.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._waiting: deque[tuple[memoryview, list[int]]] = deque()
        self._bytes = 0
        self._descriptors = 0

    @property
    def is_empty(self) -> bool:
        """True if everything has been sent."""
        return not self._waiting

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send data, and copies of descriptors along with its first byte.

        Raises OSError if the other end is gone. Raises BlockingIOError, with nothing sent, if it has left more
        than 4 MiB or 1,024 descriptors unread.
        """
        if self._bytes > _MOST_BYTES or self._descriptors > _MOST_DESCRIPTORS:
            raise BlockingIOError("it does not read what it is sent")
        copies: list[int] = []
        try:
            for descriptor in descriptors:  # the caller may close its own before they are sent
                copies += [os.dup(descriptor)]
        except OSError:
            _close(copies)
            raise
        self._waiting.append((memoryview(data), copies))
        self._bytes += len(data)
        self._descriptors += len(copies)
        self.flush()

    def flush(self) -> None:
        """Send what waits, as much as the kernel takes now. Raises OSError if the other end is gone."""
        while self._waiting:
            data, descriptors = self._waiting[0]
            try:
                if descriptors:
                    sent = socket.send_fds(self._socket, [data], descriptors)
                else:
                    sent = self._socket.send(data)
            except BlockingIOError:
                return
            _close(descriptors)
            self._bytes -= sent
            self._descriptors -= len(descriptors)
            if sent < len(data):
                self._waiting[0] = data[sent:], []
            else:
                self._waiting.popleft()

    def close(self) -> None:
        """Drop what has not been sent."""
        while self._waiting:
            _close(self._waiting.popleft()[1])
        self._bytes = self._descriptors = 0


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
