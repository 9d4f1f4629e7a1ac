"""The progress file: how a worker tells how far it is. See docs/worker-contract.md."""

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
    """What a worker has told last. Times are in seconds since the epoch; None where it told nothing.

    `drains` is whether it answers a drain request, so that asking it to leave is worth while.
    """

    step: int | None  # optimizer steps done; None: no step yet
    time: float  # when it said so
    loss: float | None = None
    drains: bool = False
    joined: float | None = None  # its process group was up
    restored: float | None = None  # it had looked for a checkpoint to resume from
    restored_step: int | None = None  # of that checkpoint; None: there was none
    restored_tier: str | None = None  # that it was in: "memory", "local", "remote"
    first_step: float | None = None  # its first report of a step
    phase: str | None = None  # what it was doing besides training, from `alive` on: "restore"
    alive: float | None = None  # its last sign of life besides a step
    steps: bool = False  # it will report steps, even if it has not yet
    world: int = 1  # ranks that have to join as it has
    saved: Mapping[str, int] = field(default_factory=dict)
    """By tier, the step of the newest checkpoint that it has committed itself, without a saver."""
    over: float | None = None  # it had trained all that it was to, so that no more steps come

    @property
    def doing(self) -> str | None:
        """The phase that it is in, unless it has made a step since."""
        is_past = self.alive is None or (self.step is not None and self.alive < self.time)
        return None if is_past else self.phase

    @property
    def is_over(self) -> bool:
        """Whether no more steps are to come."""
        return self.over is not None and self.over >= self.time


def report(step: int, *, loss: float | None = None) -> None:
    """Tell the launcher that `step` optimizer steps are done, and how large the loss was in the last.

    Cheap enough for every step: one system call, or two and a few microseconds with a loss. A loss
    that is a tensor on a device is waited for. Does nothing in a process that `launch` did not start.
    """
    path = os.environ.get("LAUNCH_PROGRESS_FILE")
    if path is None:
        return
    if path not in _files:
        _files[path] = _ProgressFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
    _files[path].write(step, loss)


@dataclass
class _ProgressFile:
    """The open progress file of this process, in which others (`shardckpt`) write too."""

    descriptor: int
    anchor: float = field(
        default_factory=lambda: _anchor()
    )  # seconds since the epoch, by the monotonic clock
    _content: bytes = b""  # as it was last written here, and what it told
    _told: dict[str, Any] = field(default_factory=dict)

    def write(self, step: int, loss: float | None) -> None:
        now = self.anchor + time.monotonic()
        line = f"{step:20d} {now:20.6f}\n".encode()
        if loss is None and self._content:
            os.pwrite(self.descriptor, line, 0)
            return
        content = os.pread(self.descriptor, _FILE_BYTES, 0)[_LINE_BYTES:]
        if content != self._content or not content:
            self._told = {"first_step": round(now, 3), **_facts(content)}
        if loss is not None:
            self._told["loss"] = _number(float(loss))
        self._content = _encoded(self._told)
        os.pwrite(self.descriptor, line + self._content, 0)


_files: dict[str, _ProgressFile] = {}


def _anchor() -> float:
    """What to add to the monotonic clock for the time of day as launch has it, whose steps do not change it."""
    return float(os.environ.get("LAUNCH_CLOCK", time.time() - time.monotonic()))


def _encoded(facts: Mapping[str, Any]) -> bytes:
    """The second part of the file. More than fits in it is cut off, and then not understood."""
    text = _compact(facts).encode()
    return text.ljust(_FACTS_BYTES - 1)[: _FACTS_BYTES - 1] + b"\n"


def _number(value: float) -> float | str:
    """JSON knows no "nan", "inf" and "-inf"."""
    return value if abs(value) < float("inf") else str(value)


def read_progress(path: Path) -> Progress | None:
    """What the worker told last; None if it never did, or wrote garbage."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read(_FILE_BYTES)
        line = data[:_LINE_BYTES]
        if len(line) != _LINE_BYTES or not line.endswith(b"\n"):
            return None
        step, when = line.split()
        told = _typed(_facts(data[_LINE_BYTES:]))
        return Progress(step=int(step) if int(step) >= 0 else None, time=float(when), **told)
    except (OSError, ValueError):
        return None


def _facts(text: bytes) -> dict[str, Any]:
    """The JSON object behind the first line; empty if there is none."""
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
    """What is known of it; what a later version tells besides, or garbage, is left out."""
    found = {}
    for name, kind in _TYPES.items():
        try:
            found[name] = kind(facts[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    return found
