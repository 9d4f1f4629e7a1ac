"""What is sent to a trainer that may not read."""

from __future__ import annotations

import os
import socket

import pytest

from shardckpt.saver.outbox import Outbox


def test_an_outbox_keeps_descriptors_until_they_are_sent() -> None:
    """Though their owner closes his own; and gives them up with what they belong to."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        outbox = Outbox(ours)
        outbox.send(bytes(1 << 20))
        read, write = os.pipe()
        outbox.send(b"x", [write])
        outbox.send(b"y", [write])
        os.close(write)
        assert not outbox.is_empty
        received = 0
        descriptors: list[int] = []
        while not descriptors:
            outbox.flush()
            data, more, _, _ = socket.recv_fds(theirs, 1 << 18, 4)
            received += len(data)
            descriptors += more
        assert received == (1 << 20) + 1
        os.write(descriptors[0], b"!")
        assert os.read(read, 1) == b"!"
        os.close(descriptors[0])
        os.close(read)
        outbox.close()
        assert outbox.is_empty
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_an_outbox_takes_so_much_and_no_more() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        outbox = Outbox(ours)
        with pytest.raises(BlockingIOError, match="does not read"):
            for _ in range(100):
                outbox.send(bytes(1 << 18))
        theirs.close()
        with pytest.raises(BrokenPipeError):
            outbox.flush()
        outbox.close()
