"""A save: flatten, plan, stage, hand over. Then training goes on, and the backend persists and commits.

`SaveSession.start` is the flow. It is collective; what comes after is the backend's work, in which ranks meet in
storage only.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import crc32c
import msgspec

from shardckpt.environment import is_first_on_node
from shardckpt.errors import SaverError, StateError, public_api
from shardckpt.format.layouts import RankLayout
from shardckpt.format.save_plan import SavePlan, plan_save
from shardckpt.memory import no_garbage_collection
from shardckpt.ranks.equality import all_equal
from shardckpt.ranks.world import Ranks, agree, agreement, current_ranks
from shardckpt.run.persist import check_free
from shardckpt.run.places import Place, attempt_for
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.run.tiers import Destination, Tier, tier_name
from shardckpt.saving.backend import JobAttempt, Save, SaveBackend
from shardckpt.saving.failure_log import FailureLog
from shardckpt.saving.handle import SaveHandle
from shardckpt.saving.replica_check import ReplicaCheck
from shardckpt.saving.staging import Copies
from shardckpt.saving.thread_backend import ThreadBackend
from shardckpt.saving.value_check import raise_if_values_differ
from shardckpt.state.cache import StateDictCache
from shardckpt.state.flatten import FlatState, flatten
from shardckpt.state.tensors import TensorShard
from shardckpt.storage import Storage, open_storage

__all__ = ["COMMIT_TIMEOUT", "SaveHandle", "SaveSession", "save", "save_async"]

_log = logging.getLogger("shardckpt")

COMMIT_TIMEOUT = 600.0
"""Seconds without progress of another rank after which a save has failed."""


@dataclass(frozen=True)
class _Prepared:
    """What is kept from save to save as long as the state's structure does not change."""

    layout: RankLayout
    plan: SavePlan
    local_ranks: int


@dataclass(frozen=True)
class _Content:
    """What a save stores beside tensors.

    Attributes:
        values: plain values, as JSON.
        per_rank: this rank's PerRank values by path, as JSON.
        metrics: by name; what is not finite as text.
    """

    values: Any
    per_rank: dict[str, Any]
    metrics: dict[str, float | str]

    def covers(self, other: _Content) -> bool:
        """Return True if nothing of `other` would be lost if only this is stored."""
        is_same = (self.values, self.per_rank) == (other.values, other.per_rank)
        return is_same and other.metrics.items() <= self.metrics.items()


class SaveSession:
    """The saves of one process. Keeps the plan and the buffers from one save to the next.

    Args:
        ranks: the world.
        commit_timeout: seconds without progress of another rank after which a save has failed.
        backend: persists what is staged; None: a thread of this process.
    """

    def __init__(self, ranks: Ranks, commit_timeout: float, backend: SaveBackend | None = None) -> None:
        self.ranks = ranks
        self._timeout = commit_timeout
        self._backend: SaveBackend = backend if backend is not None else ThreadBackend(commit_timeout)
        self._cache = StateDictCache()
        self._prepared: _Prepared | None = None
        self._failures = FailureLog()
        self._secret = ""  # makes the ids of this session's saves unique
        self._count = 0
        self._job: JobAttempt | None = None
        self._name = ""  # of the attempt's folder, once it is known
        self._substitute: ThreadBackend | None = None  # claims, where there is no saver to do it
        self._saved: _Content | None = None  # last; its tensors are in the buffer that was staged last

    @property
    def is_ready(self) -> bool:
        """True if this rank could stage now, without waiting for an earlier save."""
        return self._backend.is_ready

    @property
    def outlives_trainer(self) -> bool:
        """True if what is staged is kept and persisted even if this process ends at once.

        The same on all ranks, once something was prepared.
        """
        return self._backend.outlives_trainer

    def adopt(self, job: JobAttempt) -> None:
        """Have later saves belong to this attempt, which is claimed in the background."""
        self._job, self._name = job, ""
        self._substitute = None  # it claims for the attempt before
        self._introduce_job()

    def learn(self, name: str) -> None:
        """Take in the name of the attempt's folder, now that the attempt is claimed."""
        self._name = name
        self._backend.learn(name)

    def wait_claimed(self, patience: float, *, is_urgent: bool) -> str:
        """Wait until the attempt is claimed: see SaveBackend. Without a saver, this process claims it."""
        try:
            return self._backend.wait_claimed(patience, is_urgent=is_urgent)
        except SaverError as error:  # there is none, or it died
            _log.debug("the saver does not claim: %s", error)
        assert self._job is not None
        if self._substitute is None:
            self._substitute = ThreadBackend(self._timeout)
            self._substitute.adopt(self._job)
        return self._substitute.wait_claimed(patience, is_urgent=is_urgent)

    def has_changed(self, state: dict[str, Any], metrics: Mapping[str, float] | None) -> bool:
        """Return True if the last save lacks anything of this, on any rank. Collective.

        Compares every byte. Raises what `start` raises about the state.
        """
        content, _, copies, compare = self._prepare(state, metrics)
        compare()
        known, staged = self._saved, self._backend.last_staged
        is_same = known is not None and known.covers(content)
        is_same = is_same and staged is not None and staged.holds(copies)
        return any(self.ranks.maximum([not is_same]))

    def start(
        self,
        path: str,
        destinations: Sequence[Destination],
        state: dict[str, Any],
        *,
        step: int,
        attempt: int,
        metrics: Mapping[str, float] | None = None,
    ) -> SaveHandle:
        """Copy the state, and have it persisted in the background. Collective: every rank calls it.

        When it returns, the state may change. No storage is asked for anything.

        Args:
            path: the checkpoint's path below its run, by the name with which its attempt began; empty for a
                checkpoint that lies alone.
            destinations: the durable tiers that it goes to.
            state: what is saved.
            step: optimizer steps done.
            attempt: number of the attempt; 0 for a checkpoint that lies alone.
            metrics: numbers by name.

        Raises StateError, on all ranks, and writes no checkpoint then.
        """
        with no_garbage_collection():
            content, prepared, copies, compare = self._prepare(state, metrics)
            self._saved = None
            self._count += 1
            rank = self.ranks.rank
            info = SaveInfo(f"{self._secret}-{self._count}", path, step, attempt, self.ranks.size)
            handle = SaveHandle(info.id, step, destinations, self._timeout, self._failures)
            proposal = None
            if rank == 0:
                proposal = Proposal(info, content.metrics, content.values, prepared.plan)
            save = Save(info, rank, prepared.local_ranks, destinations, content.per_rank, proposal)
            loss: SaverError | MemoryError | None = None
            try:
                try:
                    self._backend.begin(save).fill(copies)
                except (SaverError, MemoryError) as error:  # this save is lost, and training is not
                    loss = error
                compare()
            except BaseException as error:
                self._backend.abandon(save, error)
                raise
            if loss is not None:
                self._backend.abandon(save, loss)
                for tier in handle.tiers:
                    handle.note(tier, loss)
                return handle
        self._saved = content
        self._backend.submit(save, handle)
        return handle

    def prepare(self, state: dict[str, Any]) -> None:
        """Plan, and get memory in the background, so that the first save need not. Collective.

        Raises what `start` raises about the state.
        """
        *_, compare = self._prepare(state, None)
        compare()

    def expect(self, nbytes: int) -> None:
        """Get memory in the background for packs of so many bytes, whose plan is not known yet."""
        self._backend.expect(nbytes)

    def probe(self, seconds: float) -> None:
        """Find out, within so many seconds, whether the saver answers: the next save needs one that does."""
        self._backend.probe(seconds)

    def limit_silence(self, seconds: float) -> None:
        """From now on, wait no longer than so many seconds for a saver that does not answer."""
        self._backend.limit_silence(seconds)

    def close(self) -> None:
        """Take no more saves."""
        self._cache.clear()
        self._saved = None
        self._backend.close()
        if self._substitute is not None:
            self._substitute.close()

    def _introduce_job(self) -> None:
        """Tell the backend to which attempt its saves belong."""
        if self._job is None:
            return
        try:
            self._backend.adopt(self._job)
        except SaverError as error:  # logged when something is saved
            _log.debug("there is no saver yet: %s", error)
        if self._name:
            self._backend.learn(self._name)

    def _prepare(
        self, state: dict[str, Any], metrics: Mapping[str, float] | None
    ) -> tuple[_Content, _Prepared, Copies, Callable[[], None]]:
        """Flatten, and plan if any rank's structure has changed, with a check that all ranks agree.

        The last of what this returns waits for the comparison of replicas, which goes on in the background; all
        ranks have to call it. It raises RankMismatchError.
        """
        error: Exception | None = None
        flat = FlatState([], None, {})
        tensors: Sequence[TensorShard] = ()
        layout = RankLayout((), (), ())
        numbers: dict[str, float | str] = {}
        try:
            numbers = _checked_metrics(metrics)
            flat = flatten(state, self.ranks.rank, self._cache)
            tensors = self._cache.derived("tensors", flat.tensors, lambda: flat.tensors)
            layout = self._cache.derived("layout", [tensors], lambda: flat.layout(self.ranks.rank))
        except Exception as failure:  # of the state's own objects, too
            error = failure
        values = crc32c.crc32c(msgspec.json.encode(flat.values))
        stale = (
            self._prepared is None or self._prepared.layout.digest != layout.digest or self._backend.is_lost
        )
        known = 0 if self._prepared is None else self._prepared.plan.fingerprint
        fresh = not all_equal(self.ranks, [values, known], objects=stale or error is not None)
        if fresh:  # or something is wrong
            failed, changed, *differ = self.ranks.maximum(
                [error is not None, stale, values, -values, known, -known]
            )
            if failed:
                agree(self.ranks, error)
            if differ[0] != -differ[1]:
                raise_if_values_differ(self.ranks, flat.values)
            fresh = bool(changed) or differ[2] != -differ[3]
        prepared = self._plan(layout) if fresh or self._prepared is None else self._prepared
        plan, rank = prepared.plan, self.ranks.rank
        inputs = [plan, tensors]
        replicas = self._cache.derived("replicas", inputs, lambda: ReplicaCheck(plan, tensors, rank))
        compare = replicas.start(self.ranks, turn=self._count, whole=fresh)
        if fresh:
            compare()
            compare = _compared
        self._prepared = prepared  # kept only once its replicas have been compared whole
        copies = self._cache.derived("copies", inputs, lambda: Copies(plan.writes(rank), tensors))
        return _Content(flat.values, flat.per_rank, numbers), prepared, copies, compare

    def _plan(self, layout: RankLayout) -> _Prepared:
        """Plan the save of a new structure, and get buffers for it. Collective."""
        plan = plan_save(layout.share(self.ranks.rank, self.ranks.gather))
        if not self._secret:
            self._secret = self.ranks.broadcast(secrets.token_hex(16).encode()).decode()
        self._prepared = None
        local_ranks = self._prepare_backend(plan)
        return _Prepared(layout, plan, local_ranks)

    def _prepare_backend(self, plan: SavePlan) -> int:
        """Have the backend get buffers. Returns the number of ranks that have the same backend.

        Where a rank's saver cannot be reached, all ranks go on without savers.
        """
        rank = self.ranks.rank
        error: Exception | None = None
        unreachable: SaverError | None = None
        try:
            self._backend.prepare(plan, rank)
        except SaverError as failure:
            unreachable = failure
        except (OSError, MemoryError) as failure:
            error = StateError(f"no memory for a copy of {plan.pack_size(rank)} bytes: {failure}")
        agree(self.ranks, error)
        if any(self.ranks.maximum([unreachable is not None])):
            if unreachable is not None and is_first_on_node():
                _log.warning(
                    "%s; from now on saves are written by the trainers, and end with them", unreachable
                )
            self._backend.close()
            self._backend = ThreadBackend(self._timeout)
            self._introduce_job()
            return self._prepare_backend(plan)
        backends = self.ranks.gather(self._backend.id.encode())
        return backends.count(backends[rank])


@public_api
def save_async(
    url: str | os.PathLike[str] | Storage,
    state: dict[str, Any],
    *,
    step: int = 0,
    metrics: Mapping[str, float] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> SaveHandle:
    """Save `state` as one checkpoint at `url`, in the background. Collective.

    When it returns, the state has been copied and may change; `handle.wait()` returns when the checkpoint is
    durable. A thread of this process writes it, and the end of the process waits for that. No storage is asked
    for anything before: a checkpoint that is at `url` already stays as it is, and `wait` raises SaveError.

    Args:
        url: where the checkpoint is to be: a folder, local or in object storage, the same for all ranks.
        state: tensors, modules, optimizers and plain values by name.
        step: optimizer steps done, which is stored with it.
        metrics: numbers by name, which are stored with it.
        storage_options: arguments of the fsspec file system of `url`, such as `endpoint_url`.

    Raises StateError, on all ranks and with nothing written.

    >>> import shardckpt, torch
    >>> state = {"weight": torch.ones(3)}
    >>> handle = shardckpt.save_async("memory://example/async", state, metrics={"loss": 0.5})
    >>> state["weight"] += 1  # while the copy is written
    >>> handle.wait()
    >>> shardckpt.open("memory://example/async").read("weight")
    array([1., 1., 1.], dtype=float32)
    """
    return _start(open_storage(url, storage_options), current_ranks(), state, step, metrics)


@public_api
def save(
    url: str | os.PathLike[str] | Storage,
    state: dict[str, Any],
    *,
    step: int = 0,
    metrics: Mapping[str, float] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Save `state` as one checkpoint at `url`; it is durable when this returns. Collective.

    Args:
        url: where the checkpoint is to be: a folder, local or in object storage, the same for all ranks.
        state: tensors, modules, optimizers and plain values by name.
        step: optimizer steps done, which is stored with it.
        metrics: numbers by name, which are stored with it.
        storage_options: arguments of the fsspec file system of `url`, such as `endpoint_url`.

    Raises StateError, or CheckpointExistsError if there is a checkpoint already, on all ranks and with nothing
    written; SaveError if it did not become durable.

    >>> import shardckpt, torch
    >>> shardckpt.save("memory://example/once", {"weight": torch.ones(3)}, step=7)
    >>> shardckpt.open("memory://example/once").step
    7
    """
    ranks, storage = current_ranks(), open_storage(url, storage_options)
    with agreement(ranks):
        if ranks.rank == 0:
            check_free(Place(storage))
    _start(storage, ranks, state, step, metrics).wait()


def _start(
    storage: Storage, ranks: Ranks, state: dict[str, Any], step: int, metrics: Mapping[str, float] | None
) -> SaveHandle:
    destination = Destination(Tier(tier_name(storage), storage.url), Place(storage))
    attempt = attempt_for(storage.url, step) or 0
    return SaveSession(ranks, COMMIT_TIMEOUT).start(
        "", [destination], state, step=step, attempt=attempt, metrics=metrics
    )


def _compared() -> None:
    """Replicas have been compared."""


def _checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float | str]:
    """Return metrics by name as JSON has them: what is not finite as text. Raises StateError."""
    try:
        numbers = {str(name): float(value) for name, value in (metrics or {}).items()}
    except (TypeError, ValueError) as error:
        raise StateError(f"metrics must be numbers by name, as in {{'loss': 1.2}}: {error}") from error
    return {name: value if math.isfinite(value) else repr(value) for name, value in numbers.items()}
