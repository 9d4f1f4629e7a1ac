"""Messages and file descriptors over a unix socket of one user."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from shardckpt.saver.protocol import VERSION, Answer, Request

__all__ = ["Channel", "address_of", "connect", "encode", "frame", "listen", "peer"]


_HEADER = struct.Struct("<QI")  # length of what follows, number of descriptors that come along
_DESCRIPTOR = struct.Struct("i")
_LONGEST = 1 << 32
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_TIMEVAL = struct.Struct("@ll")  # seconds, microseconds
_MAX_FDS = 250  # of one message; the kernel's limit is 253


def encode(message: Request | Answer, descriptors: int = 0) -> bytes:
    """Encode a message as it is sent; so many descriptors are to go along with its first byte."""
    return frame(msgspec.msgpack.encode(message), descriptors)


def frame(data: bytes, descriptors: int = 0) -> bytes:
    """Put the header before an encoded message: its length, and how many descriptors come along."""
    return _HEADER.pack(len(data), descriptors) + data


class Channel:
    """One end of a connection. One thread may send and another receive at the same time.

    Args:
        connection: the connection; a method waits as long as this says.
        takes_descriptors: whether the other end may send any. Otherwise the kernel closes them.
        read_size: bytes to read at a time, at most.
    """

    def __init__(
        self, connection: socket.socket, *, takes_descriptors: bool = True, read_size: int = 1 << 18
    ) -> None:
        self._socket = connection
        self._decoder = msgspec.msgpack.Decoder(Request | Answer)
        self._data = bytearray()
        self._descriptors: deque[int] = deque()
        self._takes_descriptors = takes_descriptors
        self._read_size = read_size

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._socket.fileno()

    def send(self, message: Request | Answer, descriptors: Sequence[int] = ()) -> None:
        """Send a message, and copies of at most 250 descriptors. Raises OSError if the other end is gone."""
        data = memoryview(encode(message, len(descriptors)))
        if descriptors:
            # Which the kernel hands over with the first byte that they were sent with, or before.
            sent = socket.send_fds(self._socket, [data[: _HEADER.size]], list(descriptors))
            data = data[sent:]
        self._socket.sendall(data)

    def receive(self) -> tuple[Any, list[int]] | None:
        """The next message and the descriptors that came with it; None when the other end is gone.

        Raises EOFError for what is no message of this version.
        """
        while (message := self.next_message()) is None:
            if not self.read_some():
                return None
        return message

    def wait_readable(self, seconds: float) -> bool:
        """Wait for something to arrive, or for the other end to go. False if neither happens in `seconds`."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    @property
    def is_writable(self) -> bool:
        """True if a short message could be sent now without waiting."""
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        return bool(poll.poll(0))

    def read_some(self) -> bool:
        """Read what has arrived, or wait for something. False when the other end is gone.

        Raises BlockingIOError if nothing has arrived on a connection that does not block.
        """
        space = socket.CMSG_SPACE(_MAX_FDS * _DESCRIPTOR.size) if self._takes_descriptors else 0
        try:
            data, ancillary, _, _ = self._socket.recvmsg(self._read_size, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return False
        self._data += data
        for _, _, content in ancillary:  # whole descriptors, even where the kernel had to cut the rest off
            whole = len(content) // _DESCRIPTOR.size * _DESCRIPTOR.size
            self._descriptors += [fd for (fd,) in _DESCRIPTOR.iter_unpack(content[:whole])]
        return bool(data)

    def next_message(self) -> tuple[Any, list[int]] | None:
        """The next message that has been read whole, with its descriptors; None if there is none yet.

        Raises EOFError for what is no message of this version.
        """
        if len(self._data) < _HEADER.size:
            return None
        length, count = _HEADER.unpack_from(self._data)
        if not self._takes_descriptors:
            count = 0
        if length > _LONGEST or count > len(self._descriptors):
            raise EOFError("not a message of this version")
        end = _HEADER.size + length
        if len(self._data) < end:
            return None
        try:
            message = self._decoder.decode(bytes(self._data[_HEADER.size : end]))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise EOFError(f"not a message of this version: {error}") from error
        del self._data[:end]
        return message, [self._descriptors.popleft() for _ in range(count)]

    def shut(self) -> None:
        """End the connection for both ends, and keep the descriptor."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection, and the descriptors that nobody has taken."""
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self._socket.close()


def address_of(run: str) -> str:
    """The address of this user's saver of a run, where no launcher names one."""
    key = hashlib.blake2b(f"{os.getuid()} {run} {VERSION}".encode(), digest_size=12).hexdigest()
    return f"shardckpt-saver-{key}"


def listen(address: str) -> socket.socket:
    """Listen at the abstract `address`. Raises OSError (EADDRINUSE) if another process does already."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"\0{address}")
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def connect(address: str, patience: float = 30.0) -> socket.socket:
    """Connect to the saver that listens at `address`. Sending there waits `patience` seconds at most.

    Raises ConnectionError if no process listens there, PermissionError if it is another user's, BlockingIOError
    if too many wait there to be accepted.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(max(1, int(patience)), 0)
        )
        connection.connect(f"\0{address}")
        if peer(connection)[1] != os.getuid():
            raise PermissionError(f"the saver's address {address!r} is taken by another user")
    except OSError:
        connection.close()
        raise
    return connection


def peer(connection: socket.socket) -> tuple[int, int]:
    """(process id, user id) of the other end, as the kernel knows them."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid
