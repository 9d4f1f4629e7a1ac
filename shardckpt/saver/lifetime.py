"""When a saver ends. Pure: the time is passed in."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Lifetime"]

_GRACE = 5.0  # seconds for trainers to leave once the saver is to flush
_FIRST = 30.0  # seconds for the first trainer to come


@dataclass
class Lifetime:
    """Decides whether the saver goes on serving.

    Attributes:
        has_launcher: True if a launcher says when to flush. Otherwise the saver ends `linger` seconds after the
            last trainer.
        linger: seconds to wait for a restarted job.
        empty_since: since when there has been no trainer.
        may_linger: False once the last trainer has said goodbye.
        flush_by: when a flush no longer waits for trainers; None before it is asked for.
        has_flushed: True once the flush has begun.
    """

    has_launcher: bool
    linger: float
    empty_since: float
    may_linger: bool = True
    flush_by: float | None = None
    has_flushed: bool = False

    @classmethod
    def begin(cls, now: float, linger: float, *, has_launcher: bool) -> Lifetime:
        """The lifetime of a saver to which no trainer has come yet."""
        return cls(has_launcher, linger, now + max(0.0, _FIRST - linger))

    def flush(self, now: float) -> None:
        """No trainer will come any more: the saver ends once all is durable."""
        if self.flush_by is None:
            self.flush_by = now + _GRACE

    def emptied(self, now: float, *, may_linger: bool) -> None:
        """The last trainer has gone."""
        self.empty_since, self.may_linger = now, may_linger

    def is_flush_due(self, now: float, *, has_trainers: bool) -> bool:
        """True if the flush is to begin now: what the trainers have sent is taken in, or they take too long."""
        if self.flush_by is None or self.has_flushed:
            return False
        return not has_trainers or now >= self.flush_by

    def is_over(self, now: float, *, is_busy: bool, has_trainers: bool) -> bool:
        """True if the saver is to end; not while other threads are busy with its work."""
        if is_busy:
            return False
        if self.flush_by is not None:
            return self.has_flushed
        if has_trainers or self.has_launcher:
            return False
        return not self.may_linger or now >= self.empty_since + self.linger

    def patience(self, now: float, *, is_busy: bool, has_trainers: bool) -> float | None:
        """Seconds until this decides otherwise if nothing happens; None: never."""
        if self.flush_by is not None and not self.has_flushed:
            return max(0.0, self.flush_by - now)
        if is_busy or self.has_launcher or has_trainers:
            return None
        return max(0.0, self.empty_since + self.linger - now)
