"""Who may talk to the saver, and what becomes of those who send nonsense."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from shardckpt.errors import SaverError
from shardckpt.saver import protocol
from shardckpt.saver.channel import Channel, address_of, connect, encode, frame, listen
from shardckpt.saver.client import SaverClient
from tests.kit.savers import LIMIT, SaverProcess, save_info
from tests.kit.worlds import context


def _as_nobody(user: int, pipe: Any, order: str, address: str) -> None:
    """Of another user: connect, or listen."""
    os.setgid(user)
    os.setuid(user)
    if order == "listen":
        listener = listen(address)
        pipe.send(True)
        connection, _ = listener.accept()
        pipe.send(connection.recv(1 << 10))
    else:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"\0{address}")
        with contextlib.suppress(OSError):
            Channel(connection).send(protocol.Hello("run", [], 2, 1.0))
            Channel(connection).send(protocol.Find())
        try:
            pipe.send(connection.recv(1 << 10))
        except ConnectionError:
            pipe.send(b"")


@pytest.fixture
def nobody(other_user: int) -> Iterator[Any]:
    """Starts `_as_nobody`; gives a pipe to it."""
    started = []

    def start(order: str, address: str) -> Any:
        ours, theirs = context.Pipe()
        process = context.Process(target=_as_nobody, args=(other_user, theirs, order, address), daemon=True)
        process.start()
        started.append(process)
        return ours

    yield start
    for process in started:
        process.kill()
        process.join()


def test_another_user_gets_nothing(saver: SaverProcess, client: SaverClient, nobody: Any) -> None:
    pipe = nobody("connect", saver.address)
    assert pipe.poll(LIMIT)
    assert pipe.recv() == b""
    assert client.snapshots() == []


def test_a_trainer_tells_nothing_to_another_users_process(
    nobody: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it try for long, or again and again to start a saver of its own."""
    run = f"run-{os.urandom(6).hex()}"
    pipe = nobody("listen", address_of(run))
    assert pipe.poll(LIMIT)
    pipe.recv()
    monkeypatch.delenv("LAUNCH_SAVER", raising=False)
    with pytest.raises(SaverError, match="taken by another user"):
        SaverClient(run, [], 2, LIMIT, linger=0)
    assert pipe.poll(LIMIT)
    assert pipe.recv() == b""


def raw(saver: SaverProcess) -> socket.socket:
    connection = connect(saver.address)
    connection.settimeout(LIMIT)
    return connection


def hello() -> bytes:
    return encode(protocol.Hello("run", [], 2, 1.0))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\xff" * 100,
        frame(b"\xc1" * 5),
        frame(b""),
        hello() + frame(msgspec.msgpack.encode({"type": "NewIdea"})),
        hello() + frame(msgspec.msgpack.encode({"type": "Reserve"}) + b"\0"),
        hello() + frame(b"\0", descriptors=3),
    ],
    ids=["http", "noise", "no msgpack", "empty", "unknown", "incomplete", "descriptors that are not there"],
)
def test_garbage_ends_its_own_connection_only(
    saver: SaverProcess, client: SaverClient, data: bytes
) -> None:
    with raw(saver) as connection:
        connection.sendall(data)
        while connection.recv(1 << 10):
            pass
    assert client.snapshots() == []


@pytest.mark.parametrize(
    "message",
    [
        protocol.Begin(7, save_info(1), 0, []),
        protocol.Stage(7, save_info(1), 0, 1, [], b"{}", b""),
        protocol.Welcome("me"),
        protocol.ChunkTable(1, [], [], [], -5, b""),
        protocol.Reserve((1 << 63) - 1),
    ],
)
def test_a_trainer_out_of_its_mind_disturbs_nobody(
    saver: SaverProcess, client: SaverClient, message: Any
) -> None:
    with raw(saver) as connection:
        channel = Channel(connection)
        channel.send(protocol.Hello("another run", [], 2, 1.0))
        channel.send(message)
        with contextlib.suppress(OSError):  # let go already
            channel.send(protocol.Attach("nothing"))
        if isinstance(message, protocol.ChunkTable | protocol.Reserve):
            assert channel.receive() is not None
        while (
            not isinstance(message, protocol.ChunkTable | protocol.Reserve)
            and channel.receive() is not None
        ):
            pass
    assert client.snapshots() == []


def test_half_a_message_then_death(saver: SaverProcess, client: SaverClient) -> None:
    before = saver.descriptors
    with raw(saver) as connection:
        connection.sendall(hello()[:-3])
        assert client.snapshots() == []
    for _ in range(5):  # with each answer it has come at least one step further: accept, message, end
        assert client.snapshots() == []
    assert saver.descriptors == before


def test_descriptors_that_are_sent_to_the_saver_are_closed(saver: SaverProcess) -> None:
    with raw(saver) as connection:
        channel = Channel(connection)
        channel.send(protocol.Hello("another run", [], 2, 1.0))
        channel.receive()
        before = saver.descriptors
        for _ in range(10):
            channel.send(protocol.Find(), [0, 1, 2])
            channel.receive()
        assert saver.descriptors == before
