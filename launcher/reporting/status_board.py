"""What the agent knows about its job, as a value: every event makes a new board. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
from launcher.progress import Progress
from launcher.reporting.status import RankStatus, Saved, Saving, Status, by_progress, patience

__all__ = ["StatusBoard"]


_RATE_SECONDS = 10.0  # over which the rate of steps is measured


@dataclass(frozen=True)
class StatusBoard:
    """What is known about a job; `status` makes a `Status` of it.

    Every other method returns a new board. `now` is in seconds since the epoch.
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
        """A round starts.

        Args:
            number: of the round.
            hosts: the host of each rank whose progress this agent reads.
            now: when it starts.
            world: number of ranks on all nodes; None: those in `hosts`.
            nodes: number of nodes.
            restarts: of the job so far.
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
        """The job does something else: `phase` is a word or two for the user, such as "running"."""
        return replace(self, phase=phase)

    def failed(self, kind: str) -> StatusBoard:
        """A round has failed; `kind` is the verdict's."""
        return replace(self, failures={**self.failures, kind: self.failures.get(kind, 0) + 1})

    def sampled(self, progress: Mapping[int, Progress], now: float) -> StatusBoard:
        """Some ranks of this round have reported their progress by `now`."""
        ranks = {**self.ranks}
        for rank, one in progress.items():
            if one.step is not None and rank in ranks:
                ranks[rank] = replace(ranks[rank], step=one.step, time=one.time)
        losses = {rank: one.loss for rank, one in progress.items() if one.loss is not None}
        after = replace(self, ranks=ranks, losses={**self.losses, **losses})
        last = min(
            (rank for rank in ranks.values() if rank.step is not None), key=by_progress, default=None
        )
        return (
            after if last is None else replace(after, track=_extended(self.track, *by_progress(last), now))
        )

    def after(self, event: Event, now: float) -> StatusBoard:
        """The board after an event of a save; other events leave it as it is."""
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
        """The last step that all ranks which report steps have done; None without any."""
        return min((rank.step for rank in self.ranks.values() if rank.step is not None), default=None)

    @property
    def newest_saved(self) -> int | None:
        """The step of the newest checkpoint in any tier, as far as the saver has reported."""
        return max((saved.step for saved in self.saved.values()), default=None)

    @property
    def is_only_in_memory(self) -> bool:
        """True if that checkpoint is in memory alone, so that it is lost with the saver."""
        newest = [tier for tier, saved in self.saved.items() if saved.step == self.newest_saved]
        return newest == ["memory"]

    @property
    def loss(self) -> float | None:
        """The loss that the lowest rank has reported; None if none has."""
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
    """`track` with one more point, without points that are too old; two are always kept."""
    if track and (step < track[-1][1] or time < track[-1][0]):
        track = ()  # training has gone back
    if track and step == track[-1][1]:
        return track
    recent = [point for point in track if point[0] >= now - _RATE_SECONDS]
    return (*(recent or track[-1:]), (time, step))


def _rate_of(track: tuple[tuple[float, int], ...], now: float) -> float | None:
    """Steps per second; 0 if the next step is overdue, None without two steps."""
    if len(track) < 2:
        return None
    (start, first), (end, last) = track[0], track[-1]
    if end <= start:
        return None
    rate = (last - first) / (end - start)
    return rate if now - end <= patience(1 / rate) else 0.0
