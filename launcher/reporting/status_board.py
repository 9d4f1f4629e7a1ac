"""What the agent knows about its job: every event makes a new board. Pure."""

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
            (rank for rank in ranks.values() if rank.step is not None), key=by_progress, default=None
        )
        return (
            after if last is None else replace(after, track=_extended(self.track, *by_progress(last), now))
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
    return rate if now - end <= patience(1 / rate) else 0.0
