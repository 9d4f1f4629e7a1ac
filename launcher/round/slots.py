"""Which of a node's devices get workers: as many as wanted, without devices that keep failing. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Slots"]

_STRIKES = 2  # failed starts in a row after which a slot is left out


@dataclass(frozen=True)
class Slots:
    """The slots for workers on one node, numbered like its devices.

    A slot is left out if its worker is the first to fail, twice in a row and before any step, and if fewer
    workers than `wanted` are allowed. A user may give up other slots.
    """

    present: int  # number of devices; without devices, the most workers that were ever wanted
    wanted: int
    minimum: int
    left_out: tuple[int, ...] = ()
    given_up: tuple[int, ...] = ()
    suspect: int | None = None  # the slot whose worker failed first last time
    strikes: int = 0  # of the suspect

    @property
    def working(self) -> tuple[int, ...]:
        """The slots that can get workers."""
        return tuple(slot for slot in range(self.present) if slot not in self.left_out + self.given_up)

    @property
    def chosen(self) -> tuple[int, ...]:
        """The slots that get workers; none if too few work."""
        chosen = self.working[: self.wanted]
        return chosen if len(chosen) >= min(self.minimum, self.wanted) else ()

    def after_progress(self) -> Slots:
        """The slots after a round in which workers have made steps."""
        return replace(self, suspect=None, strikes=0)

    def after_failed_start(self, slot: int) -> Slots:
        """The slots after a round that ended before any step because the worker in `slot` failed first."""
        strikes = self.strikes + 1 if slot == self.suspect else 1
        if strikes < _STRIKES or self.minimum >= self.wanted:
            return replace(self, suspect=slot, strikes=strikes)
        return replace(self, left_out=tuple(sorted({*self.left_out, slot})), suspect=None, strikes=0)

    def scaled(self, wanted: int, given_up: tuple[int, ...] = ()) -> Slots:
        """Slots for another number of workers, none of them in `given_up`; slots left out are tried again."""
        present = max(self.present, wanted + len(given_up))
        return Slots(present, wanted, min(self.minimum, wanted), given_up=given_up)
