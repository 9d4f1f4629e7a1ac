"""When to save, and to which tiers: pure rules that all ranks evaluate alike.

A `SavePolicy` is a value. It reads no clock, no environment and no storage, so ranks that ask it the same
question get the same answer without a message between them. What differs between ranks, such as the time or a
loss, has to be agreed first, in a collective that the ranks make in any case, and reaches the policy in its
`SaveContext`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["EverySteps", "SaveContext", "SavePolicy", "SaveSchedule", "check_count"]


@dataclass(frozen=True)
class SaveContext:
    """What a policy may consider beside the steps. Equal on all ranks.

    Attributes:
        outlives_trainer: True if a save that reaches memory only outlives the trainers, in the node's saver.
    """

    outlives_trainer: bool


class SavePolicy(Protocol):
    """Decides at which steps to save. Policies combine by union: a step is saved if any of them says so."""

    def should_save(self, step: int, previous_steps: Sequence[int], *, context: SaveContext) -> bool:
        """Decide about one step.

        Args:
            step: optimizer steps done.
            previous_steps: the steps that this attempt has saved, oldest first. A step that was skipped because
                saves took up all memory is not among them.
            context: what all ranks know alike.
        """


@dataclass(frozen=True)
class EverySteps:
    """Save at each multiple of `steps`, except at step 0."""

    steps: int

    def should_save(self, step: int, previous_steps: Sequence[int], *, context: SaveContext) -> bool:  # noqa: ARG002
        """See SavePolicy."""
        return step % self.steps == 0 and step != 0


@dataclass(frozen=True)
class SaveSchedule:
    """The policies of a Checkpointer: one that starts saves, and one for each durable tier. None: never.

    Attributes:
        saves: when `Checkpointer.step` saves, be it to memory only.
        url: which of these saves go to the run's URL.
        local: which of these saves go to the local tier.
    """

    saves: SavePolicy | None
    url: SavePolicy | None
    local: SavePolicy | None

    @classmethod
    def every_steps(
        cls, every: int | None, *, url: int | None = None, local: int | None = None
    ) -> SaveSchedule:
        """Build the schedule of a Checkpointer's arguments.

        Args:
            every: `every_steps`, the number of steps from one save to the next. None: `step` never saves.
            url: `url_every_steps`, a multiple of `every`. None: all saves go to the URL.
            local: `local_every_steps`, a multiple of `every`. None: all saves go to the local tier.

        Raises ValueError, which names the Checkpointer's argument.
        """
        numbers = {"every_steps": every, "url_every_steps": url, "local_every_steps": local}
        for name, number in numbers.items():
            check_count(name, number)
            if number is not None and (every is None or number % every):
                raise ValueError(
                    f"{name} must be a multiple of every_steps, which is {every!r}; it is {number!r}: these "
                    "saves are some of those"
                )
        if every is None:
            return cls(None, None, None)
        return cls(EverySteps(every), EverySteps(url or every), EverySteps(local or every))


def check_count(name: str, number: int | None) -> None:
    """Raise ValueError, which names the argument, unless `number` is None or a whole number of 1 or more."""
    if number is not None and (not isinstance(number, int) or number < 1):
        raise ValueError(f"{name} must be a whole number of 1 or more, or None; it is {number!r}")
