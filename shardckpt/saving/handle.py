"""A save under way, as the trainer sees it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardckpt.errors import SaveError, SaverError, SaverSilentError, public_api
from shardckpt.progress import alive, doing
from shardckpt.run.commit_wait import Patience, wait_committed
from shardckpt.run.places import Place
from shardckpt.run.tiers import MEMORY, Destination
from shardckpt.saving.failure_log import FailureLog

__all__ = ["SaveHandle"]

_BEAT = 1.0  # seconds between two signs of life to the launcher


@dataclass
class _State:
    """What this process knows of a save in one tier."""

    is_over: bool = False
    is_committed: bool = False
    error: BaseException | None = None


class SaveHandle:
    """A save under way, which `save` and `save_async` return. Training may go on; `wait` waits for it.

    Safe to drop: the save goes on, and a failure is logged.

    Attributes:
        step: optimizer steps done.
        tiers: what the save goes to: "memory", then "local" and "remote" as far as they are due.

    >>> import shardckpt, torch
    >>> handle = shardckpt.save_async("memory://example/handle", {"weight": torch.ones(3)}, step=7)
    >>> handle.wait()
    >>> handle
    SaveHandle('memory://example/handle', step=7, committed)
    """

    def __init__(
        self,
        save_id: str,
        step: int,
        destinations: Sequence[Destination],
        commit_timeout: float,
        failure_log: FailureLog,
    ) -> None:
        self.step = step
        self.tiers = (MEMORY, *(destination.tier.name for destination in destinations))
        self._id = save_id
        self._places = {destination.tier.name: destination.place for destination in destinations}
        self._timeout = commit_timeout
        self._failure_log = failure_log
        self._states = {tier: _State() for tier in self.tiers}
        self._changed = threading.Condition()
        self._is_submitted = False

    def __repr__(self) -> str:
        state = "failed" if self.failed else "under way" if self.busy else "committed"
        return f"SaveHandle({self.url!r}, step={self.step}, {state})"

    @property
    def url(self) -> str:
        """Where the save becomes a checkpoint, in the last of its tiers; "memory" if it goes to no other.

        Until it is durable, the attempt's name in it may change, if the attempt began without the storage.
        """
        with self._changed:
            last = list(self._places.values())[-1:]
        return last[0].url if last else MEMORY

    def moved(self, tier: str, place: Place) -> None:
        """Take in where the save lies in a tier, now that this is known."""
        with self._changed:
            self._places[tier] = place

    @property
    def busy(self) -> bool:
        """True while this node is at work on it."""
        with self._changed:
            return not all(state.is_over for state in self._states.values())

    @property
    def failed(self) -> bool:
        """True if this process knows that the save has failed in some tier; `wait` raises why."""
        return any(self.failures)

    @property
    def failures(self) -> tuple[bool, ...]:
        """For each of `tiers`: True if this process knows that the save has failed there."""
        with self._changed:
            return tuple(state.error is not None for state in self._states.values())

    def lacks(self, tier: str) -> bool:
        """Return True if the save does not go to this tier, or is known to have failed there."""
        with self._changed:
            state = self._states.get(tier)
            return state is None or state.error is not None

    def note(self, tier: str, error: BaseException | None = None, *, committed: bool = False) -> None:
        """Record what became of this rank's part in a tier. The first record counts.

        Args:
            tier: one of `tiers`.
            error: why it failed; None: it is durable.
            committed: True if the checkpoint is committed, and not only this rank's part is durable.
        """
        state = self._states[tier]
        if state.is_over:
            return
        if error is not None and not self._is_left_to_saver(error):
            self._failure_log.tell(self.step, tier, error)
        with self._changed:
            state.is_over, state.error, state.is_committed = True, error, committed or tier == MEMORY
            self._changed.notify_all()

    @property
    def is_saver_answerable(self) -> bool:
        """True if a saver reports all that has failed, now or when it goes on."""
        with self._changed:
            errors = [state.error for state in self._states.values() if state.error is not None]
        return not any(
            isinstance(error, SaverError | MemoryError) and not self._is_left_to_saver(error)
            for error in errors
        )

    def _is_left_to_saver(self, error: BaseException) -> bool:
        """True if a saver has the data, and this process has only stopped waiting for it."""
        return self._is_submitted and isinstance(error, SaverSilentError)

    def outcome(self) -> SaveError | None:
        """Wait as `wait` does, and return what it would raise."""
        try:
            self.wait()
        except SaveError as error:
            return error
        return None

    def settle(self, failures: Sequence[bool]) -> None:
        """Record in which tiers the save has failed on any rank, once no rank is at work on it.

        From then on `wait` does not look at storage, where retention may have deleted the checkpoint.
        """
        with self._changed:
            for state, failed in zip(self._states.values(), failures, strict=True):
                if failed and state.error is None:
                    state.error = SaveError("another rank failed; its log says why")
                state.is_committed = state.error is None

    def submitted(self) -> None:
        """Record that the saver has its data."""
        self._is_submitted = True

    def join(self) -> None:
        """Wait until this node has finished with it, whatever the outcome."""
        self._wait_until(lambda: all(state.is_over for state in self._states.values()))

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition. Tells the launcher meanwhile that this trainer does not hang."""
        with self._changed:
            if condition():
                return
        is_trainer = threading.current_thread() is threading.main_thread()
        with doing("waiting for saves") if is_trainer else contextlib.nullcontext(), self._changed:
            while not self._changed.wait_for(condition, _BEAT):
                if is_trainer:
                    alive()

    @public_api
    def wait(self, tier: str | None = None) -> None:
        """Wait until the save is safe. May be called on any ranks, any number of times.

        Args:
            tier: one of `tiers`; None: all of them. In "memory" the save is safe from the death of trainers, once
                all ranks of this node have staged their part; in "local" and "remote" it is a checkpoint: every
                rank's data is durable there, and so is the commit.

        Raises ValueError for a tier that this save does not go to; SaveError, from what went wrong, if it failed
        there: then there is no checkpoint of it, and those before it are untouched.
        """
        if tier is not None and tier not in self.tiers:
            raise ValueError(f"this save goes to {', '.join(self.tiers)}, and not to {tier!r}")
        for name in self.tiers if tier is None else (tier,):
            self._wait_for(name)

    def _wait_for(self, tier: str) -> None:
        state = self._states[tier]
        self._wait_until(lambda: state.is_over)
        if state.error is None and not state.is_committed:  # another node commits
            try:
                wait_committed(self._places[tier], self._id, Patience(self._timeout))
                state.is_committed = True
            except Exception as error:
                state.error = error
        if state.error is not None:
            raise SaveError(f"saving {self._where(tier)} failed: {state.error}") from state.error

    def _where(self, tier: str) -> str:
        return self._places[tier].url if tier in self._places else f"step {self.step} in memory"
