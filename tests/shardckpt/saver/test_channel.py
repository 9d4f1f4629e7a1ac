"""Messages and descriptors over a socket."""

from __future__ import annotations

import os
import socket

from shardckpt.saver import protocol
from shardckpt.saver.buffers import SnapshotMemory
from shardckpt.saver.channel import Channel


def test_descriptors_come_with_their_own_message() -> None:
    """However the messages are queued, and torn apart on the way."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    sender, receiver = Channel(ours), Channel(theirs, read_size=13)
    files = [SnapshotMemory().allocate(1)[0] for _ in range(5)]
    try:
        for number in range(120):
            sender.send(protocol.Outcome("x" * (number * 97 % 5000), str(number)))
            if number % 3 == 0:
                chosen = [files[(number + i) % 5] for i in range(number % 4)]
                sender.send(protocol.Attached([number], []), chosen)
        for number in range(120):
            outcome, none = receiver.receive() or (None, [])
            assert (outcome.tier, none) == (str(number), [])
            if number % 3 == 0:
                attached, descriptors = receiver.receive() or (None, [])
                assert attached.ranks == [number]
                wanted = [os.fstat(files[(number + i) % 5]).st_ino for i in range(number % 4)]
                assert [os.fstat(descriptor).st_ino for descriptor in descriptors] == wanted
                assert not any(os.get_inheritable(descriptor) for descriptor in descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
    finally:
        sender.close()
        receiver.close()
        for file in files:
            os.close(file)
