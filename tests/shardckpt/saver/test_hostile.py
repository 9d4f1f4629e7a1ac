"""A trainer that sends nonsense, floods, or never reads costs itself its connection, and nobody else anything."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from shardckpt.run.attempts import Attempt
from shardckpt.run.lease import Holder
from shardckpt.run.tiers import Tier
from shardckpt.saver import protocol
from shardckpt.saver.channel import Channel, connect, encode
from shardckpt.saver.client import SaverClient
from tests.kit.savers import LIMIT, SaverProcess, connected, save_info, wait_until

INFO = save_info(1)
LOCAL = Tier("local", "/nowhere")
HELLO = protocol.Hello("another run", [LOCAL], 2, 1.0)
ATTEMPT = Attempt("x", "attempt-0001-00000001", 0, Holder.of_this_process(()))
START = protocol.Start(ATTEMPT, claims=False)
PLAN = protocol.ChunkTable(1, [0], [0], [4], 64, b"")
BEGIN = protocol.Begin(0, INFO, 0, [])
STAGE = protocol.Stage(0, INFO, 0, 1, [], b"{}", b"")


@contextlib.contextmanager
def raw(saver: SaverProcess) -> Iterator[Channel]:
    connection = connect(saver.address)
    connection.settimeout(LIMIT)
    channel = Channel(connection)
    try:
        yield channel
    finally:
        channel.close()


def save(client: SaverClient, step: int) -> None:
    """A save in memory, as a well-behaved trainer makes it."""
    memory = client.take()
    client.begin(protocol.Begin(memory.number, save_info(step), 0, []))
    outcomes: list[protocol.Outcome] = []
    staged = threading.Event()
    stage = protocol.Stage(memory.number, save_info(step), 0, 1, [], b"{}", b"")
    client.stage(stage, lambda outcome: (outcomes.append(outcome), staged.set()))
    assert staged.wait(LIMIT)
    assert outcomes[0].error == ""


def staged(**changes: Any) -> protocol.Stage:
    """STAGE with something else in the save's description."""
    return msgspec.structs.replace(STAGE, info=msgspec.structs.replace(INFO, **changes))


NONSENSE: dict[str, tuple[protocol.Request, ...]] = {
    "values that are no JSON": (msgspec.structs.replace(STAGE, values=b"no json"),),
    "values that are no object": (msgspec.structs.replace(STAGE, values=b"[1]"),),
    "values that are no text": (msgspec.structs.replace(STAGE, values=b'{"a": "\xff"}'),),
    "values without an end": (msgspec.structs.replace(STAGE, values=b"[" * 100_000),),
    "unknown tier": (msgspec.structs.replace(STAGE, tiers=["moon"]),),
    "tier twice": (msgspec.structs.replace(STAGE, tiers=["local", "local"]),),
    "path that leaves the run": (staged(path="../other/step-1"),),
    "absolute path": (staged(path="/etc/passwd"),),
    "step with 5000 digits": (staged(path=f"attempt-0001/step-{'9' * 5000}"),),
    "NUL": (staged(id="a\0b"),),
    "no rank of the world": (msgspec.structs.replace(STAGE, rank=1),),
    "negative rank": (msgspec.structs.replace(STAGE, rank=-1),),
    "no world": (staged(world_size=0),),
    "more local ranks than ranks": (msgspec.structs.replace(STAGE, local_ranks=2),),
    "negative step": (staged(step=-1),),
    "unknown tier at begin": (msgspec.structs.replace(BEGIN, tiers=["moon"]),),
    "columns that differ": (protocol.ChunkTable(1, [0], [0, 1], [4], 64, b""),),
    "negative offset": (protocol.ChunkTable(1, [0], [-1], [4], 64, b""),),
    "chunk beyond the pack": (protocol.ChunkTable(1, [0], [62], [4], 64, b""),),
    "numbers of 64 bits": (protocol.ChunkTable(1, [0], [(1 << 64) - 1], [(1 << 64) - 1], 64, b""),),
    "pack of no size": (protocol.ChunkTable(1, [], [], [], -5, b""),),
    "huge buffer": (protocol.Reserve((1 << 63) - 1),),
    "endless requests": (PLAN, *[protocol.Reserve(64)] * 2000),
    "hello twice": (HELLO,),
    "no such buffer given back": (protocol.GivenBack(77),),
    "answer": (protocol.Welcome("me"),),
    "attempt of another name": (
        protocol.Start(msgspec.structs.replace(ATTEMPT, name="../x"), claims=False),
    ),
    "attempt of 5000 digits": (
        protocol.Start(msgspec.structs.replace(ATTEMPT, name=f"attempt-{'9' * 5000}"), claims=False),
    ),
    "attempt that is claimed elsewhere": (protocol.Start(ATTEMPT, claims=False, name="/etc"),),
    "attempt of no id": (protocol.Start(msgspec.structs.replace(ATTEMPT, id=""), claims=False),),
    "attempt after none": (protocol.Start(msgspec.structs.replace(ATTEMPT, base=-1), claims=False),),
}


@pytest.mark.parametrize("messages", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_costs_its_own_connection_only(
    saver: SaverProcess, client: SaverClient, messages: tuple[protocol.Request, ...]
) -> None:
    client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
    save(client, 1)
    with raw(saver) as channel:
        channel.send(HELLO)
        channel.receive()
        needs_buffer = isinstance(messages[0], protocol.Begin | protocol.Stage)
        if needs_buffer:
            channel.send(PLAN)
            channel.send(protocol.Reserve(64))
            reserved, descriptors = channel.receive() or (None, [])
            os.close(descriptors[0])
            begin = msgspec.structs.replace(BEGIN, buffer=reserved.buffer)
            if isinstance(messages[0], protocol.Stage):
                channel.send(begin)
            messages = (msgspec.structs.replace(messages[0], buffer=reserved.buffer),)
        with contextlib.suppress(OSError):  # it need not take them all
            for message in messages:
                channel.send(message)
        while (received := channel.receive()) is not None:
            for descriptor in received[1]:
                os.close(descriptor)
    save(client, 2)
    assert [snapshot.info.step for snapshot in client.snapshots()] == [2]


def test_nothing_comes_before_hello(saver: SaverProcess, client: SaverClient) -> None:
    for message in (
        protocol.Find(),
        PLAN,
        protocol.Reserve(1),
        protocol.Bye(),
        protocol.Detach(),
        protocol.Attach("x"),
    ):
        with raw(saver) as channel:
            channel.send(message)
            assert channel.receive() is None
    assert client.snapshots() == []


def test_a_run_has_no_part_in_another_runs_saves(
    saver: SaverProcess, client: SaverClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can neither attach to them, nor end them, nor be one of their ranks."""
    other = connected(saver, monkeypatch)
    client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
    memory = client.take()
    info = save_info(1, world_size=2)
    client.begin(protocol.Begin(memory.number, info, 0, []))
    outcomes: list[protocol.Outcome] = []
    staged = threading.Event()
    client.stage(
        protocol.Stage(memory.number, info, 0, 2, [], b"{}", b""),
        lambda outcome: (outcomes.append(outcome), staged.set()),
    )
    with raw(saver) as channel:
        channel.send(HELLO)
        channel.receive()
        channel.send(protocol.Abandon("save-1", "because"))
        channel.send(protocol.Attach("save-1"))
        assert channel.receive() == (protocol.Attached([], []), [])
        channel.send(PLAN)
        channel.send(protocol.Reserve(64))
        reserved, descriptors = channel.receive() or (None, [])
        os.close(descriptors[0])
        channel.send(protocol.Begin(reserved.buffer, info, 1, []))
        channel.send(protocol.Stage(reserved.buffer, info, 1, 2, [], b"{}", b""))
        assert channel.receive() is None
    other.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 1)
    memory = other.take()
    other.begin(protocol.Begin(memory.number, info, 1, []))
    other.stage(protocol.Stage(memory.number, info, 1, 2, [], b"{}", b""), lambda _: None)
    assert staged.wait(LIMIT)
    assert outcomes == [protocol.Outcome("save-1", "memory")]
    other.close()


def mangled(rng: random.Random) -> bytes:
    """Some messages of which something is wrong, or nothing."""
    messages: list[Any] = [
        HELLO,
        START,
        PLAN,
        protocol.Reserve(64),
        BEGIN,
        STAGE,
        protocol.Find(),
        protocol.Attach("x"),
    ]
    data = bytearray(encode(HELLO) if rng.random() < 0.8 else b"")
    for _ in range(rng.randrange(5)):
        part = bytearray(encode(rng.choice(messages), rng.choice([0, 0, 0, 1, 250, 1 << 31])))
        match rng.randrange(5):
            case 0:
                part[rng.randrange(len(part))] ^= 1 << rng.randrange(8)
            case 1:
                del part[rng.randrange(len(part)) :]
            case 2:
                part[:8] = rng.choice([0, 1, 1 << 31, 1 << 33, (1 << 64) - 1]).to_bytes(8, "little")
            case 3:
                part += rng.randbytes(rng.randrange(40))
        data += part
    return bytes(data)


def test_noise_in_every_shape(saver: SaverProcess, client: SaverClient) -> None:
    """Of which each connection is ended, or waits for the rest; and nothing of it stays."""
    rng = random.Random(0)
    client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
    save(client, 1)
    save(client, 2)
    before = saver.descriptors
    for step in range(3, 13):
        with contextlib.ExitStack() as stack:
            for _ in range(30):
                connection = stack.enter_context(connect(saver.address))
                with contextlib.suppress(OSError):
                    socket.send_fds(connection, [mangled(rng)], [0] * rng.choice([0, 1, 100]))
            save(client, step)
    wait_until(
        lambda: saver.descriptors <= before + 60
    )  # the other run may have got buffers, of which each has two
    assert [snapshot.info.step for snapshot in client.snapshots()] == [12]


def test_descriptors_that_nobody_asked_for_are_closed(saver: SaverProcess, client: SaverClient) -> None:
    """Also those that no message announces, while the connection goes on."""
    with raw(saver) as channel:
        channel.send(HELLO)
        channel.receive()
        client.snapshots()
        before = saver.descriptors
        find = encode(protocol.Find())
        with socket.socket(fileno=os.dup(channel.fileno())) as connection:
            for byte in range(len(find)):
                socket.send_fds(connection, [find[byte : byte + 1]], [0] * 200)
        assert channel.receive() == (protocol.Found([]), [])
        assert saver.descriptors == before


def test_a_trainer_that_does_not_read_holds_up_nobody(saver: SaverProcess, client: SaverClient) -> None:
    """It finds all its answers when it does read."""
    count = 30_000
    with raw(saver) as channel:
        channel.send(HELLO)
        channel.receive()
        for _ in range(count):
            channel.send(protocol.Find())
        client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
        for step in range(1, 4):
            save(client, step)
        for _ in range(count):
            assert channel.receive() == (protocol.Found([]), [])


def test_a_trainer_that_never_reads_is_let_go(saver: SaverProcess, client: SaverClient) -> None:
    """Before what it leaves unread takes up much memory."""
    with raw(saver) as channel:
        channel.send(HELLO)
        find = encode(protocol.Find()) * 1000
        with socket.socket(fileno=os.dup(channel.fileno())) as connection, pytest.raises(ConnectionError):
            connection.settimeout(LIMIT)
            while True:
                connection.sendall(find)
    assert client.snapshots() == []


def test_more_descriptors_than_select_takes(saver: SaverProcess, client: SaverClient) -> None:
    """From 1024 on, each trainer is served as the first ones are, and seen to die."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4096:
        pytest.skip("this system allows a process fewer than 4096 descriptors")
    before = saver.descriptors
    with contextlib.ExitStack() as stack:
        for _ in range(700):
            channel = stack.enter_context(raw(saver))
            channel.send(HELLO)
            assert channel.receive() is not None
        assert saver.descriptors > 1100
        for _ in range(3):
            assert client.snapshots() == []
    wait_until(lambda: saver.descriptors == before)
    assert client.snapshots() == []


def test_more_connections_than_there_are_descriptors(saver: SaverProcess, client: SaverClient) -> None:
    """Those that have one go on; others are taken in when some have gone."""
    resource.prlimit(saver.pid, resource.RLIMIT_NOFILE, (saver.descriptors + 20,) * 2)
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(raw(saver)).send(HELLO)
        for _ in range(3):
            assert client.snapshots() == []
        last = stack.pop_all()
    last.close()
    with raw(saver) as channel:
        channel.send(HELLO)
        assert channel.receive() is not None


def test_the_child_of_a_dead_trainer_that_goes_on_talking(saver: SaverProcess, client: SaverClient) -> None:
    """It has the dead one's connection: nobody waits until it has nothing more to say."""
    script = """
        import os, sys
        from shardckpt.saver import protocol
        from shardckpt.saver.channel import Channel, connect, encode
        channel = Channel(connect(sys.argv[1]))
        channel.send(protocol.Hello("run", [], 2, 1.0))
        channel.receive()
        if os.fork():
            os._exit(0)
        data = encode(protocol.Detach()) * 1000
        try:
            while True:
                os.write(channel.fileno(), data)
        except OSError:
            print("ended")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), saver.address]
    talking = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert talking.wait(LIMIT) == 0
    assert client.snapshots() == []
    assert talking.stdout is not None
    assert talking.stdout.read() == "ended\n", "its connection is closed"
    talking.stdout.close()


def test_an_agent_that_does_not_read_gets_whole_lines(saver: SaverProcess, client: SaverClient) -> None:
    """In the end, however full its socket was."""
    saver.shrink_control()
    client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
    for step in range(1, 301):
        save(client, step)
    assert [saver.told("staged")["step"] for _ in range(300)] == [*range(1, 301)]
