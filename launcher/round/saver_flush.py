"""The saver's backlog, and the flush at the end of a job: the wait until it is durable. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from signal import Signals
from typing import TypeVar

from launcher.errors import ExitCode
from launcher.events import (
    DeadlinePassed,
    Event,
    SavedByWorkers,
    SaveFailed,
    SavePersisted,
    SavePersisting,
    SaverEnded,
    SaveStaged,
    SaveSuperseded,
    StopRequested,
)
from launcher.formatting import describe_exit, part

__all__ = ["Backlog", "Flush"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Backlog:
    """The saves that one saver process has not made durable, from its events so far."""

    pending: Mapping[tuple[int, str], SavePersisting] = field(default_factory=dict)
    """By step and tier."""
    failed: Mapping[str, SaveFailed] = field(default_factory=dict)
    """By tier: the newest save that failed, unless a newer one has become durable there since."""
    is_overtaken: bool = False
    """True if workers have committed checkpoints without the saver since it last got a snapshot."""

    def after(self, event: Event) -> Backlog:
        """The backlog after `event`."""
        match event:
            case SaveStaged():
                return replace(self, is_overtaken=False)
            case SavedByWorkers(step=step, tier=tier):
                return self._after_workers(step, tier)
            case SavePersisting(step=step, tier=tier):
                return replace(self, pending={**self.pending, (step, tier): event})
            case SavePersisted(step=step, tier=tier) | SaveSuperseded(step=step, tier=tier):
                is_good = tier in self.failed and self.failed[tier].step <= step
                return self._over(step, tier, _without(self.failed, tier) if is_good else self.failed)
            case SaveFailed(step=step, tier=tier):
                is_older = tier in self.failed and self.failed[tier].step > step
                return self._over(step, tier, self.failed if is_older else {**self.failed, tier: event})
            case _:
                return self

    def _over(self, step: int, tier: str, failed: Mapping[str, SaveFailed]) -> Backlog:
        return replace(self, pending=_without(self.pending, (step, tier)), failed=failed)

    def _after_workers(self, step: int, tier: str) -> Backlog:
        """The backlog without what is older in that tier, which is not needed any more."""
        pending = {key: save for key, save in self.pending.items() if key[1] != tier or key[0] > step}
        failed = {name: one for name, one in self.failed.items() if name != tier or one.step > step}
        return replace(self, pending=pending, failed=failed, is_overtaken=True)

    @property
    def is_replaced(self) -> bool:
        """True if workers have committed all that the saver holds, or newer, by themselves."""
        return self.is_overtaken and not (self.pending or self.failed)

    def __str__(self) -> str:
        """`step 120: 1.2 of 2.0 GiB (remote)`, and so on; empty if nothing is known to be pending."""
        return ", ".join(
            f"step {save.step}: {part(save.done, save.total)} ({save.tier})"
            for save in self.pending.values()
        )

    def describe_loss(self, ended: SaverEnded, log: str) -> str:
        """What is lost because the saver has ended unasked, in one line; `log` is the path of its log."""
        lost = f", and of {self} what is missing" if self.pending else ""
        return (
            f"the saver was lost: {describe_exit(ended.code)}; the snapshots in memory are gone{lost}; "
            f"checkpoints that are committed are safe; log: {log}"
        )


def _going_on(pid: int | None, halt: str | None) -> str:
    """What a saver does after launch has stopped waiting for it."""
    if halt is None:
        return f"it goes on in the background (pid {pid}) until that is done"
    if "SIGSTOP" in halt:
        return f"`kill -CONT {pid}` has it go on"
    return "it goes on as soon as the kernel lets it"


def _without(values: Mapping[_Key, _Value], key: _Key) -> dict[_Key, _Value]:
    return {other: value for other, value in values.items() if other != key}


@dataclass(frozen=True)
class Flush:
    """The wait for the saver after the last worker's end, from the events so far."""

    backlog: Backlog
    timeout: float  # seconds; 0: launch does not wait
    limit: str = "--drain-timeout"  # the option that sets the timeout
    waited: float = 0.0  # seconds that workers have waited for a halted saver before
    persisted: tuple[SavePersisted, ...] = ()
    ending: SaverEnded | DeadlinePassed | StopRequested | None = None  # of the wait
    halt: str | None = None  # why the saver cannot go on; None if it can

    def after(self, event: Event) -> Flush:
        """The flush after `event`."""
        match event:
            case SavePersisted():
                persisted = (*self.persisted, event)
                return replace(self, backlog=self.backlog.after(event), persisted=persisted)
            case SaverEnded() | DeadlinePassed() | StopRequested():
                return replace(self, ending=event)
            case _:
                return replace(self, backlog=self.backlog.after(event))

    @property
    def succeeded(self) -> bool:
        """True if all is durable, if launch was not to wait, or if workers have saved all by themselves."""
        match self.ending:
            case SaverEnded(code=code):
                return code == 0
            case DeadlinePassed():
                return self.timeout + self.waited == 0 or self.backlog.is_replaced
            case _:
                return False

    def exit_code(self, of_job: int) -> int:
        """The exit code of `launch` after a job that ended with `of_job`."""
        if of_job != ExitCode.OK or self.succeeded:
            return of_job
        if isinstance(self.ending, StopRequested):
            return 128 + self.ending.signum
        return ExitCode.NOT_PERSISTED

    def render(self, pid: int | None, log: str) -> str:
        """How the wait ended, in one line; empty if there was nothing to make durable.

        Args:
            pid: of the saver, if it still runs.
            log: the path of its log.
        """
        left = f"; not persisted yet: {self.backlog}" if self.backlog.pending else ""
        left += f"; {_going_on(pid, self.halt)}"
        match self.ending:
            case SaverEnded(code=0):
                saves = [
                    f"step {save.step} to {save.url} in {save.seconds:.1f} s" for save in self.persisted
                ]
                return f"persisted {', '.join(saves)}" if saves else ""
            case SaverEnded() if self.ending.code > 0 and self.backlog.failed:
                lost = (
                    f"step {save.step} is not durable in {save.url}: {save.error}"
                    for save in self.backlog.failed.values()
                )
                return f"{'; '.join(lost)}; log: {log}"
            case SaverEnded() if self.ending.code > 0:
                how = describe_exit(self.ending.code)
                return f"not every checkpoint became durable: the saver ended with {how}; log: {log}"
            case SaverEnded():
                return self.backlog.describe_loss(self.ending, log)
            case DeadlinePassed() if self.timeout + self.waited == 0:
                return f"not waiting for the saver, as --drain-timeout 0 says{left}"
            case DeadlinePassed():
                who = "the saver" if self.halt is None else f"the saver (pid {pid}) is {self.halt}, and"
                if self.backlog.is_replaced:
                    left = f"; what it holds is as old as what the ranks have saved by themselves, or older{left}"
                return f"{who} is not done after {self.timeout + self.waited:.3g} s ({self.limit}){left}"
            case StopRequested(signum=signum):
                return f"{Signals(signum).name}: not waiting for the saver any longer{left}"
            case None:
                return ""
