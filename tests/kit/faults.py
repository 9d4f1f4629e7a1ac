"""Storages that fail on demand, and remember what they were asked; savers that have such storages."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from shardckpt.saver.channel import listen
from shardckpt.saver.server import SaverServer
from shardckpt.storage import Storage, open_storage
from shardckpt.storage.protocol import Before

__all__ = [
    "Death",
    "FailingOnce",
    "FaultyStorage",
    "HookedStorage",
    "Killed",
    "MisreadStorage",
    "Opener",
    "SaverHost",
    "SaverThread",
    "saver_host",
    "saver_thread",
]

Opener = Callable[[str, dict[str, Any] | None], Storage]


class Killed(BaseException):
    """Stands for the end of the process: a BaseException, so that no handler goes on regardless."""


@dataclass
class _Log:
    calls: list[tuple[str, str]] = field(default_factory=list)
    mutations: int = 0
    dead: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class FaultyStorage:
    """Passes everything on to `inner`, until the N-th mutating call, counted from 1.

    Before that call, and before any later call of any kind, `error` is raised: to the storage,
    the process died there. Folders got with `at` share the count and the record. With
    `fail_at=None` it only records.

    `calls` holds (method, path relative to the outermost folder) of the calls that went through;
    `mutations` counts the calls that change something (write, create, write_pack, delete,
    delete_tree), the failed one included.
    """

    def __init__(
        self, inner: Storage, fail_at: int | None = None, error: BaseException | None = None
    ) -> None:
        self._inner = inner
        self._fail_at = fail_at
        self._error = error if error is not None else Killed("the process died here")
        self._log = _Log()
        self._folder = ""

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def calls(self) -> list[tuple[str, str]]:
        return self._log.calls

    @property
    def mutations(self) -> int:
        return self._log.mutations

    def at(self, path: str) -> FaultyStorage:
        below = type(self)(self._inner.at(path), self._fail_at, self._error)
        below._log, below._folder = self._log, self._name(path)
        return below

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        self._enter("read", path)
        return self._inner.read(path, start, stop)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        self._enter("read_into", path)
        self._inner.read_into(path, offset, buffer)

    def size(self, path: str) -> int:
        self._enter("size", path)
        return self._inner.size(path)

    def write(self, path: str, data: bytes | memoryview) -> None:
        self._enter("write", path, mutates=True)
        self._inner.write(path, data)

    def create(self, path: str, data: bytes) -> None:
        self._enter("create", path, mutates=True)
        self._inner.create(path, data)

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        self._enter("write_pack", path, mutates=True)
        self._inner.write_pack(path, buffer, before)

    def write_pieces(self, path: str, size: int, pieces: Iterable[memoryview]) -> None:
        self._enter("write_pieces", path, mutates=True)
        self._inner.write_pieces(path, size, pieces)

    def fresh(self) -> Storage:
        return self

    def list(self, path: str = "") -> list[str]:
        self._enter("list", path)
        return self._inner.list(path)

    def sizes(self, path: str = "") -> dict[str, int]:
        self._enter("sizes", path)
        return self._inner.sizes(path)

    def delete(self, path: str) -> None:
        self._enter("delete", path, mutates=True)
        self._inner.delete(path)

    def delete_tree(self, path: str) -> None:
        self._enter("delete_tree", path, mutates=True)
        self._inner.delete_tree(path)

    def exclusive(self) -> bool:
        self._enter("exclusive", "")
        return self._inner.exclusive()

    def _name(self, path: str) -> str:
        return "/".join(part for part in (self._folder, path) if part)

    def _enter(self, method: str, path: str, *, mutates: bool = False) -> None:
        with self._log.lock:
            if mutates and not self._log.dead:
                self._log.mutations += 1
                self._log.dead = self._log.mutations == self._fail_at
            if self._log.dead:
                raise self._error
            self._log.calls.append((method, self._name(path)))


class FailingOnce(FaultyStorage):
    """Fails in the N-th mutating call only, and is well before and afterwards."""

    def _enter(self, method: str, path: str, *, mutates: bool = False) -> None:
        try:
            super()._enter(method, path, mutates=mutates)
        finally:
            self._log.dead = False


class HookedStorage(FaultyStorage):
    """Calls `hook(method, path)` before each call, which may wait, or raise what is to go wrong.

    `path` is relative to the outermost folder.
    """

    def __init__(self, inner: Storage, hook: Callable[[str, str], object]) -> None:
        super().__init__(inner)
        self._hook = hook

    def at(self, path: str) -> HookedStorage:
        below = HookedStorage(self._inner.at(path), self._hook)
        below._log, below._folder = self._log, self._name(path)
        return below

    def _enter(self, method: str, path: str, *, mutates: bool = False) -> None:
        self._hook(method, self._name(path))
        super()._enter(method, path, mutates=mutates)


class MisreadStorage(FaultyStorage):
    """One bit of what it reads is wrong: in files whose path ends with `name`, as often as `times` says.

    What is stored is right. `fresh` gives a folder of which the same is true: it shares the count.
    """

    def __init__(self, inner: Storage, name: str, times: int = 1) -> None:
        super().__init__(inner)
        self._file = name
        self._left = [times]

    @property
    def is_done(self) -> bool:
        """Whether all wrong bits have been read."""
        return self._left[0] <= 0

    def at(self, path: str) -> MisreadStorage:
        below = MisreadStorage(self._inner.at(path), self._file)
        below._log, below._folder, below._left = self._log, self._name(path), self._left
        return below

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        data = bytearray(super().read(path, start, stop))
        self._spoil(path, memoryview(data))
        return bytes(data)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        super().read_into(path, offset, buffer)
        self._spoil(path, buffer)

    def _spoil(self, path: str, data: memoryview) -> None:
        with self._log.lock:
            is_content = len(data) > 1  # and not a look at whether the file is there
            if path.endswith(self._file) and is_content and self._left[0] > 0:
                self._left[0] -= 1
                data[len(data) // 2] ^= 1


# -- savers


@dataclass(frozen=True)
class Death:
    """When a saver's process ends, by SIGKILL: in the N-th of those calls that change the tier at `url`.

    kind:
        "before": before that storage call.
        "within": in the middle of it: half a pack is there, or half a folder is gone; or, where a storage call is
            all or nothing, when it is done and the saver does not know yet.
        "system": before the N-th system call that changes something in the tier's folder.
    """

    url: str
    number: int
    kind: str

    def opener(self, url: str, options: dict[str, Any] | None) -> Storage:
        """Opens storages as a saver does that dies so."""
        storage = open_storage(url, options)
        return _Deadly(storage, self) if url == self.url and self.kind != "system" else storage

    def lie_in_wait(self) -> None:
        """Have this process die so, if it is in a system call."""
        if self.kind == "system":
            count = itertools.count(1)
            sys.addaudithook(lambda event, args: self._look(event, args, count))

    def _look(self, event: str, args: tuple[Any, ...], count: Iterator[int]) -> None:
        if event == "open":
            changes = bool(args[2] & (os.O_CREAT | os.O_TRUNC))
        else:
            changes = event in ("os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link")
        if changes and str(args[0]).startswith(self.url) and next(count) == self.number:
            _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Deadly(FaultyStorage):
    """Ends the process in its N-th mutating call."""

    def __init__(self, inner: Storage, death: Death) -> None:
        super().__init__(inner)
        self._death = death
        self._count = itertools.count(1)

    def at(self, path: str) -> _Deadly:
        below = _Deadly(self._inner.at(path), self._death)
        below._count = self._count
        return below

    def write(self, path: str, data: bytes | memoryview) -> None:
        with self._dying(lambda: self._inner.write(path, data)):
            super().write(path, data)

    def create(self, path: str, data: bytes) -> None:
        with self._dying(lambda: self._inner.create(path, data)):
            super().create(path, data)

    def write_pack(self, path: str, buffer: memoryview, before: Before | None = None) -> None:
        with self._dying(lambda: self._inner.write_pack(path, buffer[: len(buffer) // 2])):
            super().write_pack(path, buffer, before)

    def delete(self, path: str) -> None:
        with self._dying(lambda: self._inner.delete(path)):
            super().delete(path)

    def delete_tree(self, path: str) -> None:
        with self._dying(lambda: self._delete_half(path)):
            super().delete_tree(path)

    def _delete_half(self, path: str) -> None:
        for name in self._inner.list(path)[:2]:
            self._inner.delete_tree(f"{path}/{name}" if path else name)
            self._inner.delete(f"{path}/{name}" if path else name)

    @contextlib.contextmanager
    def _dying(self, in_part: Callable[[], object]) -> Iterator[None]:
        if next(self._count) == self._death.number:
            if self._death.kind == "within":
                in_part()
            _die()
        yield


class SaverHost:
    """What an agent is to its saver: holds the address, starts it, and starts another when it was killed."""

    def __init__(self, context: multiprocessing.context.BaseContext) -> None:
        self.address = f"test-saver-{secrets.token_hex(8)}"
        self.deaths = 0
        self._context = context
        self._listener = listen(self.address)
        self._control: socket.socket | None = None
        self._process: Any = None
        self._watch: threading.Thread | None = None
        self._is_over = False
        self._is_draining = False

    def start(self, death: Death | None = None) -> None:
        """Start a saver, which dies as told."""
        self.deaths = 0
        self._is_draining = False
        self._launch(death)
        self._watch = threading.Thread(target=self._keep_one, daemon=True)
        self._watch.start()

    def kill(self) -> None:
        """Kill the present saver."""
        self._process.kill()

    def drain(self, seconds: float = 30.0) -> int:
        """Have the saver persist what is left and end. Its exit code."""
        assert self._control is not None
        assert self._watch is not None
        self._is_draining = True
        self._control.shutdown(socket.SHUT_WR)
        self._watch.join(seconds)
        assert not self._watch.is_alive(), "the saver hangs"
        self._control.close()
        return int(self._process.exitcode)

    def close(self) -> None:
        """End it all."""
        self._is_over = True
        if self._watch is not None and self._watch.is_alive():
            self.kill()
            self._watch.join()
        self._listener.close()

    def _launch(self, death: Death | None) -> None:
        self._control, theirs = socket.socketpair()
        target = (self._listener, theirs, death)
        self._process = self._context.Process(target=_serve, args=target, daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()

    def _keep_one(self) -> None:
        while True:
            self._process.join()
            if self._process.exitcode != -signal.SIGKILL or self._is_over or self._is_draining:
                return
            self.deaths += 1
            self._launch(None)


@contextlib.contextmanager
def saver_host(context: multiprocessing.context.BaseContext) -> Iterator[SaverHost]:
    """A SaverHost whose savers are for all Checkpointers of this process."""
    host = SaverHost(context)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LAUNCH_SAVER", host.address)
            yield host
    finally:
        host.close()


def _serve(listener: socket.socket, control: socket.socket, death: Death | None) -> None:
    os.fsync = lambda _fd: None  # what the kernel has is not lost with a process
    if death is not None:
        death.lie_in_wait()
    opener = open_storage if death is None else death.opener
    code = SaverServer(listener, control, opener=opener).run()
    os._exit(code)


class SaverThread:
    """A saver in a thread of this process."""

    def __init__(self, opener: Opener) -> None:
        self.address = f"test-saver-{secrets.token_hex(8)}"
        self.code: int | None = None
        self._control, theirs = socket.socketpair()
        saver = SaverServer(listen(self.address), theirs, opener=opener)

        def work() -> None:
            self.code = saver.run()
            theirs.close()

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def drain(self, seconds: float = 30.0) -> int | None:
        """Have it persist what is left and end. Its exit code."""
        with contextlib.suppress(OSError):  # nothing more to read; or a call before this one has closed it
            self._control.shutdown(socket.SHUT_WR)
            self._control.setblocking(False)
            while self._control.recv(1 << 16):
                pass
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the saver hangs"
        self._control.close()
        return self.code


@contextlib.contextmanager
def saver_thread(opener: Opener = open_storage) -> Iterator[SaverThread]:
    """A saver for all Checkpointers of this process, which ends when they are closed."""
    saver = SaverThread(opener)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAUNCH_SAVER", saver.address)
        yield saver
    saver.drain()
