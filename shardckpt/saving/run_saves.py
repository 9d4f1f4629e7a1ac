"""The saves of one run: in which attempt, to which tiers, and what became of them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from shardckpt.environment import has_one_node
from shardckpt.errors import SaveError
from shardckpt.format.holders import MAX_CHUNK
from shardckpt.ranks.calls import Call
from shardckpt.ranks.world import agree
from shardckpt.run.tiers import MEMORY, Destination
from shardckpt.saving.claim import RunClaim
from shardckpt.saving.pending import PendingSaves
from shardckpt.saving.policy import SaveContext, SaveSchedule
from shardckpt.saving.run_tiers import RunTier, check_one_node
from shardckpt.saving.saver_backend import SaverBackend
from shardckpt.saving.session import SaveHandle, SaveSession
from shardckpt.saving.unsaved import UnsavedStep
from shardckpt.storage import Storage

__all__ = ["RunSaves", "expected_pack"]

_log = logging.getLogger("shardckpt")

_PROBE = 3.0  # seconds for a saver to answer before it is given what must not be lost

_CONTEXTS = {outlives: SaveContext(outlives) for outlives in (False, True)}
"""Made once, since a policy is asked at every step."""

_newest: weakref.WeakValueDictionary[tuple[str, int], RunSaves] = weakref.WeakValueDictionary()
"""By the URL of a run, and each rank that this process is, what has begun the newest attempt."""


_SLACK = 32  # a part of a pack, for what is between its chunks
_UNEVEN = 16  # a part of a pack, for ranks that write more than others: a chunk at most


def expected_pack(share: int) -> int:
    """Return the size of a buffer for `share` bytes of tensors, whose plan is not known yet.

    A buffer serves a pack if it is as large, and no more than an eighth larger.
    """
    return share + share // _SLACK + min(MAX_CHUNK, share // _UNEVEN)


class RunSaves:
    """Saves the steps of a run. All ranks call the same methods together, with the same steps.

    Args:
        root: the run's storage.
        tiers: its durable tiers, nearest first.
        schedule: when `save_if_due` saves.
        session: makes the saves.
        saver: the session's backend, if that is the node's saver.
        unsaved: the last step that training reported, which is forgotten once it is saved.

    Attributes:
        claim: the attempt that saves belong to; None before the first save or restore.
        pending: the saves under way.
    """

    def __init__(
        self,
        root: Storage,
        tiers: Sequence[RunTier],
        schedule: SaveSchedule,
        session: SaveSession,
        saver: SaverBackend | None,
        unsaved: UnsavedStep,
    ) -> None:
        self.claim: RunClaim | None = None
        self.pending = PendingSaves()
        self._root = root
        self._tiers = tiers
        self._schedule = schedule
        self._ranks = session.ranks
        self._session = session
        self._saver = saver
        self._unsaved = unsaved
        self._has_warned = False  # that another attempt is resumed from

    def begin_attempt(self, *, is_restoring: bool = False) -> RunClaim:
        """Begin a new attempt, to which saves belong from now on. Collective. No storage is asked for anything.

        `is_restoring`: True if the caller waits for the claim next.
        """
        known = self.claim.newest if self.claim is not None else 0
        if self._saver is not None:
            known = max(known, self._saver.newest)
        _newest[self._root.url, self._ranks.rank] = self
        self.claim = RunClaim(self._root, self._ranks, self._session, known, is_restoring=is_restoring)
        return self.claim

    def expect(self, loaded: int, total: int) -> None:
        """Have memory for the next saves made ready in the background: of a state that was just loaded.

        Args:
            loaded: bytes that this rank has loaded, which is no less than what it will write.
            total: bytes of the whole state, of which ranks that hold the same write a part each.
        """
        self._session.expect(expected_pack(min(loaded, -(-total // self._ranks.size))))

    def is_due(self, step: int) -> bool:
        """Return True if the schedule has `step` saved, in memory at least."""
        policy = self._schedule.saves
        return policy is not None and policy.should_save(step, self._previous, context=self._context)

    def save_if_due(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None
    ) -> SaveHandle | None:
        """Save `step` as the schedule has it. Collective, for a step that `is_due`.

        Returns the handle, of an earlier save if that has all of this; None if nothing would keep the save, or if
        the saves under way take up all memory.
        """
        tiers = self._tiers_due(step)
        if not tiers and not self._session.outlives_trainer:
            return None
        can_stage = self.pending.settle(self._ranks, Call.STEP, step, is_ready=self._session.is_ready)
        last = self._save_of(step)
        if last is not None and not self._session.has_changed(state, metrics):
            tiers = [tier for tier in tiers if tier.name not in last.tiers]
            if not tiers:
                self._unsaved.forget()
                return last
        if not can_stage and not self.pending.is_empty:  # with none under way, memory is about to be there
            self.pending.skip(step, logs=self._ranks.rank == 0)
            return None
        return self._start(step, state, metrics, tiers)

    def save(
        self, call: Call, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None
    ) -> SaveHandle:
        """Save `step` to all tiers that do not have it. Collective. Waits for memory.

        `call` is what the script calls, and all ranks have to.
        """
        last = self._save_of(step)
        if last is not None:
            last.join()
        self.pending.settle(self._ranks, call, step, is_ready=self._session.is_ready)
        tiers = self._tiers
        if last is not None and not self._session.has_changed(state, metrics):
            self._unsaved.forget()
            tiers = [tier for tier in tiers if last.lacks(tier.name)]
        return self._start(step, state, metrics, tiers) if tiers or last is None else last

    def save_last(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None
    ) -> SaveHandle:
        """Save the step with which training ends, as `save` does, with a saver that is known to answer."""
        self._session.probe(_PROBE)
        return self.save(Call.CLOSE, step, state, metrics)

    def save_before_exit(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None, *, is_durable: bool
    ) -> bool:
        """Return when `step` is safe from the end of this process: in the saver's memory, if there is one.

        Collective. `is_durable`: True if it has to be durable in all tiers where the job may go on without this
        node's memory. Returns False, on all ranks, if it is not saved, which is logged: the process ends all the
        same.
        """
        try:
            self._session.probe(_PROBE)
            self._make_safe(step, state, metrics, is_durable=is_durable)
        except Exception as error:
            _log.error(
                "step %d, after which the job drains, is not saved; the last checkpoint stands: %s: %s",
                step,
                type(error).__name__,
                error,
            )
            return False
        return True

    def _make_safe(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None, *, is_durable: bool
    ) -> None:
        """See `save_before_exit`. Raises on all ranks if the save failed on any."""
        self._session.prepare(state)  # after which all ranks know whether there is a saver
        handle = self._save_of(step)
        if handle is not None and self._session.has_changed(state, metrics):
            handle = None
        if not is_durable and handle is None and self._session.outlives_trainer:
            handle = self._start(step, state, metrics, self._tiers_due(step))
        if handle is None or is_durable or not self._session.outlives_trainer:
            handle = self.save(Call.SAVE, step, state, metrics)
        # Other nodes may go on at once without this one, and find only what is durable.
        is_staging_enough = self._session.outlives_trainer and (has_one_node() or not is_durable)
        error: SaveError | None = None
        try:
            handle.wait(MEMORY if is_staging_enough else None)
        except SaveError as failure:
            error = failure
        agree(self._ranks, error)

    @property
    def _previous(self) -> Sequence[int]:
        return self.claim.steps if self.claim is not None else ()

    @property
    def _context(self) -> SaveContext:
        return _CONTEXTS[self._session.outlives_trainer]

    def _tiers_due(self, step: int) -> list[RunTier]:
        """Return the durable tiers to which the schedule has `step` saved."""
        previous, context = self._previous, self._context
        return [
            tier
            for tier in self._tiers
            if tier.policy is not None and tier.policy.should_save(step, previous, context=context)
        ]

    def _save_of(self, step: int) -> SaveHandle | None:
        """Return the last save of this attempt, if it is of this step."""
        return self.claim.save_of(step) if self.claim is not None else None

    def _start(
        self,
        step: int,
        state: dict[str, Any],
        metrics: Mapping[str, float] | None,
        tiers: Sequence[RunTier],
    ) -> SaveHandle:
        """Start a save, in a new attempt if it would overwrite one, or come before one. Collective."""
        claim = self.claim
        if claim is None:
            check_one_node(self._tiers, self._ranks)
        if claim is None or not claim.has_room(step, [tier.name for tier in tiers]):
            claim = self.begin_attempt()
        self._unsaved.forget()
        self._warn_if_not_resumed(step)
        handle = self._session.start(
            claim.path(step),
            [Destination(tier.tier, claim.place(tier.root, step)) for tier in tiers],
            state,
            step=step,
            attempt=claim.newest,
            metrics=metrics,
        )
        claim.add(handle)
        self.pending.add(handle)
        return handle

    def _warn_if_not_resumed(self, step: int) -> None:
        """Log if another object of this process has begun a newer attempt of the run, which is resumed from.

        Two Checkpointers that save into one run by turns are each right alone.
        """
        newest = _newest.get((self._root.url, self._ranks.rank), self)
        if newest is not self and self._ranks.rank == 0 and not self._has_warned:
            _log.warning(
                "step %d is saved, but not resumed from: another Checkpointer of this process has begun a newer "
                "attempt of %s, which `restore` takes. Use one Checkpointer for a run, or a URL for each",
                step,
                self._root.url,
            )
            self._has_warned = True
