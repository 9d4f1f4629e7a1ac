"""The progress file, by which a worker tells the launcher how far it is; see docs/worker-contract.md."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ProgressFile"]

_log = logging.getLogger("shardckpt")

_LINE_BYTES = 42
_FACTS_BYTES = 214
_NO_STEP = -1
_compact = json.JSONEncoder(separators=(",", ":")).encode


@dataclass
class ProgressFile:
    """One rank's progress file at `path`. Best effort: training does not stop for it."""

    path: str
    _descriptor: int | None = field(default=None, repr=False)
    _has_stepped: bool = field(default=False, repr=False)

    @classmethod
    def of_worker(cls) -> ProgressFile | None:
        """The file that the launcher named in LAUNCH_PROGRESS_FILE, if there is a launcher.

        The same for all who ask in this process.
        """
        path = os.environ.get("LAUNCH_PROGRESS_FILE")
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
            self._write(_line(step), {"first_step": time.time(), **self._read()[1], **news})
            self._has_stepped = True

    @contextlib.contextmanager
    def _best_effort(self) -> Iterator[None]:
        try:
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


def _line(step: int) -> bytes:
    return f"{step:20d} {time.time():20.6f}\n".encode()


def _loss(loss: Any) -> dict[str, Any]:
    """As JSON has it. Nothing waits for a device here, which would hold up every step."""
    if not getattr(loss, "is_cpu", True):
        return {}
    try:
        number = float(loss)
    except (TypeError, ValueError, RuntimeError):
        return {}
    return {"loss": number if abs(number) < float("inf") else str(number)}
