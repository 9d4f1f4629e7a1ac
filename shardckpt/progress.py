"""The progress file, by which a worker tells the launcher how far it is; see docs/worker-contract.md."""

from __future__ import annotations

import json
import logging
import os
import time
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
    _facts: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of_worker(cls) -> ProgressFile | None:
        """The file that the launcher named in LAUNCH_PROGRESS_FILE, if there is a launcher.

        The same for all who ask in this process, since what one tells must not undo what another told.
        """
        path = os.environ.get("LAUNCH_PROGRESS_FILE")
        return _files.setdefault(path, cls(path)) if path else None

    def tell(self, **facts: Any) -> None:
        """Tell some of the facts of the contract. What was told before stands, until it is told to be None."""
        merged = {**facts, **self._facts}
        self._facts = {name: value for name, value in merged.items() if facts.get(name, value) is not None}
        self._write(None)

    def step(self, step: int, loss: object = None) -> None:
        """Tell that `step` optimizer steps are done. A loss that is no number on this host is left out."""
        news: dict[str, Any] = {} if loss is None else _loss(loss)
        if "first_step" not in self._facts:
            news["first_step"] = time.time()
        self._facts.update(news)
        self._write(step, whole=bool(news))

    def _write(self, step: int | None, *, whole: bool = True) -> None:
        """In one system call, so that nobody reads half of it. A step of None: the one in the file."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            data = _line(step) if step is not None else self._last_line(self._descriptor)
            if whole:
                text = _compact(self._facts).encode()
                data += text.ljust(_FACTS_BYTES - 1) + b"\n"
            os.pwrite(self._descriptor, data, 0)
        except OSError as error:
            _log.debug("%s cannot be written: %s", self.path, error)

    def _last_line(self, descriptor: int) -> bytes:
        line = os.pread(descriptor, _LINE_BYTES, 0)
        return line if len(line) == _LINE_BYTES and line.endswith(b"\n") else _line(_NO_STEP)


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
