"""A storage that fails on demand, and remembers what it was asked."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from shardckpt.storage import Storage
from shardckpt.storage.protocol import Before

__all__ = ["FailingOnce", "FaultyStorage", "Killed"]


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

    def list(self, path: str = "") -> list[str]:
        self._enter("list", path)
        return self._inner.list(path)

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
