"""Which of a node's devices have workers: as many as are wanted, without those that keep failing. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Slots"]

_STRIKES = 2


@dataclass(frozen=True)
class Slots:
    """The places for workers on one node, numbered as its devices are.

    One whose worker is the first to fail, twice in a row and before it has made a step, is left out, if
    fewer workers than `wanted` are allowed. A user may give up others.
    """

    present: int  # devices, or as many as were ever wanted where workers have none
    wanted: int
    minimum: int
    left_out: tuple[int, ...] = ()
    given_up: tuple[int, ...] = ()
    suspect: int | None = None
    strikes: int = 0  # of the suspect

    @property
    def working(self) -> tuple[int, ...]:
        """Those that could get workers."""
        return tuple(slot for slot in range(self.present) if slot not in self.left_out + self.given_up)

    @property
    def chosen(self) -> tuple[int, ...]:
        """Those that get workers; none if there are too few."""
        chosen = self.working[: self.wanted]
        return chosen if len(chosen) >= min(self.minimum, self.wanted) else ()

    def after_progress(self) -> Slots:
        """After a round in which workers have made steps."""
        return replace(self, suspect=None, strikes=0)

    def after_failed_start(self, slot: int) -> Slots:
        """After a round that ended before any step, because the worker in `slot` failed first."""
        strikes = self.strikes + 1 if slot == self.suspect else 1
        if strikes < _STRIKES or self.minimum >= self.wanted:
            return replace(self, suspect=slot, strikes=strikes)
        return replace(self, left_out=tuple(sorted({*self.left_out, slot})), suspect=None, strikes=0)

    def scaled(self, wanted: int, given_up: tuple[int, ...] = ()) -> Slots:
        """With another number of workers, in none of the slots `given_up`; what was left out is tried again."""
        present = max(self.present, wanted + len(given_up))
        return Slots(present, wanted, min(self.minimum, wanted), given_up=given_up)
