"""The progress file, in which a worker reports its progress. Format: docs/worker-contract.md."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Progress", "read_progress", "report"]

_LINE_BYTES = 42
_FACTS_BYTES = 470
_FILE_BYTES = _LINE_BYTES + _FACTS_BYTES
_compact = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True)
class Progress:
    """The last report of a worker. Times are in seconds since the epoch; None: not reported.

    Args:
        step: optimizer steps done; None: no step yet.
        time: of the report of `step`.
        loss: of the last step that had one.
        drains: true if the worker answers drain requests.
        joined: when its process group was ready.
        restored: when it had looked for a checkpoint, and loaded it if there was one.
        restored_step: the step of that checkpoint; None: there was none.
        restored_tier: where it was: "memory", "local" or "remote".
        first_step: when the worker reported a step for the first time.
        phase: what it did, besides training, at `alive`: "restore", for example.
        alive: its last report besides a step.
        steps: true if it is going to report steps, even if it has not yet.
        world: ranks that have to join, as this one has.
        saved: by tier, the newest step that it has committed itself, without a saver.
        over: when its training was complete: no more steps follow.
    """

    step: int | None
    time: float
    loss: float | None = None
    drains: bool = False
    joined: float | None = None
    restored: float | None = None
    restored_step: int | None = None
    restored_tier: str | None = None
    first_step: float | None = None
    phase: str | None = None
    alive: float | None = None
    steps: bool = False
    world: int = 1
    saved: Mapping[str, int] = field(default_factory=dict)
    over: float | None = None

    @property
    def doing(self) -> str | None:
        """The current phase; None once a step has been reported since."""
        is_past = self.alive is None or (self.step is not None and self.alive < self.time)
        return None if is_past else self.phase

    @property
    def is_over(self) -> bool:
        """True if no more steps follow."""
        return self.over is not None and self.over >= self.time


def report(step: int, *, loss: float | None = None) -> None:
    """Report progress to the launcher. Does nothing in a process that `launch` did not start.

    Cheap enough for every step: one system call, or two and a few microseconds with a loss.

    Args:
        step: optimizer steps done.
        loss: of the last step. If it is a tensor on a device, this call waits for it.

    >>> import launcher
    >>> for step in range(1, 4):
    ...     launcher.report(step, loss=1.0 / step)
    """
    path = os.environ.get("LAUNCH_PROGRESS_FILE")
    if path is None:
        return
    if path not in _files:
        _files[path] = _ProgressFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
    _files[path].write(step, loss)


@dataclass
class _ProgressFile:
    """The open progress file of this process, to which shardckpt may write too."""

    descriptor: int
    anchor: float = field(
        default_factory=lambda: _anchor()
    )  # seconds since the epoch, by the monotonic clock
    _content: bytes = b""  # the second part as it was last written here
    _facts: dict[str, Any] = field(default_factory=dict)

    def write(self, step: int, loss: float | None) -> None:
        now = self.anchor + time.monotonic()
        line = f"{step:20d} {now:20.6f}\n".encode()
        if loss is None and self._content:
            os.pwrite(self.descriptor, line, 0)
            return
        content = os.pread(self.descriptor, _FILE_BYTES, 0)[_LINE_BYTES:]
        if content != self._content or not content:
            self._facts = {"first_step": round(now, 3), **_facts(content)}
        if loss is not None:
            self._facts["loss"] = _number(float(loss))
        self._content = _encoded(self._facts)
        os.pwrite(self.descriptor, line + self._content, 0)


_files: dict[str, _ProgressFile] = {}


def _anchor() -> float:
    """What to add to the monotonic clock for the time since the epoch as `launch` has it, in seconds."""
    return float(os.environ.get("LAUNCH_CLOCK", time.time() - time.monotonic()))


def _encoded(facts: Mapping[str, Any]) -> bytes:
    """The second part of the file. An object that does not fit is cut off, and then ignored by readers."""
    text = _compact(facts).encode()
    return text.ljust(_FACTS_BYTES - 1)[: _FACTS_BYTES - 1] + b"\n"


def _number(value: float) -> float | str:
    """`value` as JSON, which has no "nan", "inf" and "-inf"."""
    return value if abs(value) < float("inf") else str(value)


def read_progress(path: Path) -> Progress | None:
    """The last report of a worker; None if there is none, or the file has no valid first line."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read(_FILE_BYTES)
        line = data[:_LINE_BYTES]
        if len(line) != _LINE_BYTES or not line.endswith(b"\n"):
            return None
        step, when = line.split()
        facts = _typed(_facts(data[_LINE_BYTES:]))
        return Progress(step=int(step) if int(step) >= 0 else None, time=float(when), **facts)
    except (OSError, ValueError):
        return None


def _facts(text: bytes) -> dict[str, Any]:
    """The JSON object after the first line; empty if there is none."""
    if len(text) != _FACTS_BYTES or not text.endswith(b"\n"):
        return {}
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


_TIERS = ("local", "remote")
_TYPES: Mapping[str, Callable[[Any], Any]] = {
    "loss": float,
    "drains": lambda value: value is True,
    "joined": float,
    "restored": float,
    "restored_step": int,
    "restored_tier": str,
    "first_step": float,
    "phase": str,
    "alive": float,
    "steps": lambda value: value is True,
    "world": int,
    "saved": lambda value: {tier: int(value[tier]) for tier in _TIERS if tier in value},
    "over": float,
}


def _typed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The known keys with valid values; all others, which a later version may write, are left out."""
    found = {}
    for name, kind in _TYPES.items():
        try:
            found[name] = kind(facts[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    return found
