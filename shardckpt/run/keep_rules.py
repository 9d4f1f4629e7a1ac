"""Which checkpoints of a run to keep. Pure: rules look at values, and `retention` alone acts on them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["KeepNewest", "KeepRule", "StoredCheckpoint", "kept"]


@dataclass(frozen=True)
class StoredCheckpoint:
    """A committed checkpoint of a run, as far as listing tells.

    Attributes:
        path: below its run.
        attempt: number of its attempt.
        step: optimizer steps done.
        is_good: False if a reader has marked it as failing verification.
    """

    path: str
    attempt: int
    step: int
    is_good: bool


class KeepRule(Protocol):
    """Names the checkpoints that it wants kept. What no rule of a run names is deleted."""

    def keep(self, checkpoints: Sequence[StoredCheckpoint], /) -> Collection[str]:
        """The paths of those to keep, of `checkpoints`: all of a run, the newest first."""


@dataclass(frozen=True)
class KeepNewest:
    """Keep the newest good checkpoints, and the bad ones between them, which somebody may want to look at.

    Attributes:
        count: how many good ones; 1 or more.
    """

    count: int

    def keep(self, checkpoints: Sequence[StoredCheckpoint], /) -> Collection[str]:
        """See KeepRule."""
        found: list[str] = []
        good = 0
        for checkpoint in checkpoints:
            if good == self.count:
                break
            found.append(checkpoint.path)
            good += checkpoint.is_good
        return found


def kept(rules: Iterable[KeepRule], checkpoints: Sequence[StoredCheckpoint]) -> set[str]:
    """The paths that at least one rule keeps, of a run's `checkpoints`, the newest first."""
    return {path for rule in rules for path in rule.keep(checkpoints)}
