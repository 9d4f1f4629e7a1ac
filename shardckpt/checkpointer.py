"""Checkpointer: when to save, where to resume from, and what to keep."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from shardckpt.errors import (
    CheckpointError,
    CorruptError,
    FormatError,
    NotACheckpointError,
    UnknownVersionError,
)
from shardckpt.loading import Loaded, load_place
from shardckpt.progress import ProgressFile
from shardckpt.ranks import agree, current_ranks
from shardckpt.retention import prune
from shardckpt.runs import (
    BAD,
    Place,
    attempt_number,
    claim_attempt,
    iter_good,
    step_path,
)
from shardckpt.saving import COMMIT_TIMEOUT, SaveHandle, SaveSession
from shardckpt.storage import Storage, open_storage

__all__ = ["Checkpointer"]

_log = logging.getLogger("shardckpt")


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
        commit_timeout: float = COMMIT_TIMEOUT,
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
        self._progress = ProgressFile.of_worker()
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
                loaded = load_place(place, state, self._ranks, strict=strict, started=started)
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
        busy, failed = self._ranks.maximum(
            [last is not None and last.busy, last is not None and last.failed]
        )
        if busy:
            if self._ranks.rank == 0 and last is not None:
                _log.warning(
                    "no checkpoint at step %d: the one of step %d is still being written", step, last.step
                )
            return None
        if last is not None:
            last.settle(failed=bool(failed))
        return self._start(step, state, metrics)

    def save(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> SaveHandle:
        """Save now, whatever the step. Collective. Waits first for a save that is still under way.

        Where this step has just been saved, its handle is returned, so that a last save at the end of
        training needs no condition.
        """
        last = self._last
        if last is not None:
            last.join()
        failed, other = self._ranks.maximum(
            [last is not None and last.failed, last is None or last.step != step]
        )
        if last is not None:
            last.settle(failed=bool(failed))
            if not failed and not other:
                return last
        return self._start(step, state, metrics)

    def wait(self) -> None:
        """Return when everything asked for so far is durable.

        Raises SaveError, the first since the last `wait`, if something did not become durable.
        """
        last, saves = self._last, [*self._failed, self._last]
        self._failed, self._last = [], None
        for handle in saves:
            if handle is not None:
                handle.join()
        for handle in saves:
            if handle is not None:
                handle.wait()
        self._last = last

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


def _mark_bad(place: Place, error: Exception) -> None:
    """Tell later readers that this checkpoint failed verification. Best effort."""
    record = json.dumps({"time": time.time(), "error": str(error)})
    try:
        place.storage.write(BAD, record.encode())
    except OSError as failure:
        _log.warning("%s could not be marked as bad: %s", place.url, failure)
