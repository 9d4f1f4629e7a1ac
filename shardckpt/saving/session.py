"""A save, from the state to a checkpoint: flatten, plan, stage; then, while training goes on, persist, commit.

`SaveSession.start` is the first half and collective; the second half is the sink's affair, and the ranks meet
in the storage only.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import crc32c
import msgspec

from shardckpt.environment import is_first_on_node
from shardckpt.errors import RankMismatchError, SaverError, StateError, public_api
from shardckpt.format.save_plan import Layout, SavePlan, plan_save
from shardckpt.memory import no_garbage_collection
from shardckpt.ranks.world import Ranks, agree, current_ranks
from shardckpt.run.persist import check_free
from shardckpt.run.places import Place, attempt_for
from shardckpt.run.proposal import Proposal
from shardckpt.run.save_info import SaveInfo
from shardckpt.run.tiers import Destination, Tier, tier_name
from shardckpt.saving.backend import JobAttempt, Save, SaveBackend
from shardckpt.saving.handle import FailureLog, SaveHandle
from shardckpt.saving.replica_check import ReplicaCheck
from shardckpt.saving.staging import Copies
from shardckpt.saving.thread_backend import ThreadBackend
from shardckpt.state.cache import StateDictCache
from shardckpt.state.flatten import FlatState, flatten
from shardckpt.storage import Storage, open_storage

__all__ = ["COMMIT_TIMEOUT", "SaveHandle", "SaveSession", "save", "save_async"]

_log = logging.getLogger("shardckpt")

COMMIT_TIMEOUT = 600.0
"""Seconds without any progress of another rank after which a save has failed."""


@dataclass(frozen=True)
class _Prepared:
    """What is kept from save to save as long as the state's structure does not change."""

    layouts: list[Layout]
    plan: SavePlan
    local_ranks: int


@dataclass(frozen=True)
class _Saved:
    """What was saved last, beside its tensors, which are in the buffer that they were staged in."""

    values: Any
    per_rank: dict[str, Any]
    metrics: dict[str, float | str]

    def covers(self, flat: FlatState, metrics: dict[str, float | str]) -> bool:
        """Whether nothing of these would be lost if they were not saved."""
        is_same = (self.values, self.per_rank) == (flat.values, flat.per_rank)
        return is_same and metrics.items() <= self.metrics.items()


class SaveSession:
    """Saves of one process. Keeps the plan and the buffers from one save to the next."""

    def __init__(self, ranks: Ranks, commit_timeout: float, backend: SaveBackend | None = None) -> None:
        """`backend`: where staged packs go; None: a thread of this process."""
        self._ranks = ranks
        self._timeout = commit_timeout
        self._backend: SaveBackend = backend if backend is not None else ThreadBackend(commit_timeout)
        self._cache = StateDictCache()
        self._prepared: _Prepared | None = None
        self._failures = FailureLog()
        self._secret = ""
        self._count = 0
        self._job: JobAttempt | None = None
        self._name = ""  # of the attempt's folder, once it is known
        self._substitute: ThreadBackend | None = None  # which claims, where there is no saver to do it
        self._saved: _Saved | None = None

    @property
    def is_ready(self) -> bool:
        """Whether this rank could stage now, without waiting for an earlier save."""
        return self._backend.is_ready

    @property
    def outlives_trainer(self) -> bool:
        """Whether what is staged is kept and seen to even if this process ends at once. The same on all ranks,
        once something was prepared."""
        return self._backend.outlives_trainer

    def adopt(self, job: JobAttempt) -> None:
        """Saves are of this attempt from now on; it is claimed in the background."""
        self._job, self._name = job, ""
        self._substitute = None  # it claims for the attempt before
        self._hand_over()

    def learn(self, name: str) -> None:
        """The attempt is claimed, and this is its folder's name."""
        self._name = name
        self._backend.learn(name)

    def wait_claimed(self, patience: float, *, is_urgent: bool) -> str:
        """The name of the attempt's folder; empty if it is not known after `patience` seconds.

        `is_urgent`: also as soon as the storage has been found to be out of reach. Raises why it cannot be
        claimed.
        """
        try:
            return self._backend.wait_claimed(patience, is_urgent=is_urgent)
        except SaverError as error:  # there is none, or it died: then this process claims
            _log.debug("the saver does not claim: %s", error)
        assert self._job is not None
        if self._substitute is None:
            self._substitute = ThreadBackend(self._timeout)
            self._substitute.adopt(self._job)
        return self._substitute.wait_claimed(patience, is_urgent=is_urgent)

    def _hand_over(self) -> None:
        """Tell the sink which attempt its saves are of."""
        if self._job is None:
            return
        try:
            self._backend.adopt(self._job)
        except SaverError as error:  # which is told when something is to be saved
            _log.debug("there is no saver yet: %s", error)
        if self._name:
            self._backend.learn(self._name)

    def has_changed(self, state: dict[str, Any], metrics: Mapping[str, float] | None) -> bool:
        """Whether anything would be lost on any rank if this were not saved beside what was saved last.
        Collective.

        Compares every byte. Raises what `start` raises about the state.
        """
        flat, numbers, _, copies = self._prepare(state, metrics)
        known, staged = self._saved, self._backend.last_staged
        is_same = known is not None and known.covers(flat, numbers)
        is_same = is_same and staged is not None and staged.holds(copies)
        return any(self._ranks.maximum([not is_same]))

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
        """Copy the state; it is seen to in the background. Collective: every rank calls it.

        When it returns, the state may change. `path` is the checkpoint's below its run, by the name that its
        attempt began with; empty for one that lies alone. No storage is asked for anything. Raises StateError,
        on all ranks, before anything is written.
        """
        with no_garbage_collection():
            flat, numbers, prepared, copies = self._prepare(state, metrics)
            self._saved = None
            self._count += 1
            save_id = f"{self._secret}-{self._count}"
            handle = SaveHandle(save_id, step, destinations, self._timeout, self._failures)
            rank, plan = self._ranks.rank, prepared.plan
            info = SaveInfo(save_id, path, step, attempt, self._ranks.size)
            proposal = Proposal(info, numbers, flat.values, plan) if rank == 0 else None
            save = Save(
                info,
                rank,
                prepared.local_ranks,
                destinations,
                flat.per_rank,
                proposal,
            )
            try:
                self._backend.begin(save).fill(copies)
            except (SaverError, MemoryError) as error:  # this save is lost, and training is not
                self._backend.abandon(save, error)
                for tier in handle.tiers:
                    handle.note(tier, error)
                return handle
            except BaseException as error:
                self._backend.abandon(save, error)
                raise
        self._saved = _Saved(flat.values, flat.per_rank, numbers)
        self._backend.submit(save, handle)
        return handle

    def prepare(self, state: dict[str, Any]) -> None:
        """Plan, and get the buffers' memory in the background, so that the first save need not. Collective.

        Raises what `start` raises about the state.
        """
        self._prepare(state, None)

    def probe(self, seconds: float) -> None:
        """Find out whether the saver still answers: the next save is not entrusted to one that does not."""
        self._backend.probe(seconds)

    def limit_silence(self, seconds: float) -> None:
        """From now on, wait no longer than so many seconds for a saver that answers nothing."""
        self._backend.limit_silence(seconds)

    def close(self) -> None:
        """No more saves will come."""
        self._cache.clear()
        self._saved = None
        self._backend.close()
        if self._substitute is not None:
            self._substitute.close()

    def _prepare(
        self,
        state: dict[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> tuple[FlatState, dict[str, float | str], _Prepared, Copies]:
        """Flatten, and plan if any rank's structure has changed; all ranks checked to agree."""
        error: Exception | None = None
        flat = FlatState([], None, {})
        layouts: list[Layout] = []
        numbers: dict[str, float | str] = {}
        try:
            numbers = _checked_metrics(metrics)
            flat = flatten(state, self._ranks.rank, self._cache)
            layouts = self._cache.derived("layouts", flat.tensors, flat.layouts)
        except Exception as failure:  # of the state's own objects, too
            error = failure
        values = crc32c.crc32c(msgspec.json.encode(flat.values))
        stale = self._prepared is None or self._prepared.layouts != layouts or self._backend.is_lost
        known = 0 if self._prepared is None else self._prepared.plan.fingerprint
        failed, changed, *differ = self._ranks.maximum(
            [error is not None, stale, values, -values, known, -known]
        )
        if failed:
            agree(self._ranks, error)
        if differ[0] != -differ[1]:
            self._raise_values_differ(flat)
        fresh = bool(changed) or differ[2] != -differ[3]
        prepared = self._plan(layouts) if fresh or self._prepared is None else self._prepared
        plan, rank = prepared.plan, self._ranks.rank
        inputs = [plan, *flat.tensors]
        replicas = self._cache.derived("replicas", inputs, lambda: ReplicaCheck(plan, flat.tensors, rank))
        replicas.check(self._ranks, turn=self._count, whole=fresh)
        self._prepared = prepared  # kept only once its replicas have been compared whole
        copies = self._cache.derived("copies", inputs, lambda: Copies(plan.writes(rank), flat.tensors))
        return flat, numbers, prepared, copies

    def _plan(self, layouts: list[Layout]) -> _Prepared:
        encoded = self._ranks.gather(msgspec.msgpack.encode(layouts))
        plan = plan_save([msgspec.msgpack.decode(data, type=list[Layout]) for data in encoded])
        if not self._secret:  # what makes the names of this session's saves unique
            self._secret = self._ranks.broadcast(secrets.token_hex(16).encode()).decode()
        self._prepared = None
        local_ranks = self._prepare_backend(plan)
        return _Prepared(layouts, plan, local_ranks)

    def _prepare_backend(self, plan: SavePlan) -> int:
        """Have the sink get buffers; the number of ranks that have the same sink.

        Where a rank's saver cannot be reached, all ranks go on without.
        """
        rank = self._ranks.rank
        error: Exception | None = None
        unreachable: SaverError | None = None
        try:
            self._backend.prepare(plan, rank)
        except SaverError as failure:
            unreachable = failure
        except (OSError, MemoryError) as failure:
            error = StateError(f"no memory for a copy of {plan.pack_sizes[rank]} bytes: {failure}")
        agree(self._ranks, error)
        if any(self._ranks.maximum([unreachable is not None])):
            if unreachable is not None and is_first_on_node():
                _log.warning(
                    "%s; from now on saves are written by the trainers, and end with them", unreachable
                )
            self._backend.close()
            self._backend = ThreadBackend(self._timeout)
            self._hand_over()
            return self._prepare_backend(plan)
        sinks = self._ranks.gather(self._backend.id.encode())
        return sinks.count(sinks[rank])

    def _raise_values_differ(self, flat: FlatState) -> None:
        everyone = [msgspec.json.decode(v) for v in self._ranks.gather(msgspec.json.encode(flat.values))]
        for rank, values in enumerate(everyone):
            if (found := _first_difference(everyone[0], values, "")) is not None:
                path, first, other = found
                raise RankMismatchError(
                    f"state[{path!r}] is {first!r} on rank 0 and {other!r} on rank {rank}. Plain values are "
                    "stored once, so they must be equal on all ranks; wrap what every rank has its own of in "
                    "shardckpt.PerRank."
                )


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

    When it returns, the state has been copied and may change; `handle.wait()` returns when the
    checkpoint is durable. It is written by this process, whose end waits for it. The storage is not asked for
    anything before: a checkpoint that is there already is left as it is, and `wait` raises SaveError. Raises
    StateError on all ranks, with nothing written.
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

    Raises StateError, or CheckpointExistsError if there is a checkpoint already, on all ranks and with nothing
    written; SaveError if it did not become durable.
    """
    ranks, storage = current_ranks(), open_storage(url, storage_options)
    error: Exception | None = None
    try:
        if ranks.rank == 0:
            check_free(Place(storage))
    except Exception as failure:
        error = failure
    agree(ranks, error)
    _start(storage, ranks, state, step, metrics).wait()


def _start(
    storage: Storage, ranks: Ranks, state: dict[str, Any], step: int, metrics: Mapping[str, float] | None
) -> SaveHandle:
    destination = Destination(Tier(tier_name(storage), storage.url), Place(storage))
    attempt = attempt_for(storage.url, step) or 0
    return SaveSession(ranks, COMMIT_TIMEOUT).start(
        "", [destination], state, step=step, attempt=attempt, metrics=metrics
    )


def _checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float | str]:
    """Metrics by name as JSON has them: what is not finite as text."""
    try:
        numbers = {str(name): float(value) for name, value in (metrics or {}).items()}
    except (TypeError, ValueError) as error:
        raise StateError(f"metrics must be numbers by name, as in {{'loss': 1.2}}: {error}") from error
    return {name: value if math.isfinite(value) else repr(value) for name, value in numbers.items()}


def _first_difference(one: Any, other: Any, path: str) -> tuple[str, Any, Any] | None:
    """The first place at which two JSON trees differ, with what they have there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            below = f"{path}/{key}" if path else key
            if key not in one or key not in other:
                return below, one.get(key, "absent"), other.get(key, "absent")
            if (found := _first_difference(one[key], other[key], below)) is not None:
                return found
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            if (found := _first_difference(a, b, f"{path}/{number}")) is not None:
                return found
        return None
    return None if repr(one) == repr(other) else (path, one, other)  # 1, 1.0 and True differ, and -0.0
