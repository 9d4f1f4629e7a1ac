"""A save, from the state to a checkpoint: flatten, plan, stage; then, while training goes on, persist, commit.

`SaveSession.start` is the first half and collective; the second half runs in a thread of each rank, and
meets the other ranks in the storage only.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import crc32c
import msgspec

from shardckpt.commit import Proposal, commit, wait_committed
from shardckpt.errors import CheckpointExistsError, RankMismatchError, SaveError, StateError
from shardckpt.manifest import Manifest
from shardckpt.plan import Layout, SavePlan, plan_save
from shardckpt.ranks import Ranks, agree, current_ranks
from shardckpt.replicas import check_replicas
from shardckpt.runs import Place
from shardckpt.staging import StagingBuffer
from shardckpt.state import FlatState, flatten
from shardckpt.storage import Storage, open_storage
from shardckpt.writer import persist, report_failure

__all__ = ["COMMIT_TIMEOUT", "SaveHandle", "SaveSession", "save", "save_async"]

_log = logging.getLogger("shardckpt")

COMMIT_TIMEOUT = 600.0
"""Seconds without any progress of another rank after which a save has failed."""


class SaveHandle:
    """A save under way. Training may go on; `wait` tells when it is durable."""

    def __init__(self, place: Place, step: int) -> None:
        self.url = place.url
        self.step = step
        self._place = place
        self._error: BaseException | None = None
        self._is_committed = False
        self._thread: threading.Thread | None = None
        self._confirm: Callable[[], object] | None = None

    def __repr__(self) -> str:
        state = "failed" if self._error else "committed" if self._is_committed else "under way"
        return f"SaveHandle({self.url!r}, step={self.step}, {state})"

    @property
    def busy(self) -> bool:
        """Whether this process is still at work on it."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it is known here that the save has failed; `wait` raises why."""
        return self._error is not None

    def settle(self, *, failed: bool) -> None:
        """Note what became of it, as all ranks know once none is at work on it any more.

        From then on `wait` does not look at the storage, where retention may have deleted the checkpoint.
        """
        self._is_committed = not failed
        if failed and self._error is None:
            self._error = SaveError("another rank failed; its log says why")

    def join(self) -> None:
        """Return when this process is done with it, whatever the outcome."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """Return when the checkpoint exists and is durable: every rank's data, and the commit.

        May be called on any ranks, any number of times. Raises SaveError, from what went wrong, if the save
        failed; then there is no checkpoint at its URL, and those before it are untouched.
        """
        self.join()
        if self._error is None and not self._is_committed and self._confirm is not None:
            try:
                self._confirm()
                self._is_committed = True
            except Exception as error:
                self._error = error
        if self._error is not None:
            raise SaveError(f"saving {self.url} failed: {self._error}") from self._error

    def _run(self, work: Callable[[], Manifest | None]) -> None:
        """Do the second half in a thread, which the interpreter's exit waits for."""

        def target() -> None:
            try:
                self._is_committed = work() is not None
            except BaseException as error:
                self._error = error
                _log.error("saving %s failed: %s", self.url, error)

        self._thread = threading.Thread(target=target, name="shardckpt-save")
        self._thread.start()


@dataclass(frozen=True)
class _Prepared:
    """What is kept from save to save as long as the state's structure does not change."""

    layouts: list[Layout]
    plan: SavePlan
    buffer: StagingBuffer


class SaveSession:
    """Saves of one process. Keeps the plan and the buffer from one save to the next."""

    def __init__(self, ranks: Ranks, commit_timeout: float) -> None:
        self._ranks = ranks
        self._timeout = commit_timeout
        self._prepared: _Prepared | None = None
        self._secret = ""
        self._count = 0

    def start(
        self,
        place: Place,
        state: dict[str, Any],
        *,
        step: int,
        attempt: int,
        metrics: Mapping[str, float] | None = None,
        after: Callable[[], object] | None = None,
    ) -> SaveHandle:
        """Copy the state, and write it in the background. Collective: every rank calls it.

        When it returns, the state may change. `after` is called on rank 0 once the checkpoint exists. Raises
        StateError or CheckpointExistsError, on all ranks, before anything is written.
        """
        with _no_garbage_collection():
            flat, numbers, prepared = self._prepare(state, metrics, place)
            prepared.buffer.copy_from({tensor.name: tensor for tensor in flat.tensors})
        self._count += 1
        save_id = f"{self._secret}-{self._count}"
        proposal = Proposal(place, save_id, step, attempt, numbers, flat.values, prepared.plan)
        handle = SaveHandle(place, step)
        handle._confirm = lambda: wait_committed(place, save_id, self._timeout)
        handle._run(lambda: self._finish(proposal, prepared, flat, after))
        return handle

    def prepare(self, state: dict[str, Any]) -> None:
        """Plan, and get the buffer's memory in the background, so that the first save need not. Collective.

        Raises what `start` raises about the state.
        """
        _, _, prepared = self._prepare(state, None, None)
        threading.Thread(target=prepared.buffer.touch, name="shardckpt-touch", daemon=True).start()

    def _prepare(
        self, state: dict[str, Any], metrics: Mapping[str, float] | None, place: Place | None
    ) -> tuple[FlatState, dict[str, float | str], _Prepared]:
        """Flatten, and plan if any rank's structure has changed; all ranks checked to agree."""
        error: Exception | None = None
        flat = FlatState([], None, {})
        layouts: list[Layout] = []
        numbers: dict[str, float | str] = {}
        try:
            numbers = _checked_metrics(metrics)
            flat = flatten(state, self._ranks.rank)
            layouts = flat.layouts()
            if self._ranks.rank == 0 and place is not None:
                _check_free(place)
        except Exception as failure:  # of the state's own objects, too
            error = failure
        values = crc32c.crc32c(msgspec.json.encode(flat.values))
        stale = self._prepared is None or self._prepared.layouts != layouts
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
        tensors = {tensor.name: tensor for tensor in flat.tensors}
        check_replicas(prepared.plan, tensors, self._ranks, whole=fresh)
        self._prepared = prepared  # kept only once its replicas have been compared whole
        return flat, numbers, prepared

    def _plan(self, layouts: list[Layout]) -> _Prepared:
        encoded = self._ranks.gather(msgspec.msgpack.encode(layouts))
        plan = plan_save([msgspec.msgpack.decode(data, type=list[Layout]) for data in encoded])
        if not self._secret:  # what makes the names of this session's saves unique
            self._secret = self._ranks.broadcast(secrets.token_hex(16).encode()).decode()
        rank = self._ranks.rank
        self._prepared = None  # free the old buffer first
        error: Exception | None = None
        try:
            buffer = StagingBuffer(plan.writes(rank), plan.pack_sizes[rank])
        except (OSError, MemoryError) as failure:
            error = StateError(f"no memory for a copy of {plan.pack_sizes[rank]} bytes: {failure}")
        agree(self._ranks, error)
        return _Prepared(layouts, plan, buffer)

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

    def _finish(
        self,
        proposal: Proposal,
        prepared: _Prepared,
        flat: FlatState,
        after: Callable[[], object] | None,
    ) -> Manifest | None:
        """Persist this rank's pack; on rank 0 also commit. Runs in the background."""
        rank = self._ranks.rank
        storage = proposal.place.storage
        try:
            writes = prepared.plan.writes(rank)
            persist(
                storage,
                prepared.buffer.content,
                writes,
                save_id=proposal.id,
                rank=rank,
                per_rank=flat.per_rank,
            )
        except Exception as error:
            report_failure(storage, f"rank-{rank:05d}", proposal.id, error)
            if rank == 0:
                report_failure(storage, "", proposal.id, error)
            raise
        if rank != 0:
            return None
        try:
            manifest = commit(proposal, self._timeout)
        except Exception as error:
            report_failure(storage, "", proposal.id, error)
            raise
        if after is not None:
            after()
        return manifest


def _check_free(place: Place) -> None:
    if place.is_committed():
        raise CheckpointExistsError(
            f"{place.url} has a checkpoint already, which is never overwritten. Save under "
            "another URL, or delete that folder first."
        )


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
    checkpoint is durable. Raises StateError or CheckpointExistsError on all ranks, with nothing written.
    """
    session = SaveSession(current_ranks(), COMMIT_TIMEOUT)
    place = Place(open_storage(url, storage_options))
    return session.start(place, state, step=step, attempt=0, metrics=metrics)


def save(
    url: str | os.PathLike[str] | Storage,
    state: dict[str, Any],
    *,
    step: int = 0,
    metrics: Mapping[str, float] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Save `state` as one checkpoint at `url`; it is durable when this returns. Collective.

    Raises what `save_async` raises, and SaveError if it did not become durable.
    """
    save_async(url, state, step=step, metrics=metrics, storage_options=storage_options).wait()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collections would look at every object of torch, which takes longer than a save's own work."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
