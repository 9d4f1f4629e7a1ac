"""Memory for snapshots, and what happens when there is little."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.checkpointer import Checkpointer
from shardckpt.saver import protocol
from shardckpt.saver.buffers import Pressure, SnapshotMemory
from shardckpt.saver.channel import listen
from shardckpt.saver.client import SaverClient
from shardckpt.saver.server import SaverServer
from tests.kit.savers import LIMIT, SaverProcess, save_info, wait_until
from tests.kit.trainer_processes import MEMORY_ONLY, Trainers


@contextlib.contextmanager
def saver_in_a_thread(
    monkeypatch: pytest.MonkeyPatch, memory: SnapshotMemory | None = None
) -> Iterator[SaverServer]:
    address = f"shardckpt-test-{os.urandom(8).hex()}"
    control, theirs = socket.socketpair()
    made = SaverServer(listen(address), theirs, memory=memory)
    thread = threading.Thread(target=made.run)
    thread.start()
    monkeypatch.setenv("LAUNCH_SAVER", address)
    try:
        yield made
    finally:
        control.close()
        thread.join(LIMIT)
        assert not thread.is_alive()
        theirs.close()


class Memory(SnapshotMemory):
    """Of a machine that has memory for `count` buffers, or for any number; `pressures` are what is found next."""

    look_every = 0.01

    def __init__(self, count: int | None = None) -> None:
        super().__init__()
        self.count = count
        self.pressures: list[Pressure] = []

    def allocate(self, size: int) -> tuple[int, int]:
        if self.count is not None:
            if not self.count:
                raise MemoryError("0.0 GiB of memory is left of the machine's 1.0 GiB")
            self.count -= 1
        return super().allocate(size)

    def pressure(self, held: int) -> Pressure:  # noqa: ARG002
        return self.pressures.pop() if self.pressures else Pressure.NONE


class ScarceMemory(Memory):
    """There is always room for another one, but it would leave too little to training."""

    def lacking(self, size: int) -> str:
        return f"{size >> 20} MiB more are too many" if size else ""


def save_in_memory(client: SaverClient, step: int, rank: int = 0, world: int = 1) -> threading.Event:
    """Stage a part of a save that goes to no tier; set once the whole is staged."""
    memory = client.take()
    info = save_info(step, world)
    client.begin(protocol.Begin(memory.number, info, rank, []))
    staged = threading.Event()
    stage = protocol.Stage(memory.number, info, rank, world, [], b"{}", b"")
    client.stage(stage, lambda _: staged.set())
    return staged


def test_no_memory_is_an_error_of_this_save_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one asks again."""
    memory = Memory(0)
    with saver_in_a_thread(monkeypatch, memory):
        client = SaverClient("run", [], 2, LIMIT, linger=0)
        client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
        with pytest.raises(MemoryError, match=r"no memory for a snapshot of .*GiB of memory is left"):
            client.take()
        memory.count = None
        with contextlib.suppress(MemoryError):  # asked for before
            client.take()
        client.take()
        client.close()


@pytest.mark.parametrize("memory", [Memory(1), ScarceMemory()], ids=["full", "scarce"])
def test_with_memory_for_one_snapshot_there_is_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, memory: Memory
) -> None:
    """Rather than a first save, and never another. The user is told."""
    with saver_in_a_thread(monkeypatch, memory) as saver:
        client = SaverClient("run", [], 2, LIMIT, linger=0)
        client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
        for step in range(1, 5):
            assert save_in_memory(client, step).wait(LIMIT)
        assert saver.buffers == 1
        client.close()
    told = [record.getMessage() for record in caplog.records if record.name == "shardckpt"]
    assert len(told) == 1
    assert told[0].startswith("holding one snapshot only in memory: ")


def test_a_second_snapshot_that_not_every_rank_has_memory_for_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part of a snapshot is of no use: what all ranks of the node need is counted before any of it is made."""

    class ForThree(Memory):
        def lacking(self, size: int) -> str:
            return "too much" if size > 2 << 20 else ""

    with saver_in_a_thread(monkeypatch, ForThree()) as saver:
        clients = [SaverClient("run", [], 2, LIMIT, linger=0) for _ in range(2)]
        for client in clients:
            client.plan(protocol.ChunkTable(1, [], [], [], 2 << 20, b""), 2)
        for step in range(1, 4):
            staged = [save_in_memory(client, step, rank, 2) for rank, client in enumerate(clients)]
            assert all(event.wait(LIMIT) for event in staged)
        assert saver.buffers == 2
        for client in clients:
            client.close()


def test_when_memory_gets_short_spare_snapshots_are_given_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, though the trainer has the buffer mapped; and saves go on with one."""
    memory = Memory()
    with saver_in_a_thread(monkeypatch, memory) as saver:
        client = SaverClient("run", [], 2, LIMIT, linger=0)
        client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
        assert save_in_memory(client, 1).wait(LIMIT)
        wait_until(lambda: saver.buffers == 2)
        before = _shared_memory(os.getpid())
        memory.pressures.append(Pressure.SHORT)
        wait_until(lambda: saver.buffers == 1)
        assert before - _shared_memory(os.getpid()) > 0
        for step in range(2, 5):
            assert save_in_memory(client, step).wait(LIMIT)
        assert [snapshot.info.step for snapshot in client.snapshots()] in ([4], [])
        assert saver.buffers == 1
        client.close()
    assert [r.getMessage() for r in caplog.records if r.name == "shardckpt"] == [
        "holding one snapshot only in memory: memory is short"
    ]


def test_a_buffer_that_is_being_written_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its save is finished first."""
    memory = Memory()
    with saver_in_a_thread(monkeypatch, memory) as saver:
        client = SaverClient("run", [], 2, LIMIT, linger=0)
        client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
        assert save_in_memory(client, 1).wait(LIMIT)
        taken = client.take()
        memory.pressures.append(Pressure.SHORT)
        wait_until(lambda: not memory.pressures)
        client.begin(protocol.Begin(taken.number, save_info(2), 0, []))
        taken.content[:4] = b"data"
        client.snapshots()
        assert taken.content[:4] == b"data"
        staged = threading.Event()
        stage = protocol.Stage(taken.number, save_info(2), 0, 1, [], b"{}", b"")
        client.stage(stage, lambda _: staged.set())
        assert staged.wait(LIMIT)
        wait_until(lambda: saver.buffers == 1)
        for step in range(3, 5):
            assert save_in_memory(client, step).wait(LIMIT)
        client.close()


def test_after_the_kernel_has_killed_a_new_round_finds_one_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not two, of which one would cost it its life, and it gets no second one."""
    memory = Memory()
    with saver_in_a_thread(monkeypatch, memory) as saver:
        client = SaverClient("run", [], 2, LIMIT, linger=0)
        client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
        for step in (1, 2):
            assert save_in_memory(client, step).wait(LIMIT)
        wait_until(lambda: saver.buffers == 2)
        memory.pressures.append(Pressure.KILLED)
        client.disconnect()  # it dies
        wait_until(lambda: saver.buffers == 1)
        again = SaverClient("run", [], 2, LIMIT, linger=0)
        assert [snapshot.info.step for snapshot in again.snapshots()] == [2]
        again.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
        for step in (3, 4):
            assert save_in_memory(again, step).wait(LIMIT)
        assert saver.buffers == 1
        again.close()


def _shared_memory(pid: int) -> int:
    """Bytes of shared memory that a process has mapped and that are there."""
    found = re.search(r"^RssShmem:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def test_the_plan_changes_between_saves(saver: SaverProcess, trainers: Trainers, run: Path) -> None:
    """As when an optimizer's state appears: by then the buffers are too small."""
    trainer = trainers(run, saver, keep_last=1, **MEMORY_ONLY)
    trainer.do("restore")
    trainer.do("step", 1)
    trainer.do("wait", 1)
    small = saver.memory
    trainer.do("grow")
    for step in (2, 3, 4):
        trainer.do("save_and_wait", step)
        trainer.do("wait_ready")
    grown = saver.memory
    assert grown == 2 * (28 << 20)
    assert grown > small
    trainer.kill()
    again = trainers(run, saver)
    again.do("grow")
    assert again.do("restore") == ("memory", 4, [])


class Sizes(SnapshotMemory):
    """Notes what it allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def allocate(self, size: int) -> tuple[int, int]:
        self.sizes.append(size)
        return super().allocate(size)


def test_after_a_restore_memory_is_ready_before_anything_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plan, which comes later, has the same buffers."""
    state = {"weight": torch.ones(5 << 20)}
    shardckpt.save(tmp_path / "attempt-0001" / "step-00000001", state, step=1)
    memory = Sizes()
    with (
        saver_in_a_thread(monkeypatch, memory) as saver,
        Checkpointer(tmp_path, snapshots=2) as checkpointer,
    ):
        loaded = checkpointer.restore(state)
        assert loaded is not None
        assert loaded.is_complete
        wait_until(lambda: saver.buffers == 2)
        for step in (2, 3, 4):
            checkpointer.save(step, state).wait()
        assert len(memory.sizes) == 2


def test_a_restore_of_a_part_of_the_state_asks_for_no_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What will be saved is not known yet: memory comes with the plan, and is as large."""
    state = {"weight": torch.ones(5 << 20)}
    shardckpt.save(tmp_path / "attempt-0001" / "step-00000001", {**state, "more": torch.ones(3)}, step=1)
    memory = Sizes()
    with (
        saver_in_a_thread(monkeypatch, memory) as saver,
        Checkpointer(tmp_path, snapshots=2) as checkpointer,
    ):
        loaded = checkpointer.restore(state)
        assert loaded is not None
        assert loaded.unused == ("more",)
        checkpointer.save(2, state).wait()
        wait_until(lambda: saver.buffers == 2)
    assert len(set(memory.sizes)) == 1
