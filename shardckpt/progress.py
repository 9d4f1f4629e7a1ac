"""The progress file, by which a worker tells the launcher how far it is; see docs/worker-contract.md."""

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
_BEAT = 1.0  # seconds between two signs of life, however often they are given
_NO_STEP = -1
_compact = json.JSONEncoder(separators=(",", ":")).encode


@dataclass
class ProgressFile:
    """One rank's progress file at `path`. Best effort: training does not stop for it."""

    path: str
    _descriptor: int | None = field(default=None, repr=False)
    _has_stepped: bool = field(default=False, repr=False)
    _phases: list[str] = field(default_factory=list, repr=False)
    _beat: float = field(default=0.0, repr=False)
    _writing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of_worker(cls) -> ProgressFile | None:
        """The file that the launcher named in LAUNCH_PROGRESS_FILE, if there is a launcher.

        The same for all who ask in this process.
        """
        path = progress_path()
        return _files.setdefault(path, cls(path)) if path else None

    def tell(self, **facts: Any) -> None:
        """Tell some of the facts of the contract. What was told before stands, until it is told to be None."""
        with self._best_effort():
            line, known = self._read()
            merged = {**facts, **known}
            self._write(line, {name: v for name, v in merged.items() if facts.get(name, v) is not None})

    def step(self, step: int, loss: object = None) -> None:
        """Tell that `step` optimizer steps are done. A loss that is no number on this host is left out."""
        news: dict[str, Any] = {} if loss is None else _loss(loss)
        with self._best_effort():
            if self._has_stepped and not news:
                os.pwrite(self._open(), _line(step), 0)
                return
            self._write(_line(step), {"first_step": now(), **self._read()[1], **news})
            self._has_stepped = True

    def alive(self) -> None:
        """Tell that this process gets on, in whatever it does. Cheap, and safe from any thread.

        For what may take long besides a step: without it, the launcher takes the process for hung.
        """
        if time.monotonic() >= self._beat:
            self._tell_phase()

    def over(self) -> None:
        """Tell that all is trained that was to be: there will be no more steps."""
        self._correct(over=now())

    def committed(self, tier: str, step: int) -> None:
        """Tell that this process has committed a step's checkpoint itself, without a saver. From any thread."""
        with self._best_effort():
            line, known = self._read()
            before = known.get("saved")
            saved = {**(before if isinstance(before, dict) else {}), tier: step}
            self._write(line, {**known, "saved": saved})

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Tell what the process does in the block, beside what it does around it."""
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
        """Tell facts, whatever was told of them before."""
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
        """The file's first line and its facts, which others in this process may have told."""
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
        """In one system call, so that nobody reads half of it."""
        os.pwrite(self._open(), line + _compact(facts).encode().ljust(_FACTS_BYTES - 1) + b"\n", 0)


_files: dict[str, ProgressFile] = {}


def now() -> float:
    """Seconds since the epoch, as the launcher has them: steps of the system's clock do not change them."""
    offset = clock_offset()
    return time.time() if offset is None else offset + time.monotonic()


def alive() -> None:
    """Tell the launcher, if there is one, that this process gets on. See `ProgressFile.alive`."""
    if (file := ProgressFile.of_worker()) is not None:
        file.alive()


def committed(tier: str, step: int) -> None:
    """Tell the launcher, if there is one, of a checkpoint. See `ProgressFile.committed`."""
    if (file := ProgressFile.of_worker()) is not None:
        file.committed(tier, step)


def doing(what: str) -> contextlib.AbstractContextManager[None]:
    """Tell the launcher, if there is one, what this process does in a block. For its main thread."""
    file = ProgressFile.of_worker()
    return contextlib.nullcontext() if file is None else file.doing(what)


def _line(step: int) -> bytes:
    return f"{step:20d} {now():20.6f}\n".encode()


def _loss(loss: Any) -> dict[str, Any]:
    """As JSON has it. Nothing waits for a device here, which would hold up every step."""
    if not getattr(loss, "is_cpu", True):
        return {}
    try:
        number = float(loss)
    except (TypeError, ValueError, RuntimeError):
        return {}
    return {"loss": number if abs(number) < float("inf") else str(number)}
