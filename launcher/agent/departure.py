"""How this node leaves a job that is to be resumed later: for which signal, and by when. Pure."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace

from launcher.events import StopRequested
from launcher.round.round import Round

__all__ = ["Departure"]

# Shares of the grace period: to reach a step boundary; to end once that was missed.
_DRAIN_SHARE, _STOP_SHARE = 0.7, 0.1


@dataclass(frozen=True)
class Departure:
    """The signals of a scheduler or of `launch stop` so far, and the time they leave.

    Times are monotonic seconds.
    """

    grace: float
    """Seconds from the signal to the end of the job (--grace)."""
    leave_by: float | None = None
    """When this node must have left; None: nothing has told it to."""
    signal: StopRequested | None = None
    """The last signal that told it to leave."""
    postponed: StopRequested | None = None
    """A notice that came before any worker could save. The node leaves as soon as one can."""

    def after(self, event: StopRequested, now: float) -> Departure:
        """The departure after a signal to save and leave. A later signal never extends the deadline."""
        leave_by = now + self.grace
        if self.leave_by is not None:
            leave_by = min(leave_by, self.leave_by)
        return Departure(self.grace, leave_by, event)

    def postpone(self, event: StopRequested) -> Departure:
        """Keep a notice until a worker can save."""
        return replace(self, postponed=event)

    @property
    def is_leaving(self) -> bool:
        """True if this node was told to leave, and the job can be resumed."""
        return self.leave_by is not None

    def is_second_signal(self, round_: Round, event: StopRequested | None = None) -> bool:
        """True if `event` (None: `launch stop`) follows a signal that has been answered already.

        A scheduler sends SIGTERM some time after a notice by SIGUSR1: that pair counts as one.
        """
        has_notice = self.signal is not None and self.signal.signum == signal.SIGUSR1
        completes_notice = (
            has_notice and event is not None and event.signum == signal.SIGTERM and not event.is_asked
        )
        return round_.stop_signal is not None or (self.is_leaving and not completes_notice)

    def seconds_left(self, now: float) -> float:
        """Seconds until this node must have left; call only while it leaves."""
        assert self.leave_by is not None
        return max(0.0, self.leave_by - now)

    def drain_seconds(self, now: float) -> float:
        """Seconds in which the workers must have saved; what is left then is for stopping them."""
        assert self.leave_by is not None
        return self.leave_by - now - (1 - _DRAIN_SHARE) * self.grace

    def stop_seconds(self, now: float, *, are_draining: bool) -> float:
        """Seconds from SIGTERM to SIGKILL. Workers that were not asked to drain may save in a handler."""
        if not self.is_leaving:
            return self.grace
        return self.grace * _STOP_SHARE if are_draining else self.seconds_left(now)
