"""How a job is, for people and programs: `launch status`, the live view, metrics. Pure: no clock, no I/O.

Times are seconds since the epoch, since that is what workers on several hosts can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from launcher.events import (
    Event,
    SavedByWorkers,
    SaveFailed,
    SavePersisted,
    SavePersisting,
    SaverEnded,
    SaveStaged,
    SaveSuperseded,
)
from launcher.journal import encodable
from launcher.progress import Progress
from launcher.wording import count, duration, spans

__all__ = ["Paint", "Past", "RankStatus", "Saved", "Saving", "Status", "StatusBoard", "finished_in_words"]

Paint = Callable[[str, int], str]
"""Puts an ANSI style on a text, or leaves it as it is."""

_RATE_SECONDS = 10.0  # over which the rate of steps is measured
_STALE_SECONDS = 5.0  # without a step, and
_LATE = 3  # times what a step takes, after which the next is overdue
_GROUPS = 3  # of ranks at the same step that are told one by one
_SLOWEST = 3  # ranks that are named otherwise
_SPANS = 4  # of ranks, as 0-3, that are told one by one
_STEPS = ("progress", "failure", "drained")  # events that tell how far the job was
_BOLD, _DIM, _ALARM = 1, 2, 31


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank: where it runs, and the last step that it has reported in this round, and when."""

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
    """A checkpoint that is on its way to a tier: `done` of `total` bytes."""

    step: int
    tier: str
    done: int
    total: int


@dataclass(frozen=True)
class Status:
    """How a job was at `time`."""

    run: str
    time: float
    phase: str
    round: int  # 0: none has started
    round_started: float
    world: int = 0  # ranks of the job
    nodes: int = 1
    restarts: int = 0
    step: int | None = None  # that every rank which reports steps has done
    rate: float | None = None  # steps per second, over the last 10 s or so; 0: the next is overdue
    loss: float | None = None
    ranks: tuple[RankStatus, ...] = ()  # those that the agent which is asked can see
    saved: Mapping[str, Saved] = field(default_factory=dict)  # by tier, the nearest first
    saving: tuple[Saving, ...] = ()
    failures: Mapping[str, int] = field(default_factory=dict)  # by kind, since the job was started

    def to_json(self) -> dict[str, Any]:
        """As plain values; `from_json` makes the same of them."""
        plain: dict[str, Any] = encodable(asdict(self))
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
        """A few lines, however many ranks there are: a headline, and then one for each thing to know."""
        rows = {
            "step": self._step_row(),
            "ranks": self._ranks_row(),
            "saved": self._saved_row(),
            "saving": self._saving_row(),
        }
        left = max(map(len, rows)) + 4
        body = [f"{paint(f'  {name}'.ljust(left), _DIM)}{text}" for name, text in rows.items() if text]
        return [paint(self._headline(), _BOLD), *body]

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
        """Whether a step that was reported at `time` should have been followed by another."""
        return self.time - time > _patience(1 / self.rate if self.rate else 0.0)

    def _ranks_row(self) -> str:
        """Who is where, if that tells anything: ranks are seldom at the same step when they are looked at."""
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
        behind = sorted((rank for group in groups.values() for rank in group), key=_by_progress)
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


def finished_in_words(board: StatusBoard, seconds: float, lost: float) -> str:
    """One line about a job that has succeeded: how long it took, how far it got, what is saved, what was lost.

    `lost` is the seconds from failures to the next step.
    """
    durable = {tier: saved.step for tier, saved in board.saved.items() if tier != "memory"}
    parts = ["" if board.step is None else f"step {board.step}"]
    if durable:
        newest = max(durable.values())
        where = " and ".join(tier for tier, step in durable.items() if step == newest)
        parts.append(f"last checkpoint step {newest} ({where})")
    if board.restarts:
        cost = f", {lost:.1f} s lost" if lost else ""
        parts.append(f"{count(board.restarts, 'restart')}{cost}")
    told = "; ".join(filter(None, parts))
    return f"finished in {duration(seconds)}" + (f": {told}" if told else "")


def _by_progress(rank: RankStatus) -> tuple[int, float]:
    return rank.step or 0, rank.time or 0.0


def _rate(rate: float) -> str:
    return f"{rate:.3g} steps/s" if rate >= 0.1 else f"{1 / rate:.3g} s/step"


def _percent(save: Saving) -> str:
    return f"{100 * save.done // save.total if save.total else 0} %"


def _few(ranks: Collection[int]) -> str:
    """`0-3+5`; only how many there are, if that would be long."""
    found = spans(ranks)
    return "+".join(found) if len(found) <= _SPANS else count(len(ranks), "rank")


@dataclass(frozen=True)
class StatusBoard:
    """What is known about a job, as the agent learns it; `status` makes a `Status` of it.

    Every method returns a new board. `now` is in seconds since the epoch.
    """

    run: str
    phase: str = "starting"
    round: int = 0
    round_started: float = 0.0
    restarts: int = 0
    world: int = 0
    nodes: int = 1
    ranks: Mapping[int, RankStatus] = field(default_factory=dict)
    losses: Mapping[int, float] = field(default_factory=dict)  # of the ranks that report them
    track: tuple[tuple[float, int], ...] = ()  # when which step was done, for the rate
    saved: Mapping[str, Saved] = field(default_factory=dict)
    saving: Mapping[tuple[int, str], Saving] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)

    def began_round(
        self,
        number: int,
        hosts: Mapping[int, str],
        *,
        now: float,
        world: int | None = None,
        nodes: int = 1,
        restarts: int = 0,
    ) -> StatusBoard:
        """A round starts on `nodes` nodes with `world` ranks, or else with those in `hosts`.

        `hosts` are the ranks whose progress can be seen from here, each with its host.
        """
        return replace(
            self,
            phase="running",
            round=number,
            round_started=now,
            restarts=restarts,
            world=len(hosts) if world is None else world,
            nodes=nodes,
            ranks={rank: RankStatus(rank, host) for rank, host in hosts.items()},
            losses={},
            track=(),
        )

    def in_phase(self, phase: str) -> StatusBoard:
        """`phase` is a word or two for the user: running, draining, persisting, waiting for nodes."""
        return replace(self, phase=phase)

    def failed(self, kind: str) -> StatusBoard:
        """A round has failed; `kind` is the verdict's."""
        return replace(self, failures={**self.failures, kind: self.failures.get(kind, 0) + 1})

    def sampled(self, progress: Mapping[int, Progress], now: float) -> StatusBoard:
        """What ranks of this round have reported by `now`; others may follow in another call."""
        ranks = {**self.ranks}
        for rank, one in progress.items():
            if one.step is not None and rank in ranks:
                ranks[rank] = replace(ranks[rank], step=one.step, time=one.time)
        losses = {rank: one.loss for rank, one in progress.items() if one.loss is not None}
        after = replace(self, ranks=ranks, losses={**self.losses, **losses})
        last = min(
            (rank for rank in ranks.values() if rank.step is not None), key=_by_progress, default=None
        )
        return (
            after if last is None else replace(after, track=_extended(self.track, *_by_progress(last), now))
        )

    def after(self, event: Event, now: float) -> StatusBoard:
        """The board after what the saver tells; other events leave it as it is."""
        match event:
            case SaveStaged(step=step):
                return self._with_saved("memory", step, now)
            case SavePersisting(step=step, tier=tier, done=done, total=total):
                return replace(self, saving={**self.saving, (step, tier): Saving(step, tier, done, total)})
            case SavePersisted(step=step, tier=tier) | SavedByWorkers(step=step, tier=tier):
                return self._without_saving(step, tier)._with_saved(tier, step, now)
            case SaveFailed(step=step, tier=tier) | SaveSuperseded(step=step, tier=tier):
                return self._without_saving(step, tier)
            case SaverEnded():  # and its memory with it
                others = {tier: saved for tier, saved in self.saved.items() if tier != "memory"}
                return replace(self, saved=others, saving={})
            case _:
                return self

    def _with_saved(self, tier: str, step: int, now: float) -> StatusBoard:
        saved = {**self.saved, tier: Saved(step, now)}
        order = sorted(saved, key=lambda name: ("memory", "local", "remote", name).index(name))
        return replace(self, saved={name: saved[name] for name in order})

    def _without_saving(self, step: int, tier: str) -> StatusBoard:
        others = {key: save for key, save in self.saving.items() if key != (step, tier)}
        return replace(self, saving=others)

    @property
    def step(self) -> int | None:
        """The steps that every rank which reports any has done."""
        return min((rank.step for rank in self.ranks.values() if rank.step is not None), default=None)

    @property
    def newest_saved(self) -> int | None:
        """The step of the newest checkpoint in any tier, as far as the saver has told."""
        return max((saved.step for saved in self.saved.values()), default=None)

    @property
    def is_only_in_memory(self) -> bool:
        """Whether that checkpoint is in no other tier, so that it is as good as the saver that holds it."""
        newest = [tier for tier, saved in self.saved.items() if saved.step == self.newest_saved]
        return newest == ["memory"]

    @property
    def loss(self) -> float | None:
        """As the lowest rank that reports one tells it."""
        return self.losses[min(self.losses)] if self.losses else None

    def status(self, now: float) -> Status:
        return Status(
            run=self.run,
            time=now,
            phase=self.phase,
            round=self.round,
            round_started=self.round_started,
            world=self.world,
            nodes=self.nodes,
            restarts=self.restarts,
            step=self.step,
            rate=_rate_of(self.track, now),
            loss=self.loss,
            ranks=tuple(rank for _, rank in sorted(self.ranks.items())),
            saved=self.saved,
            saving=tuple(self.saving.values()),
            failures=self.failures,
        )


def _extended(
    track: tuple[tuple[float, int], ...], step: int, time: float, now: float
) -> tuple[tuple[float, int], ...]:
    """`track` with one more point, without those that are too old; two are always kept."""
    if track and (step < track[-1][1] or time < track[-1][0]):
        track = ()  # training has gone back
    if track and step == track[-1][1]:
        return track
    recent = [point for point in track if point[0] >= now - _RATE_SECONDS]
    return (*(recent or track[-1:]), (time, step))


def _rate_of(track: tuple[tuple[float, int], ...], now: float) -> float | None:
    """Steps per second, as long as steps come."""
    if len(track) < 2:
        return None
    (start, first), (end, last) = track[0], track[-1]
    if end <= start:
        return None
    rate = (last - first) / (end - start)
    return rate if now - end <= _patience(1 / rate) else 0.0


def _patience(interval: float) -> float:
    """How many seconds without a step are as usual, where one takes `interval`."""
    return max(_STALE_SECONDS, _LATE * interval)


@dataclass(frozen=True)
class Past:
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
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Past | None:
        """None if no job was ever started."""
        past: Past | None = None
        for event in events:
            if event["event"] == "job_started":
                past = cls(event["time"], event["time"])
            elif past is not None:
                past = past._after(event)
        return past

    def _after(self, event: Mapping[str, Any]) -> Past:
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
