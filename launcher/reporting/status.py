"""The status of a job, for `launch status`, the live view and metrics. Pure: no clock, no I/O.

Times are in seconds since the epoch, which workers on several hosts share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.formatting import count, duration, json_values, spans
from launcher.reporting.message import Style

__all__ = ["Paint", "RankStatus", "Saved", "Saving", "Status", "by_progress", "patience"]

Paint = Callable[[str, int], str]
"""Puts an ANSI style on a text, or leaves it as it is."""

_STALE_SECONDS = 5.0  # without a step, and
_LATE = 3  # steps' time, after which the next step is overdue
_GROUPS = 3  # most groups of ranks at the same step that are shown
_SLOWEST = 3  # ranks that are shown where there are more groups
_SPANS = 4  # most spans of ranks, such as 0-3, that are shown


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank: where it runs, the last step that it has reported in this round, and when."""

    rank: int
    host: str
    step: int | None = None
    time: float | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """The newest checkpoint in a tier, and when it was complete there."""

    step: int
    time: float


@dataclass(frozen=True, slots=True)
class Saving:
    """A checkpoint that is written to a tier: `done` of `total` bytes are."""

    step: int
    tier: str
    done: int
    total: int


@dataclass(frozen=True)
class Status:
    """The status of a job at `time`."""

    run: str
    time: float
    phase: str
    round: int  # its number; 0: none has started
    round_started: float
    world: int = 0  # ranks of the job
    nodes: int = 1
    restarts: int = 0
    step: int | None = None  # the last that all ranks which report steps have done
    rate: float | None = None  # steps per second, over the last 10 s or so; 0: the next is overdue
    loss: float | None = None
    ranks: tuple[RankStatus, ...] = ()  # of the node whose agent was asked
    saved: Mapping[str, Saved] = field(default_factory=dict)  # newest checkpoint by tier, the nearest first
    saving: tuple[Saving, ...] = ()
    failures: Mapping[str, int] = field(default_factory=dict)  # rounds that failed, by kind

    def to_json(self) -> dict[str, Any]:
        """As plain values, from which `from_json` makes an equal status."""
        plain: dict[str, Any] = json_values(asdict(self))
        return plain

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Status:
        numbers = {key: None if value[key] is None else float(value[key]) for key in ("rate", "loss")}
        return cls(
            **{
                **value,
                **numbers,
                "ranks": tuple(RankStatus(**rank) for rank in value["ranks"]),
                "saved": {tier: Saved(**saved) for tier, saved in value["saved"].items()},
                "saving": tuple(Saving(**saving) for saving in value["saving"]),
            }
        )

    def render(self, paint: Paint = lambda text, _: text) -> list[str]:
        """A headline and at most four rows, however many ranks there are."""
        rows = {
            "step": self._step_row(),
            "ranks": self._ranks_row(),
            "saved": self._saved_row(),
            "saving": self._saving_row(),
        }
        left = max(map(len, rows)) + 4
        body = [f"{paint(f'  {name}'.ljust(left), Style.DIM)}{text}" for name, text in rows.items() if text]
        return [paint(self._headline(), Style.BOLD), *body]

    def _headline(self) -> str:
        parts = [
            f"{self.run}: {self.phase}",
            f"round {self.round} for {duration(self.time - self.round_started)}" if self.round else "",
            (count(self.world, "rank") if self.world else "")
            + (f" on {self.nodes} nodes" if self.nodes > 1 else ""),
            count(self.restarts, "restart") if self.restarts else "",
        ]
        return ", ".join(filter(None, parts))

    def _step_row(self) -> str:
        if self.step is None:
            return "none reported"
        last = max(rank.time or 0.0 for rank in self.ranks)
        parts = [
            f"{self.step}",
            f"no step for {duration(self.time - last)}" if self._is_stale(last) else "",
            _rate(self.rate) if self.rate else "",
            "" if self.loss is None else f"loss {self.loss:.4g}",
        ]
        return ", ".join(filter(None, parts))

    def _is_stale(self, time: float) -> bool:
        """True if the step after one that was reported at `time` is overdue."""
        return self.time - time > patience(1 / self.rate if self.rate else 0.0)

    def _ranks_row(self) -> str:
        """Which ranks are at which step; empty if they are as close together as usual."""
        silent = [rank.rank for rank in self.ranks if rank.step is None]
        groups: dict[int, list[RankStatus]] = {}
        for rank in self.ranks:
            if rank.step is not None:
                groups.setdefault(rank.step, []).append(rank)
        are_together = max(groups, default=0) - min(groups, default=0) <= 1
        is_held = any(self._is_stale(rank.time or 0.0) for rank in groups.get(self.step or 0, ()))
        if not groups or (are_together and not silent and not (is_held and len(groups) > 1)):
            return ""
        parts = [f"{_few(silent)} report none"] if silent else []
        if len(groups) <= _GROUPS:
            told = [self._group(step, groups[step]) for step in sorted(groups, reverse=True)]
            return ", ".join([*told, *parts])
        behind = sorted((rank for group in groups.values() for rank in group), key=by_progress)
        slowest = ", ".join(self._group(rank.step or 0, [rank]) for rank in behind[:_SLOWEST])
        return ", ".join([f"at {min(groups)} to {max(groups)}, slowest {slowest}", *parts])

    def _group(self, step: int, ranks: Collection[RankStatus]) -> str:
        last = max(rank.time or 0.0 for rank in ranks)
        since = f" for {duration(self.time - last)}" if self._is_stale(last) else ""
        return f"{_few([rank.rank for rank in ranks])} at {step}{since}"

    def _saved_row(self) -> str:
        return ", ".join(
            f"{saved.step} {'in memory' if tier == 'memory' else tier} ({duration(self.time - saved.time)} ago)"
            for tier, saved in self.saved.items()
        )

    def _saving_row(self) -> str:
        return ", ".join(f"{save.step} {save.tier} {_percent(save)}" for save in self.saving)


def by_progress(rank: RankStatus) -> tuple[int, float]:
    return rank.step or 0, rank.time or 0.0


def _rate(rate: float) -> str:
    return f"{rate:.3g} steps/s" if rate >= 0.1 else f"{1 / rate:.3g} s/step"


def _percent(save: Saving) -> str:
    return f"{100 * save.done // save.total if save.total else 0} %"


def _few(ranks: Collection[int]) -> str:
    """`0-3+5`; the number of ranks if that would be long."""
    found = spans(ranks)
    return "+".join(found) if len(found) <= _SPANS else count(len(ranks), "rank")


def patience(interval: float) -> float:
    """Seconds without a step after which one is overdue, where a step takes `interval` seconds."""
    return max(_STALE_SECONDS, _LATE * interval)
