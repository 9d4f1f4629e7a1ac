"""Trainers as processes of their own, which do with a Checkpointer what a test tells them."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import shardckpt
from shardckpt.checkpointer import Checkpointer
from shardckpt.errors import SaveError
from shardckpt.ranks.world import current_ranks
from shardckpt.saver.channel import address_of
from shardckpt.saving.session import SaveHandle
from tests.kit.parallel import Training
from tests.kit.savers import LIMIT, SaverProcess, wait_until
from tests.kit.trainers import client_of, saver_of, session_of
from tests.kit.worlds import context

__all__ = [
    "MEMORY_ONLY",
    "Trainer",
    "Trainers",
    "check_newest",
    "everyone",
    "own_saver",
    "saved",
    "wait_for_end",
]

MEMORY_ONLY = {"url_every_steps": 1000}


def own_saver(url: Path) -> int:
    """The process id of the saver that a run's first Checkpointer has started."""
    name = address_of(str(url)).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if name in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise AssertionError("there is no saver")


def wait_for_end(pid: int) -> None:
    """Of a process that need not be a child."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        assert select.select([pidfd], [], [], LIMIT)[0], f"process {pid} does not end"
        os.close(pidfd)


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

    def stay_in_copy(self, step: int) -> None:
        """Stay in the middle of the copy, until it is killed. What goes on in other threads does so."""

        def half(target: int, source: int, nbytes: int) -> None:
            move(target, source, nbytes // 2)
            while True:
                signal.pause()

        move, ctypes.memmove = ctypes.memmove, half  # type: ignore[assignment]
        self.step(step)

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
