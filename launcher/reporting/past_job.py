"""A job that has ended, read from its journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from launcher.formatting import count, duration
from launcher.reporting.journal import encodable
from launcher.reporting.status import Paint

__all__ = ["PastJob"]


_BOLD, _DIM, _ALARM = 1, 2, 31
_STEPS = ("progress", "failure", "drained")  # events that tell how far the job was


@dataclass(frozen=True)
class PastJob:
    """How the last job in a run directory went, as its journal tells."""

    started: float
    ended: float  # the last that is known of it, if it did not get to say how it ended
    exit_code: int | None = None  # None: its launch was killed
    reason: str | None = None
    rounds: int = 0
    step: int | None = None
    failures: tuple[str, ...] = ()  # their causes, the oldest first
    saved: Mapping[str, int] = field(default_factory=dict)  # newest step, by tier

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> PastJob | None:
        """None if no job was ever started."""
        past: PastJob | None = None
        for event in events:
            if event["event"] == "job_started":
                past = cls(event["time"], event["time"])
            elif past is not None:
                past = past._after(event)
        return past

    def _after(self, event: Mapping[str, Any]) -> PastJob:
        after = replace(self, ended=event["time"])
        if event["event"] in _STEPS and event.get("step") is not None:
            after = replace(after, step=event["step"])
        match event["event"]:
            case "round_started":
                return replace(after, rounds=self.rounds + 1)
            case "staged":  # a step is saved when it is done, and progress is told only now and then
                return replace(after, step=max(self.step or 0, event["step"]))
            case "failure":
                return replace(after, failures=(*self.failures, str(event.get("cause", "unknown"))))
            case "persisted":
                return replace(after, saved={**self.saved, event["tier"]: event["step"]})
            case "job_ended":
                return replace(after, exit_code=event["exit_code"], reason=event.get("reason"))
            case _:
                return after

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = encodable(asdict(self))
        return plain

    def render(self, run: str, now: float, paint: Paint = lambda text, _: text) -> list[str]:
        """A few lines; `now` is in seconds since the epoch."""
        ago = f"{duration(now - self.ended)} ago"
        how = (
            f"did not end by itself: its launch was killed, {duration(now - self.ended)} ago or less"
            if self.exit_code is None
            else f"ended {ago} with exit code {self.exit_code}"
            + (f": {self.reason}" if self.reason else "")
        )
        rows = {
            "ran": f"{duration(self.ended - self.started)}, {count(self.rounds, 'round')}",
            "step": "" if self.step is None else str(self.step),
            "saved": ", ".join(f"{step} {tier}" for tier, step in self.saved.items()),
            "failed": f"{count(len(self.failures), 'time')}, last: {self.failures[-1]}"
            if self.failures
            else "",
        }
        left = max(map(len, rows)) + 4
        body = [f"{paint(f'  {name}'.ljust(left), _DIM)}{text}" for name, text in rows.items() if text]
        return [paint(f"{run}: {how}", _ALARM if self.exit_code else _BOLD), *body]
