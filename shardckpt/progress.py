"""The progress file, in which a worker reports its progress to the launcher; see docs/worker-contract.md."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardckpt.environment import clock_offset, progress_path

__all__ = ["ProgressFile", "alive", "committed", "doing", "now"]

_log = logging.getLogger("shardckpt")

_LINE_BYTES = 42
_FACTS_BYTES = 470
_LONGEST_PHASE = 120  # bytes in the file, where every other key may have its longest value too
_BEAT = 1.0  # seconds between two signs of life in the file
_NO_STEP = -1
_compact = json.JSONEncoder(separators=(",", ":")).encode


@dataclass
class ProgressFile:
    """The progress file of one rank, at `path`. A file that cannot be written is logged, and training goes on."""

    path: str
    _descriptor: int | None = field(default=None, repr=False)
    _has_stepped: bool = field(default=False, repr=False)
    _phases: list[str] = field(default_factory=list, repr=False)
    _beat: float = field(default=0.0, repr=False)
    _writing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of_worker(cls) -> ProgressFile | None:
        """Return the file of LAUNCH_PROGRESS_FILE, one object for the process; None without a launcher."""
        path = progress_path()
        return _files.setdefault(path, cls(path)) if path else None

    def tell(self, **facts: Any) -> None:
        """Report facts of the worker contract that are not reported yet; None removes one.

        A fact that was reported before stays as it is.
        """
        with self._best_effort():
            line, known = self._read()
            merged = {**facts, **known}
            self._write(line, {name: v for name, v in merged.items() if facts.get(name, v) is not None})

    def step(self, step: int, loss: object = None) -> None:
        """Report that `step` optimizer steps are done, with the loss if that is a number on this host."""
        news: dict[str, Any] = {} if loss is None else _loss(loss)
        with self._best_effort():
            if self._has_stepped and not news:
                os.pwrite(self._open(), _line(step), 0)
                return
            self._write(_line(step), {"first_step": now(), **self._read()[1], **news})
            self._has_stepped = True

    def alive(self) -> None:
        """Report a sign of life, at most once a second. Cheap, and safe from any thread.

        For work besides steps that may take long: without it, the launcher takes the process for hung.
        """
        if time.monotonic() >= self._beat:
            self._tell_phase()

    def over(self) -> None:
        """Report that training is complete: no more steps will come."""
        self._correct(over=now())

    def committed(self, tier: str, step: int) -> None:
        """Report that this process has committed the checkpoint of `step`, without a saver. From any thread."""
        with self._best_effort():
            line, known = self._read()
            before = known.get("saved")
            saved = {**(before if isinstance(before, dict) else {}), tier: step}
            self._write(line, {**known, "saved": saved})

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Report what the process does in the block, beside what it does around it."""
        self._phases.append(what)
        self._tell_phase()
        try:
            yield
        finally:
            self._phases.pop()
            self._tell_phase()

    def _tell_phase(self) -> None:
        self._beat = time.monotonic() + _BEAT
        phase = ", ".join(self._phases)
        while len(_compact(phase)) > _LONGEST_PHASE:
            phase = f"{phase[: len(phase) * 2 // 3]}…"
        self._correct(phase=phase or None, alive=now())

    def _correct(self, **facts: Any) -> None:
        """Report facts in place of what was reported of them before; None removes one."""
        with self._best_effort():
            line, known = self._read()
            told = {**known, **facts}
            self._write(line, {name: value for name, value in told.items() if value is not None})

    @contextlib.contextmanager
    def _best_effort(self) -> Iterator[None]:
        try:
            with self._writing:
                yield
        except OSError as error:
            _log.debug("%s cannot be written: %s", self.path, error)

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        return self._descriptor

    def _read(self) -> tuple[bytes, dict[str, Any]]:
        """Return the file's first line and its facts, which other code in this process may have written."""
        data = os.pread(self._open(), _LINE_BYTES + _FACTS_BYTES, 0)
        line = data[:_LINE_BYTES]
        if len(line) != _LINE_BYTES or not line.endswith(b"\n"):
            line = _line(_NO_STEP)
        try:
            facts = json.loads(data[_LINE_BYTES:])
        except ValueError:
            facts = None
        return line, facts if isinstance(facts, dict) else {}

    def _write(self, line: bytes, facts: Mapping[str, Any]) -> None:
        """Write in one system call, so that no reader sees half of it."""
        os.pwrite(self._open(), line + _compact(facts).encode().ljust(_FACTS_BYTES - 1) + b"\n", 0)


_files: dict[str, ProgressFile] = {}


def now() -> float:
    """Return the seconds since the epoch, by a clock that steps of the system's clock do not change."""
    offset = clock_offset()
    return time.time() if offset is None else offset + time.monotonic()


def alive() -> None:
    """Report a sign of life, if there is a launcher: see `ProgressFile.alive`."""
    if (file := ProgressFile.of_worker()) is not None:
        file.alive()


def committed(tier: str, step: int) -> None:
    """Report a checkpoint, if there is a launcher: see `ProgressFile.committed`."""
    if (file := ProgressFile.of_worker()) is not None:
        file.committed(tier, step)


def doing(what: str) -> contextlib.AbstractContextManager[None]:
    """Report what this process does in a block, if there is a launcher. For the main thread."""
    file = ProgressFile.of_worker()
    return contextlib.nullcontext() if file is None else file.doing(what)


def _line(step: int) -> bytes:
    return f"{step:20d} {now():20.6f}\n".encode()


def _loss(loss: Any) -> dict[str, Any]:
    """Return the loss as JSON has it; nothing for one on a device, for which every step would have to wait."""
    if not getattr(loss, "is_cpu", True):
        return {}
    try:
        number = float(loss)
    except (TypeError, ValueError, RuntimeError):
        return {}
    return {"loss": number if abs(number) < float("inf") else str(number)}
