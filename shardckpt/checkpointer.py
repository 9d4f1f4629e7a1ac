"""Checkpointer: when to save, where to resume from, and what to keep. And the one-off save and load."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from shardckpt.errors import (
    CheckpointError,
    CorruptError,
    FormatError,
    NotACheckpointError,
    ShardckptError,
    UnknownVersionError,
)
from shardckpt.manifest import MANIFEST, Manifest, decode_manifest
from shardckpt.ranks import Ranks, agree, current_ranks
from shardckpt.reader import fill
from shardckpt.retention import prune
from shardckpt.runs import (
    BAD,
    Place,
    attempt_number,
    claim_attempt,
    exact_place,
    find_place,
    iter_good,
    step_path,
)
from shardckpt.saving import SaveHandle, SaveSession
from shardckpt.storage import Storage, open_storage
from shardckpt.targets import Targets, bind

__all__ = ["Checkpointer", "Loaded", "load", "save", "save_async"]

_log = logging.getLogger("shardckpt")

_COMMIT_TIMEOUT = 600.0


@dataclass(frozen=True)
class Loaded:
    """What a load did.

    Attributes:
        url: the checkpoint's URL.
        step: optimizer steps done when it was saved.
        attempt: number of the attempt that saved it; 0 outside a run.
        world_size: number of ranks that saved it.
        metrics: the metrics given when it was saved.
        nbytes: bytes that this rank read.
        seconds: how long it took.
        missing: with strict=False, names of the state that the checkpoint lacks; they are unchanged.
        unexpected: with strict=False, names of the checkpoint that the state's objects lack.
        unused: top-level entries of the checkpoint that the state did not ask for.
        kept: paths of PerRank values that this rank keeps, since the checkpoint's world was smaller.
    """

    url: str
    step: int
    attempt: int
    world_size: int
    metrics: dict[str, float]
    nbytes: int
    seconds: float
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


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
    session = SaveSession(current_ranks(), _COMMIT_TIMEOUT)
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


def load(
    url: str | os.PathLike[str] | Storage,
    state: dict[str, Any],
    *,
    strict: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load a checkpoint into `state`, in place, on any world size and in any layout. Collective.

    `url` is a checkpoint, or a run, of which the newest good checkpoint is taken. Only the top-level entries
    that `state` has are loaded; below these the names must agree, unless `strict` is False. Tensors,
    modules and optimizers are filled, plain values in dicts and lists replaced. Raises, with nothing
    changed: NotACheckpointError, FormatError, CorruptError, StorageError, MissingKeysError,
    ShapeMismatchError, StateError.
    """
    ranks = current_ranks()
    started = time.monotonic()
    error: Exception | None = None
    path = ""
    try:
        if ranks.rank == 0:
            path = find_place(url, storage_options).url
    except Exception as failure:
        error = failure
    agree(ranks, error)
    found = ranks.broadcast(path.encode()).decode()
    place = find_place(url) if isinstance(url, Storage) else exact_place(found, storage_options)
    return _load(place, state, ranks, strict=strict, started=started)


class Checkpointer:
    """A run's checkpoints: saves every so many steps, keeps the newest, resumes from the newest good one.

    Every rank makes one, with the same arguments, after `init_process_group` if there is one, and calls
    its methods together with the others. Saving does not hold up training for longer than a copy.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Storage | None = None,
        *,
        every_steps: int | None = None,
        keep_last: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        commit_timeout: float = _COMMIT_TIMEOUT,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            url: the run: a folder, local or in object storage. None: what `launch` says, in
                LAUNCH_CKPT_URL.
            every_steps: `step` saves when the number of steps done is a multiple of it. None: only
                `save` saves.
            keep_last: how many good checkpoints to keep; older ones are deleted. None: all.
            storage_options: arguments of the fsspec file system, such as `endpoint_url`.
            commit_timeout: seconds without any progress of another rank after which a save has failed.

        Raises ValueError for an argument that makes no sense.
        """
        if url is None:
            url = os.environ.get("LAUNCH_CKPT_URL")
            if not url:
                raise ValueError(
                    "Checkpointer needs a url: no url was given, and LAUNCH_CKPT_URL is not set, as it is "
                    "in a worker of `launch`"
                )
        for name, number in (("every_steps", every_steps), ("keep_last", keep_last)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"{name} must be a whole number of 1 or more, or None; it is {number!r}")
        self._root = open_storage(url, storage_options)
        self._ranks = current_ranks()
        self._every = every_steps
        self._keep = keep_last
        self._session = SaveSession(self._ranks, commit_timeout)
        self._attempt: str | None = None
        self._is_prepared = False
        self._last: SaveHandle | None = None
        self._failed: list[SaveHandle] = []
        self._progress = _ProgressFile.of_worker()
        self.url = self._root.url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    def restore(self, state: dict[str, Any], *, strict: bool = True) -> Loaded | None:
        """Load the newest good checkpoint of the run into `state`, as `load` does. Collective.

        Returns None for a run without checkpoints. A checkpoint that fails verification is reported, marked
        as bad and passed over; if there is no good one, its CorruptError is raised rather than starting
        from nothing. Also makes the next attempt's folder this job's own: call it once, before the
        first `step`.
        """
        started = time.monotonic()
        self._claim()
        failure: CheckpointError | None = None
        for place in self._candidates():
            try:
                loaded = _load(place, state, self._ranks, strict=strict, started=started)
            except UnknownVersionError:
                raise  # nothing is wrong with it, and going back silently would lose work
            except NotACheckpointError:
                continue  # pruned since it was listed
            except (CorruptError, FormatError) as error:
                failure = error
                if self._ranks.rank == 0:
                    _log.warning("%s; going on with the checkpoint before it", error)
                    _mark_bad(place, error)
                continue
            if self._ranks.rank == 0:
                _log.info("resumed from %s (step %d)", loaded.url, loaded.step)
            return loaded
        if failure is not None:
            raise failure
        return None

    def step(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> SaveHandle | None:
        """Tell that `step` optimizer steps are done; saves if it is time to. Collective.

        The first call prepares: it plans, and gets memory in the background, so that no save has to.

        Returns the save's handle, or None if none was started: not now, or because the save before is
        still being written, which is logged. Safe to change the state when it returns. A save that fails in
        the background is logged, and raised by `wait` and `close`.
        """
        if self._progress is not None:
            self._progress.write(step)
        if self._every is None:
            return None
        if step % self._every != 0 or step == 0:
            if not self._is_prepared:
                self._session.prepare(state)
                self._is_prepared = True
            return None
        last = self._last
        busy, failed = self._ranks.maximum([last.busy, last.failed]) if last else (0, 0)
        if busy and last:
            if self._ranks.rank == 0:
                _log.warning(
                    "no checkpoint at step %d: the one of step %d is still being written", step, last.step
                )
            return None
        if last:
            last.settle(failed=bool(failed))
        return self._start(step, state, metrics)

    def save(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> SaveHandle:
        """Save now, whatever the step. Collective. Waits first for a save that is still under way."""
        if self._last is not None:
            self._last.join()
            self._last.settle(failed=any(self._ranks.maximum([self._last.failed])))
        return self._start(step, state, metrics)

    def wait(self) -> None:
        """Return when everything asked for so far is durable.

        Raises SaveError, the first since the last `wait`, if something did not become durable.
        """
        saves = [*self._failed, self._last]
        self._failed, self._last = [], None
        for handle in saves:
            if handle is not None:
                handle.join()
        for handle in saves:
            if handle is not None:
                handle.wait()

    def close(self) -> None:
        """`wait`, and be done. Call it when training ends; `with` does."""
        self.wait()

    def _start(self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None) -> SaveHandle:
        attempt = self._claim()
        place = Place(self._root, step_path(attempt, step))
        handle = self._session.start(
            place,
            state,
            step=step,
            attempt=attempt_number(attempt),
            metrics=metrics,
            after=lambda: self._prune(place),
        )
        if self._last is not None and self._last.failed:
            self._failed.append(self._last)
        self._last = handle
        return handle

    def _claim(self) -> str:
        """The attempt of this job; rank 0 claims it the first time."""
        if self._attempt is None:
            error: Exception | None = None
            name = ""
            try:
                if self._ranks.rank == 0:
                    name = claim_attempt(self._root)
            except Exception as failure:
                error = failure
            agree(self._ranks, error)
            self._attempt = self._ranks.broadcast(name.encode()).decode()
        return self._attempt

    def _candidates(self) -> Iterator[Place]:
        """The run's good checkpoints, newest first; the same on every rank.

        Rank 0 looks, one at a time, and tells the others. Raises CorruptError if all are marked as bad.
        """
        places = iter_good(self._root)
        while True:
            error: Exception | None = None
            path = ""
            try:
                if self._ranks.rank == 0:
                    path = next((place.path for place in places), "")
            except Exception as failure:
                error = failure
            agree(self._ranks, error)
            path = self._ranks.broadcast(path.encode()).decode()
            if not path:
                return
            yield Place(self._root, path)

    def _prune(self, newest: Place) -> None:
        """Retention. A failure is logged only: the checkpoint is durable, and the next prune tries again."""
        if self._keep is None:
            return
        try:
            prune(self._root, self._keep, newest)
        except OSError as error:
            _log.warning("old checkpoints of %s could not be deleted: %s", self.url, error)


@dataclass
class _ProgressFile:
    """Tells the launcher how far this rank is; see docs/worker-contract.md."""

    path: str
    _descriptor: int | None = field(default=None, repr=False)

    @classmethod
    def of_worker(cls) -> _ProgressFile | None:
        path = os.environ.get("LAUNCH_PROGRESS_FILE")
        return cls(path) if path else None

    def write(self, step: int) -> None:
        """Best effort: progress is information, and training does not stop for it."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(self._descriptor, f"{step:20d} {time.time():20.6f}\n".encode(), 0)
        except OSError as error:
            _log.debug("%s cannot be written: %s", self.path, error)


def _load(place: Place, state: dict[str, Any], ranks: Ranks, *, strict: bool, started: float) -> Loaded:
    """Manifest, plan, fetch, verify, assemble, apply; on every rank or on none."""
    manifest = _shared_manifest(place, ranks)
    error: Exception | None = None
    targets = Targets()
    try:
        targets = bind(state, manifest, ranks.rank, strict=strict)
    except Exception as failure:  # of the state's own objects, too
        error = failure
    agree(ranks, error)
    nbytes = fill(place, manifest, targets.tensors, ranks)
    try:
        targets.apply()
    except ShardckptError as failure:
        error = failure
    agree(ranks, error)
    return Loaded(
        url=place.url,
        step=manifest.step,
        attempt=manifest.attempt,
        world_size=manifest.world_size,
        metrics=manifest.metric_values,
        nbytes=nbytes,
        seconds=time.monotonic() - started,
        missing=tuple(targets.missing),
        unexpected=tuple(targets.unexpected),
        unused=tuple(targets.unused),
        kept=tuple(targets.kept),
    )


def _shared_manifest(place: Place, ranks: Ranks) -> Manifest:
    """The manifest as rank 0 reads it, so that all ranks have the same and it is fetched once."""
    error: Exception | None = None
    data = b""
    try:
        if ranks.rank == 0:
            data = place.storage.read(MANIFEST)
            decode_manifest(data, place.url)
    except FileNotFoundError as failure:
        error = NotACheckpointError(
            f"{place.url} has no {MANIFEST}: no checkpoint is there, or it was deleted just now"
        )
        error.__cause__ = failure
    except Exception as failure:
        error = failure
    agree(ranks, error)
    return decode_manifest(ranks.broadcast(data), place.url)


def _mark_bad(place: Place, error: Exception) -> None:
    """Tell later readers that this checkpoint failed verification. Best effort."""
    record = json.dumps({"time": time.time(), "error": str(error)})
    try:
        place.storage.write(BAD, record.encode())
    except OSError as failure:
        _log.warning("%s could not be marked as bad: %s", place.url, failure)
