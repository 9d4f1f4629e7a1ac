"""Deaths of workers, and what a node reports to the others after a round: plain values that pass through JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Death", "NodeReport"]


@dataclass(frozen=True)
class Death:
    """One worker that failed, and what it left behind."""

    rank: int
    host: str
    pid: int
    code: int  # its exit code, or minus the signal that killed it
    at: float  # seconds since the epoch, by its host's clock: hosts compare as far as their clocks agree
    step: int | None = None  # the last that it reported
    error: str | None = None  # the exception in one line
    lines: tuple[str, ...] = ()  # its traceback, or else its last lines
    has_traceback: bool = False
    kill: str | None = None  # who sent the SIGKILL, where that is known: the kernel, out of memory
    log: str | None = None  # the file with its stderr
    is_ours: bool = False  # launch had sent it a signal to end it
    has_joined: bool = False  # it had reported that its process group was up, or more

    @property
    def failure_code(self) -> int:
        """Its exit code, or minus the signal, had launch not signalled it while it ended because of an error."""
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
    """What one node reports of a round, once no process of the round is left there."""

    node: int
    host: str
    round: int
    at: float  # seconds since the epoch: when its first worker failed, or else when its last ended
    seconds: float = 0.0  # from the start of its workers until then, by the monotonic clock
    has_finished: bool = False  # every worker returned 0
    has_drained: bool = False  # every worker returned 0, or saved and left as it was asked to
    deaths: tuple[Death, ...] = ()  # in order of death
    ended: tuple[tuple[int, int, float], ...] = ()  # without failing: rank, code, seconds since the epoch
    trouble: str | None = None  # what went wrong besides the workers' failures, in one line
    is_stuck: bool = False  # processes are left that nothing can end: no more rounds on this node
    step: int | None = None  # the highest that one of its workers reported
    hang: tuple[str, ...] = ()  # what the stacks of workers that hung say, a line each

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
