"""How the last job in a run directory went, read from its journal. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from launcher.formatting import count, duration, json_values
from launcher.reporting.message import Style
from launcher.reporting.status import Paint, Saved

__all__ = ["PastJob"]

_STEPS = ("progress", "failure", "drained")  # events that say how far the job was


@dataclass(frozen=True)
class PastJob:
    """A job that has ended. Where `Status` has a field of the same name, it has the same type and meaning."""

    started: float  # seconds since the epoch
    ended: float  # the last that is known of it, if it could not record its end
    exit_code: int | None = None  # None: its launch was killed
    reason: str | None = None
    rounds: int = 0
    step: int | None = None
    failures: Mapping[str, int] = field(default_factory=dict)  # rounds that failed, by kind
    last_failure: str | None = None  # its cause
    saved: Mapping[str, Saved] = field(default_factory=dict)  # newest checkpoint, by tier

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> PastJob | None:
        """The last job in a journal's events, the oldest first; None if no job was ever started."""
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
            case "staged":  # a step is saved when it is done, and progress is recorded only now and then
                return replace(after, step=max(self.step or 0, event["step"]))
            case "failure":
                kind = str(event.get("kind", "unknown"))  # journals of older versions have none
                failures = {**self.failures, kind: self.failures.get(kind, 0) + 1}
                return replace(after, failures=failures, last_failure=str(event.get("cause", "unknown")))
            case "persisted":
                saved = Saved(event["step"], event["time"])
                return replace(after, saved={**self.saved, event["tier"]: saved})
            case "job_ended":
                return replace(after, exit_code=event["exit_code"], reason=event.get("reason"))
            case _:
                return after

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        plain: dict[str, Any] = json_values(asdict(self))
        return plain

    def render(self, run: str, now: float, paint: Paint = lambda text, _: text) -> list[str]:
        """A few lines about the job in the run directory `run`; `now` is in seconds since the epoch."""
        return [
            paint(f"{run}: {self._end(now)}", Style.RED if self.exit_code else Style.BOLD),
            *self._rows(paint),
        ]

    def _end(self, now: float) -> str:
        ago = f"{duration(now - self.ended)} ago"
        if self.exit_code is None:
            return f"did not end by itself: its launch was killed, {ago} or less"
        return f"ended {ago} with exit code {self.exit_code}" + (f": {self.reason}" if self.reason else "")

    def _rows(self, paint: Paint) -> list[str]:
        saved = ", ".join(f"{one.step} {tier}" for tier, one in self.saved.items())
        failed = count(sum(self.failures.values()), "time")
        rows = {
            "ran": f"{duration(self.ended - self.started)}, {count(self.rounds, 'round')}",
            "step": "" if self.step is None else str(self.step),
            "saved": "nothing" if self.step is not None and not saved else saved,
            "failed": f"{failed}, last: {self.last_failure}" if self.failures else "",
        }
        left = max(map(len, rows)) + 4
        return [f"{paint(f'  {name}'.ljust(left), Style.DIM)}{text}" for name, text in rows.items() if text]
