"""The saver and its trainers as real processes that are killed, stopped, and made to misbehave."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import queue
import re
import select
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import shardckpt
from shardckpt.checkpointer import Checkpointer
from shardckpt.errors import SaveError, SaverError, SaverSilentError
from shardckpt.ranks.world import current_ranks
from shardckpt.run.tiers import Tier
from shardckpt.saver import channel as channel_module
from shardckpt.saver import protocol
from shardckpt.saver.buffers import Pressure, SnapshotMemory
from shardckpt.saver.channel import _HEADER, Channel, address_of, connect, listen
from shardckpt.saver.client import SaverClient
from shardckpt.saver.server import SaverServer
from shardckpt.saver.silence import Silence
from shardckpt.saving.saver_backend import SaverBackend
from shardckpt.saving.session import SaveHandle
from tests.kit.parallel import Training
from tests.kit.savers import LIMIT, SaverProcess, connected, save_info, wait_until
from tests.kit.trainers import client_of, saver_of, session_of
from tests.kit.worlds import context


def wait_for_end(pid: int) -> None:
    """Of a process that need not be a child."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        assert select.select([pidfd], [], [], LIMIT)[0], f"process {pid} does not end"
        os.close(pidfd)


def own_saver(url: Path) -> int:
    """The process id of the saver that a run's first Checkpointer has started."""
    name = address_of(str(url)).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if name in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise AssertionError("there is no saver")


# -- trainers


class Trainer:
    """A process, a rank, that does with a Checkpointer what it is told."""

    def __init__(
        self,
        url: Path | str,
        saver: SaverProcess | None = None,
        *,
        world: tuple[int, int, str] = (0, 1, ""),
        environment: dict[str, str] | None = None,
        layout: str = "",
        **options: Any,
    ) -> None:
        env = {
            "SHARDCKPT_LINGER": "60",
            "LAUNCH_SAVER": saver.address if saver else "",
            **(environment or {}),
        }
        options = {"snapshots": 2, "every_steps": 1, "commit_timeout": LIMIT, **options}
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_train, args=(theirs, env, str(url), world, layout, options), daemon=False
        )
        self.process.start()
        theirs.close()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def tell(self, order: str, *arguments: Any) -> None:
        """Have it do something, and do not wait for the answer."""
        self._pipe.send((order, arguments))

    def answer(self) -> Any:
        assert self._pipe.poll(LIMIT), "the trainer hangs"
        is_good, value = self._pipe.recv()
        assert is_good, value
        return value

    def do(self, order: str, *arguments: Any) -> Any:
        self.tell(order, *arguments)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(LIMIT)

    def wait_for_death(self) -> None:
        self.process.join(LIMIT)
        assert self.process.exitcode == -signal.SIGKILL

    def end(self) -> None:
        """Whatever it is doing."""
        self.process.kill()
        self.process.join()
        self._pipe.close()


class _Work:
    """What a trainer can be told to do. The state tells the step in every part."""

    def __init__(self, url: str, layout: str, options: dict[str, Any]) -> None:
        self.rank = current_ranks().rank
        self.messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.messages.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("shardckpt").addHandler(handler)
        self.training = Training.make(layout, factor=1.0) if layout else None
        self.state: dict[str, Any] = {
            "w": torch.zeros(5000),
            "v": torch.zeros(5000),
            "step": 0,
            "own": shardckpt.PerRank(-1),
        }
        if self.training is not None:
            self.state["model"] = self.training.model
        self.url, self.options = url, options
        self.handles: dict[int, SaveHandle | None] = {}
        self.open()

    def open(self) -> None:
        self.checkpointer = Checkpointer(self.url, **self.options)

    def restore(self) -> tuple[str, int, list[str]] | None:
        """(tier, step, names of what is not of that step)."""
        loaded = self.checkpointer.restore(self.state)
        if loaded is None:
            return None
        step = loaded.step
        wrong = [name for name in ("v", "w") if not bool((self.state[name] == step).all())]
        wrong += ["step"] if self.state["step"] != step else []
        own = self.state["own"].value
        if loaded.world_size == current_ranks().size and own != 1000 * step + self.rank:
            wrong.append("own")
        if self.training is not None:
            known, held = Training.make("plain", factor=1.0).parameters, self.training.parameters
            for name, tensor in held.items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if not torch.equal(whole, known[name]):
                    wrong.append(name)
        return loaded.tier, step, wrong

    def zero(self) -> None:
        """Have a model that nobody takes for the one that was saved."""
        assert self.training is not None
        for parameter in self.training.model.parameters():
            parameter.data.zero_()

    def set(self, step: int) -> None:
        self.state["w"].fill_(step)
        self.state["v"].fill_(step)
        self.state["step"] = step
        self.state["own"] = shardckpt.PerRank(1000 * step + self.rank)

    def step(self, step: int) -> bool:
        """Whether a save was started."""
        self.set(step)
        self.handles[step] = self.checkpointer.step(step, self.state)
        return self.handles[step] is not None

    def save(self, step: int) -> None:
        self.set(step)
        self.handles[step] = self.checkpointer.save(step, self.state)

    def save_and_wait(self, step: int, tier: str | None = None) -> None:
        self.save(step)
        self.wait(step, tier)

    def wait(self, step: int, tier: str | None = None) -> None:
        handle = self.handles[step]
        assert handle is not None
        handle.wait(tier)

    def wait_failed(self, step: int) -> str:
        try:
            self.wait(step)
        except SaveError as error:
            return str(error)
        raise AssertionError("it did not fail")

    def die_in_copy(self, step: int) -> None:
        """In the middle of the copy."""

        def half(target: int, source: int, nbytes: int) -> None:
            move(target, source, nbytes // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        move, ctypes.memmove = ctypes.memmove, half  # type: ignore[assignment]
        self.step(step)
        os._exit(3)  # it was copied in another way

    def grow(self) -> None:
        """As an optimizer does in its first step."""
        self.state["exp_avg"] = torch.ones(7_000_000)

    def fork(self) -> int:
        """Have a child, as a DataLoader has, that outlives this process."""
        child = os.fork()
        if not child:
            signal.pause()
        return child

    def patience(self, seconds: float) -> None:
        saver_of(self.checkpointer).limit_silence(seconds)

    def said(self, text: str) -> bool:
        return any(text in message for message in self.messages)

    def lost_saver(self) -> None:
        """Wait until it is known here that the saver is gone."""
        client = client_of(self.checkpointer)
        wait_until(lambda: client.is_lost)

    def wait_ready(self) -> None:
        """Until a buffer is there."""
        client = client_of(self.checkpointer)
        wait_until(lambda: client.has_buffer)

    def prepare(self) -> None:
        session_of(self.checkpointer).prepare(self.state)

    def close(self) -> None:
        self.checkpointer.close()

    def close_fails(self) -> str:
        try:
            self.checkpointer.close()
        except SaveError as error:
            return str(error)
        raise AssertionError("close did not raise")


def _train(
    pipe: Any,
    env: dict[str, str],
    url: str,
    world: tuple[int, int, str],
    layout: str,
    options: dict[str, Any],
) -> None:
    for name, value in env.items():
        if value:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    rank, size, store = world
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    work = _Work(url, layout, options)
    while True:
        try:
            order, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, getattr(work, order)(*arguments)))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))


class Trainers:
    """Makes trainers, and sees to it that none is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[Trainer] = []

    def __call__(self, url: Path | str, saver: SaverProcess | None = None, **options: Any) -> Trainer:
        self._made.append(Trainer(url, saver, **options))
        return self._made[-1]

    def world(self, url: Path | str, savers: Sequence[SaverProcess], **options: Any) -> list[Trainer]:
        """One rank for each of `savers`: that of its node."""
        store = tempfile.mktemp(dir=self._folder)
        return [
            self(url, saver, world=(rank, len(savers), store), **options)
            for rank, saver in enumerate(savers)
        ]

    def end(self) -> None:
        for trainer in self._made:
            trainer.end()


@pytest.fixture
def trainers(tmp_path: Path) -> Iterator[Trainers]:
    made = Trainers(tmp_path)
    yield made
    made.end()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def everyone(world: Sequence[Trainer], order: str, *arguments: Any) -> list[Any]:
    for trainer in world:
        trainer.tell(order, *arguments)
    return [trainer.answer() for trainer in world]


def saved(run: Path) -> list[str]:
    """The checkpoints that exist, as attempt/step."""
    return sorted(
        f"{int(path.parent.parent.name[8:])}/{int(path.parent.name[5:])}"
        for path in run.glob("attempt-*/step-*/manifest.json")
    )


def check_newest(run: Path, step: int) -> None:
    state = {"w": torch.zeros(5000), "step": 0}
    assert shardckpt.load(run, state, strict=False).step == step
    assert state["step"] == step
    assert bool((state["w"] == step).all())
    shardckpt.open(run).verify()


MEMORY_ONLY = {"url_every_steps": 1000}


# -- a trainer dies


def test_a_save_needs_no_trainer_once_it_has_returned(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    """Not even to hand anything over: here the saver hears of it after the trainer's death only."""
    trainer = trainers(run, saver)
    trainer.do("restore")
    trainer.do("prepare")
    trainer.do("wait_ready")
    saver.send(signal.SIGSTOP)
    assert trainer.do("step", 1)
    trainer.kill()
    assert saved(run) == []
    saver.send(signal.SIGCONT)
    assert saver.told("staged")["step"] == 1
    assert saver.told("persisted")["step"] == 1
    check_newest(run, 1)
    again = trainers(run, saver)
    assert again.do("restore") == ("memory", 1, [])


def test_death_in_the_middle_of_a_copy_leaves_the_snapshot_before(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    trainer = trainers(run, saver, **MEMORY_ONLY)
    for step in (1, 2, 3):
        trainer.do("step", step)
        trainer.do("wait", step)
        trainer.do("wait_ready")
    trainer.tell("die_in_copy", 4)
    trainer.wait_for_death()
    again = trainers(run, saver, **MEMORY_ONLY)
    assert again.do("restore") == ("memory", 3, [])
    again.kill()
    assert saver.drain() == 0
    check_newest(run, 3)


def test_the_newest_snapshot_is_persisted_by_a_drain(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    """Even if what the trainer sent, and its death, and the drain are heard of at one time."""
    trainer = trainers(run, saver, **MEMORY_ONLY)
    trainer.do("restore")
    trainer.do("step", 1)
    trainer.do("wait", 1)
    trainer.do("wait_ready")
    saver.send(signal.SIGSTOP)
    trainer.do("step", 2)
    trainer.kill()
    saver._control.shutdown(socket.SHUT_WR)
    saver.send(signal.SIGCONT)
    persisted = saver.told("persisted")
    assert (persisted["step"], persisted["tier"]) == (2, "local")
    assert persisted["url"].endswith("/attempt-0001/step-00000002")
    assert saver.drain() == 0
    assert saved(run) == ["1/2"]
    check_newest(run, 2)


def test_a_saver_that_cannot_persist_says_so_and_exits_with_1(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    trainer = trainers(run, saver)
    trainer.do("restore")
    (run / "attempt-0001" / "step-00000001").write_text("in the way")
    trainer.do("step", 1)
    assert "step-00000001" in trainer.do("wait_failed", 1)
    failed = saver.told("failed")
    assert (failed["step"], failed["tier"]) == (1, "local")
    assert failed["error"]
    trainer.kill()
    assert saver.drain() == 1


def test_a_forked_child_does_not_hide_the_death_of_a_trainer(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    """It has the connection open. What the trainer was in the middle of is lost, and said to be so."""
    world = trainers.world(run, [saver, saver], **MEMORY_ONLY)
    everyone(world, "restore")
    everyone(world, "prepare")
    child = world[1].do("fork")
    world[0].tell("step", 1)
    world[1].tell("die_in_copy", 1)
    try:
        assert world[0].answer()
        world[1].wait_for_death()
        assert "a rank ended before it had staged its part" in world[0].do("wait_failed", 1)
    finally:
        os.kill(child, signal.SIGKILL)


# -- zombies


def test_a_zombie_disturbs_nobody(saver: SaverProcess, trainers: Trainers, run: Path) -> None:
    zombie = trainers(run, saver, **MEMORY_ONLY)
    zombie.do("restore")
    for step in (1, 2):
        zombie.do("step", step)
        zombie.do("wait", step)
    os.kill(zombie.pid, signal.SIGSTOP)
    trainer = trainers(run, saver, **MEMORY_ONLY)
    assert trainer.do("restore") == ("memory", 2, [])
    trainer.do("step", 3)
    trainer.do("wait", 3)
    os.kill(zombie.pid, signal.SIGCONT)
    for step in (3, 4, 5, 6):
        zombie.do("save_and_wait", step)
    trainer.kill()
    again = trainers(run, saver, **MEMORY_ONLY)
    assert again.do("restore") == ("memory", 3, [])
    again.kill()
    zombie.kill()
    assert saver.drain() == 0
    assert saved(run) == ["1/3", "1/4", "1/5", "1/6", "2/3"]
    check_newest(run, 3)


# -- the saver dies, or is stopped


def test_training_goes_on_with_a_new_saver(trainers: Trainers, run: Path) -> None:
    trainer = trainers(run)
    trainer.do("restore")
    trainer.do("save_and_wait", 1)
    first = own_saver(run)
    os.kill(first, signal.SIGKILL)
    wait_for_end(first)
    trainer.do("lost_saver")
    assert trainer.do("said", "the snapshots that were in memory only")
    check_newest(run, 1)
    trainer.do("save_and_wait", 2)
    second = own_saver(run)
    assert second != first
    check_newest(run, 2)
    trainer.do("close")
    wait_for_end(second)


def test_a_save_that_the_saver_took_with_it_is_raised_by_close(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    trainer = trainers(run, saver)
    trainer.do("restore")
    trainer.do("save_and_wait", 1)
    trainer.do("wait_ready")
    saver.send(signal.SIGSTOP)
    trainer.do("step", 2)
    saver.kill()
    assert "the saver of this node is gone" in trainer.do("close_fails")
    assert saved(run) == ["1/1"]
    check_newest(run, 1)


def test_a_stopped_saver_does_not_stop_training(saver: SaverProcess, trainers: Trainers, run: Path) -> None:
    trainer = trainers(run, saver)
    trainer.do("restore")
    trainer.do("prepare")
    trainer.do("wait_ready")
    saver.send(signal.SIGSTOP)
    started = [trainer.do("step", step) for step in range(1, 6)]
    assert True in started
    assert started[-1] is False
    assert trainer.do("said", "no checkpoint at step ")
    saver.send(signal.SIGCONT)
    trainer.do("wait", 1)
    trainer.do("save_and_wait", 6)
    check_newest(run, 6)


def test_a_saver_that_never_answers_is_given_up(saver: SaverProcess, trainers: Trainers, run: Path) -> None:
    """From its first buffer on: saves are written by the trainer, then, and nothing hangs."""
    trainer = trainers(run, saver)
    trainer.do("restore")
    trainer.do("patience", 0.3)
    saver.send(signal.SIGSTOP)
    assert trainer.do("step", 1)
    assert "has not answered" in trainer.do("wait_failed", 1)
    assert trainer.do("step", 2)
    trainer.do("wait", 2)
    assert trainer.do("said", "from now on saves are written by the trainers")
    check_newest(run, 2)


# -- who may talk to whom


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


# -- silence


def impatient(saver: SaverProcess, monkeypatch: pytest.MonkeyPatch) -> SaverClient:
    monkeypatch.setenv("LAUNCH_SAVER", saver.address)
    return SaverClient("run", [], 2, LIMIT, linger=0, patience=0.3, interval=0.1)


def test_a_saver_that_is_stopped_is_given_up(
    saver: SaverProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever waits for it is told what it is, and a save that it has becomes durable once it goes on."""
    connected(saver, monkeypatch).close()  # so that it has started
    tier = Tier("local", str(tmp_path))
    client = SaverClient("run", [tier], 2, LIMIT, linger=0, patience=0.3, interval=0.1)
    client.plan(protocol.ChunkTable(1, [], [], [], 100, b""), 2)
    memory = client.take()
    saver.send(signal.SIGSTOP)
    outcomes: queue.SimpleQueue[protocol.Outcome] = queue.SimpleQueue()
    info = save_info(1, world_size=2)
    client.begin(protocol.Begin(memory.number, info, 1, ["local"]))
    client.stage(protocol.Stage(memory.number, info, 1, 1, ["local"], b"{}", b""), outcomes.put)
    found = {outcomes.get(timeout=LIMIT).tier for _ in range(2)}
    assert found == {"memory", "local"}
    assert isinstance(client.loss, SaverSilentError)
    assert str(client.loss) == (
        f"the saver of this node (process {saver.pid}, stopped by a signal) has not answered for 0.3 s"
    )
    with pytest.raises(SaverSilentError):
        client.take()
    with pytest.raises(SaverSilentError):
        client.snapshots()
    saver.send(signal.SIGCONT)
    assert saver.told("staged")["step"] == 1


def test_whether_a_saver_answers(saver: SaverProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connected(saver, monkeypatch)
    assert client.probe(LIMIT)
    saver.send(signal.SIGSTOP)
    assert not client.probe(0.1)
    assert isinstance(client.loss, SaverSilentError)
    with pytest.raises(SaverSilentError, match=r"has not answered for 0\.3 s"):
        impatient(saver, monkeypatch)
    saver.send(signal.SIGCONT)
    again = connected(saver, monkeypatch)
    assert again.snapshots() == []
    again.close()


def test_a_sink_does_not_wait_for_long_again(saver: SaverProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a save entrusted to a saver that does not answer."""
    monkeypatch.setenv("LAUNCH_SAVER", saver.address)
    sink = SaverBackend("run", [], 2, LIMIT, linger=0)
    first = sink.connect()
    saver.send(signal.SIGSTOP)
    sink.probe(0.1)
    assert first.is_lost
    with pytest.raises(SaverSilentError, match="has not answered for 2 s"):
        sink.connect()
    saver.send(signal.SIGCONT)
    assert sink.connect().probe(LIMIT)
    sink.close()


def test_silence_counts_only_while_it_is_listened_to() -> None:
    """A trainer that was stopped itself has not been waiting."""
    silence = Silence(patience=3.0, interval=1.0)
    assert not silence.passed()
    silence.is_asked = True
    assert [silence.passed() for _ in range(3)] == [False, False, True]
    silence.heard()
    assert (silence.seconds, silence.is_asked) == (0.0, False)
    silence.limit(1.0)
    silence.is_asked = True
    assert [silence.passed() for _ in range(2)] == [False, True]


# -- messages


def raw(saver: SaverProcess) -> socket.socket:
    connection = connect(saver.address)
    connection.settimeout(LIMIT)
    return connection


def hello() -> bytes:
    data = msgspec.msgpack.encode(protocol.Hello("run", [], 2, 1.0))
    return _HEADER.pack(len(data), 0) + data


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\xff" * 100,
        _HEADER.pack(5, 0) + b"\xc1" * 5,
        _HEADER.pack(0, 0),
        hello() + _HEADER.pack(14, 0) + msgspec.msgpack.encode({"type": "NewIdea"}),
        hello() + _HEADER.pack(15, 0) + msgspec.msgpack.encode({"type": "Reserve"}) + b"\0",
        hello() + _HEADER.pack(1, 3) + b"\0",
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


def test_descriptors_come_with_their_own_message() -> None:
    """However the messages are queued, and torn apart on the way."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    sender, receiver = Channel(ours), Channel(theirs)
    files = [SnapshotMemory().allocate(1)[0] for _ in range(5)]
    try:
        for number in range(120):
            sender.send(protocol.Outcome("x" * (number * 97 % 5000), str(number)))
            if number % 3 == 0:
                chosen = [files[(number + i) % 5] for i in range(number % 4)]
                sender.send(protocol.Attached([number], []), chosen)
        channel_module._READ, old = 13, channel_module._READ
        try:
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
            channel_module._READ = old
    finally:
        sender.close()
        receiver.close()
        for file in files:
            os.close(file)


# -- memory


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


def test_nothing_leaks(saver: SaverProcess, trainers: Trainers, run: Path) -> None:
    """Neither descriptors nor memory, in fifty saves of five worlds that are killed."""
    shm = sorted(Path("/dev/shm").iterdir())
    seen = []
    step = 0
    for _ in range(5):
        trainer = trainers(run, saver, keep_last=2)
        loaded = trainer.do("restore")
        assert loaded == (("memory", step, []) if step else None)
        for _ in range(10):
            step += 1
            trainer.do("save_and_wait", step)
        trainer.do("wait_ready")
        seen.append((saver.descriptors, saver.memory))
        if seen[0] != seen[-1]:  # a thread may have a file of the run open just now
            wait_until(lambda: (saver.descriptors, saver.memory) == seen[0])
            seen.pop()
        trainer.kill()
    assert len(set(seen)) == 1, seen
    assert seen[0][1] == 2 * (2 << 20)
    assert sorted(Path("/dev/shm").iterdir()) == shm
    assert saver.drain() == 0
    assert len(saved(run)) == 2


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


# -- beginning and end


@pytest.mark.parametrize("linger", ["0", "60"])
def test_after_goodbye_nothing_is_left(trainers: Trainers, run: Path, linger: str) -> None:
    trainer = trainers(run, environment={"SHARDCKPT_LINGER": linger}, **MEMORY_ONLY)
    trainer.do("restore")
    trainer.do("step", 1)
    pid = own_saver(run)
    trainer.do("close")
    wait_for_end(pid)
    check_newest(run, 1)


def test_after_a_crash_it_lingers_so_long(trainers: Trainers, run: Path) -> None:
    trainer = trainers(run, environment={"SHARDCKPT_LINGER": "0.2"}, **MEMORY_ONLY)
    trainer.do("restore")
    trainer.do("step", 1)
    trainer.do("wait", 1)
    pid = own_saver(run)
    trainer.kill()
    wait_for_end(pid)
    again = trainers(run)
    again.do("restore")
    wait = own_saver(run)
    again.do("close")
    wait_for_end(wait)


def test_a_restarted_job_finds_its_saver(trainers: Trainers, run: Path) -> None:
    trainer = trainers(run, **MEMORY_ONLY)
    trainer.do("restore")
    trainer.do("step", 1)
    trainer.kill()
    again = trainers(run, **MEMORY_ONLY)
    assert again.do("restore") == ("memory", 1, [])
    pid = own_saver(run)
    again.do("close")
    wait_for_end(pid)


def test_a_closed_checkpointer_can_be_used_again(
    saver: SaverProcess, trainers: Trainers, run: Path
) -> None:
    trainer = trainers(run, saver)
    trainer.do("restore")
    trainer.do("save_and_wait", 1)
    trainer.do("close")
    trainer.do("save_and_wait", 2)
    trainer.do("open")
    assert trainer.do("restore")[1:] == (2, [])
    trainer.do("save_and_wait", 3)
    trainer.do("close")
    trainer.kill()
    assert saver.drain() == 0
    assert saved(run) == ["1/1", "1/2", "2/3"]


def test_two_runs_of_one_process(
    saver: SaverProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCH_SAVER", saver.address)
    names = ("one", "other")
    made = [Checkpointer(tmp_path / name, snapshots=2, every_steps=1, **MEMORY_ONLY) for name in names]
    states = [{"w": torch.full((10,), number)} for number in range(2)]
    for step in (1, 2):
        for checkpointer, state in zip(made, states, strict=True):
            handle = checkpointer.step(step, state)
            assert handle is not None
            handle.wait()
    for number, checkpointer in enumerate(made):
        state = {"w": torch.zeros(10, dtype=torch.int64)}
        loaded = checkpointer.restore(state)
        assert loaded is not None
        assert (loaded.tier, loaded.step) == ("memory", 2)
        assert bool((state["w"] == number).all())
        checkpointer.close()
    assert saver.drain() == 0
    for name in names:
        assert saved(tmp_path / name) == ["1/2"]


# -- several nodes


@pytest.fixture
def nodes() -> Iterator[list[SaverProcess]]:
    made = [SaverProcess(f"shardckpt-test-{number}-{os.urandom(6).hex()}") for number in range(2)]
    yield made
    for saver in made:
        saver.close()


def test_two_nodes(nodes: list[SaverProcess], trainers: Trainers, run: Path) -> None:
    """Both savers persist their ranks' packs, and one commits. Snapshots are restored on as many ranks, and on
    fewer, which are elsewhere; without one of the nodes there are only checkpoints."""
    one, other = nodes
    world = trainers.world(run, [one, one, other, other], layout="fsdp", url_every_steps=2)
    assert everyone(world, "restore") == [None] * 4
    for step in (1, 2, 3):
        everyone(world, "save_and_wait" if step == 2 else "step", step)
    everyone(world, "wait", 3)
    assert saved(run) == ["1/2"]
    assert {json.loads(path.read_text())["rank"] for path in run.glob("*/*/rank-*/part.json")} == set(
        range(4)
    )
    for trainer in world:
        trainer.kill()
    world = trainers.world(run, [one, one, other, other], layout="fsdp")
    everyone(world, "zero")
    assert everyone(world, "restore") == [("memory", 3, [])] * 4
    for trainer in world:
        trainer.kill()
    world = trainers.world(run, [other, one, other], layout="fsdp", url_every_steps=1000)
    everyone(world, "zero")
    assert everyone(world, "restore") == [("memory", 3, [])] * 3
    everyone(world, "step", 4)
    everyone(world, "wait", 4)
    for trainer in world:
        trainer.kill()
    one.kill()
    one.start()
    world = trainers.world(run, [one, one, other, other], layout="fsdp")
    everyone(world, "zero")
    assert everyone(world, "restore") == [("local", 2, [])] * 4
    everyone(world, "save_and_wait", 5)
    for trainer in world:
        trainer.kill()
    check_newest(run, 5)


def test_a_part_is_no_checkpoint(nodes: list[SaverProcess], trainers: Trainers, run: Path) -> None:
    """A saver that has written its part waits for the other's commit before it says that the save is durable, and
    ends with 1 if there was none."""
    one, other = nodes
    world = trainers.world(run, nodes)
    everyone(world, "restore")
    everyone(world, "prepare")
    everyone(world, "wait_ready")
    one.send(signal.SIGSTOP)
    assert everyone(world, "step", 1) == [True, True]
    assert other.told("staged")["step"] == 1
    part = run / "attempt-0001/step-00000001/rank-00001/part.json"
    wait_until(part.exists)
    one.kill()
    assert other.told_of(1)["event"] == "failed"
    for trainer in world:
        trainer.kill()
    assert other.drain() == 1
    assert saved(run) == []


def test_what_both_nodes_tell_is_committed(
    nodes: list[SaverProcess], trainers: Trainers, run: Path
) -> None:
    world = trainers.world(run, nodes)
    everyone(world, "restore")
    for step in (1, 2):
        everyone(world, "save", step)
        for saver in reversed(nodes):
            assert saver.told_of(step)["event"] == "persisted"
            assert f"1/{step}" in saved(run)
    everyone(world, "close")
    assert [saver.drain() for saver in nodes] == [0, 0]


def test_a_node_that_lacks_its_part_of_the_newest(
    nodes: list[SaverProcess], trainers: Trainers, run: Path
) -> None:
    """The job resumes from the snapshot before, which the other node still has."""
    world = trainers.world(run, nodes, **MEMORY_ONLY)
    everyone(world, "restore")
    for step in (1, 2):
        everyone(world, "step", step)
        everyone(world, "wait", step)
        everyone(world, "wait_ready")
    world[0].tell("step", 3)
    world[1].tell("die_in_copy", 3)
    world[0].answer()
    world[0].do("wait", 3, "memory")
    for trainer in world:
        trainer.kill()
    world = trainers.world(run, nodes, **MEMORY_ONLY)
    assert everyone(world, "restore") == [("memory", 2, [])] * 2
