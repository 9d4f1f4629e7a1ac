"""What the nodes of a job tell each other of a round that is over: plain values that pass through JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Death", "NodeReport"]


@dataclass(frozen=True)
class Death:
    """One worker that failed, and what it left behind.

    `at` is in seconds since the epoch by the clock of its host: deaths on several hosts are in order as
    far as their clocks agree.
    """

    rank: int
    host: str
    pid: int
    code: int  # its exit code, or minus the signal that killed it
    at: float
    step: int | None = None  # that it reported last
    error: str | None = None  # the exception in one line
    lines: tuple[str, ...] = ()  # its traceback, or else its last lines
    has_traceback: bool = False
    kill: str | None = None  # who sent the SIGKILL, where that is known: the kernel, out of memory
    log: str | None = None  # the file with its stderr
    is_ours: bool = False  # launch had told it to end by then
    has_joined: bool = False  # it had told that its process group was up, or more

    @property
    def failure_code(self) -> int:
        """What it would have ended with by itself: a signal of launch's may have met it on its way out."""
        if not (self.is_ours and self.code < 0 and self.has_traceback):
            return self.code
        name, _, argument = (self.error or "").partition(": ")
        if name == "KeyboardInterrupt":
            return self.code
        is_number = name == "SystemExit" and argument.isascii() and argument.isdigit()
        return int(argument) % 256 if is_number else 1

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Death:
        return cls(**{**value, "lines": tuple(value["lines"])})


@dataclass(frozen=True)
class NodeReport:
    """What one node says of round `round`, once no process of it is left there."""

    node: int
    host: str
    round: int
    at: float  # seconds since the epoch: when the first of its workers failed, or else the last ended
    seconds: float = 0.0  # from the start of its workers until then, whatever becomes of the clock
    has_finished: bool = False  # every worker of it returned 0
    has_drained: bool = False  # every worker of it returned 0 or saved and left, as it was asked to
    deaths: tuple[Death, ...] = ()  # in order of death
    ended: tuple[tuple[int, int, float], ...] = ()  # without failing: rank, code, seconds since the epoch
    trouble: str | None = None  # what went wrong that is not a worker's own failure, in one line
    is_stuck: bool = False  # processes are left that nothing can end: no more rounds on this node
    step: int | None = None  # the highest that one of its workers reported
    hang: tuple[str, ...] = ()  # a hang that was diagnosed: what the stacks say, a line each

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> NodeReport:
        plain = cls(**{**value, "deaths": ()})
        return replace(
            plain,
            deaths=tuple(Death.from_json(death) for death in value["deaths"]),
            ended=tuple((rank, code, at) for rank, code, at in value["ended"]),
            hang=tuple(value["hang"]),
        )
