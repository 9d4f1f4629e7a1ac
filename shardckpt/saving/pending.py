"""The saves that are under way, those that failed, and those that are skipped until memory is free again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice

from shardckpt.environment import is_first_on_node
from shardckpt.ranks.calls import Call, meet
from shardckpt.ranks.world import Ranks
from shardckpt.saving.handle import SaveHandle

__all__ = ["Failures", "PendingSaves"]

_log = logging.getLogger("shardckpt")

_NAMED = 4  # steps in a message
_SETTLED_AT_ONCE = 4  # saves whose outcome fits into the payload of one `meet`


class Failures:
    """The saves that failed since they were last raised.

    Attributes:
        first: the first of them.
        standing: those that no later save has made good by becoming durable in the same tiers; of several saves
            to the same tiers, the first.
    """

    def __init__(self) -> None:
        self.first: SaveHandle | None = None
        self.standing: list[SaveHandle] = []

    def note(self, save: SaveHandle, *, failed: bool) -> None:
        """Record the outcome of a save that is later than those recorded before."""
        if not failed:
            self.standing = [other for other in self.standing if not set(other.tiers) <= set(save.tiers)]
            return
        self.first = self.first or save
        if all(other.tiers != save.tiers for other in self.standing):
            self.standing.append(save)


class PendingSaves:
    """The saves that may be under way, the same ones in the same order on every rank."""

    def __init__(self) -> None:
        self._saves: list[SaveHandle] = []
        self._failures = Failures()
        self._is_skipping = False

    @property
    def is_empty(self) -> bool:
        """True if no save is under way as far as all ranks know."""
        return not self._saves

    def add(self, save: SaveHandle) -> None:
        """Add a save that has just been started."""
        self._saves.append(save)
        self._is_skipping = False

    def settle(self, ranks: Ranks, call: Call, step: int, *, is_ready: bool) -> bool:
        """Agree on the outcome of the saves that no rank is at work on any more. Collective.

        Args:
            ranks: the world.
            call: what the script calls, and all ranks have to.
            step: the argument of that call.
            is_ready: True if this rank could stage another save now.

        Returns True if all ranks could stage another save now. Raises RankMismatchError if ranks make different
        calls.
        """
        payload: list[int] = [not is_ready]
        asked, left = self._saves[:_SETTLED_AT_ONCE], self._saves[_SETTLED_AT_ONCE:]
        for save in asked:
            payload += [save.busy, *save.failures]
        outcomes = iter(meet(ranks, call, step, payload))
        is_any_waiting = next(outcomes)
        for save in asked:
            busy, *failures = (bool(outcome) for outcome in islice(outcomes, 1 + len(save.tiers)))
            if busy:
                left.append(save)
                continue
            save.settle(failures)
            self._failures.note(save, failed=any(failures))
        self._saves = left
        return not is_any_waiting

    def skip(self, step: int, *, logs: bool) -> None:
        """Note that there is no memory to save `step` in. Of several in a row, the first is logged."""
        if logs and not self._is_skipping:
            _log.warning(
                "no checkpoint at step %d: %s still being written; others are left out until there is memory "
                "again, but the last step of all is saved at the end",
                step,
                _are([save.step for save in self._saves]),
            )
        self._is_skipping = True

    def finish(self) -> None:
        """Wait for all saves under way. Raises nothing."""
        saves, self._saves = sorted(self._saves, key=lambda save: save.step), []
        for handle in saves:
            handle.join()
        for handle in saves:
            self._failures.note(handle, failed=handle.outcome() is not None)

    def raise_first(self) -> None:
        """Raise the SaveError of the first save that failed since the last call, if any did."""
        first = self._failures.first
        self.forget_failures()
        if first is not None:
            first.wait()

    def raise_standing(self, *, is_launchers: bool) -> None:
        """Raise the SaveError of a save that failed and that no later one has made good, if there is one.

        Args:
            is_launchers: True if `launch` waits for the saver and reports what becomes of the saves in its
                memory: those are logged and not raised.
        """
        standing = self._failures.standing
        for handle in standing:
            if not (is_launchers and handle.is_saver_answerable):
                handle.wait()
        if standing and is_first_on_node():
            _log.error(
                "training is over, and not all that it saved is durable; launch tells what becomes of it"
            )

    def forget_failures(self) -> None:
        """Drop the failures: they are raised or logged."""
        self._failures = Failures()


def _are(steps: Sequence[int]) -> str:
    """`step 4 is`, `steps 4 and 8 are`; of many, the newest."""
    steps = sorted(steps)
    if len(steps) > _NAMED:
        return f"steps {', '.join(map(str, steps[-_NAMED:]))} and {len(steps) - _NAMED} before them are"
    *others, last = map(str, steps)
    return f"steps {', '.join(others)} and {last} are" if others else f"step {last} is"
