"""Checkpointer: when to save, where to resume from, and what to keep."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from shardckpt import environment
from shardckpt.drain import Drained, DrainWatch, Request, Scope
from shardckpt.errors import public_api
from shardckpt.loading.load import Loaded
from shardckpt.loading.restore import RestoreCandidates
from shardckpt.loading.snapshots import find_snapshots
from shardckpt.progress import ProgressFile, now
from shardckpt.ranks.calls import Call, meet
from shardckpt.ranks.world import current_ranks
from shardckpt.saving.policy import SaveSchedule, check_count
from shardckpt.saving.run_saves import RunSaves
from shardckpt.saving.run_tiers import check_one_node, open_run, open_tiers
from shardckpt.saving.saver_backend import SaverBackend, connect_saver, make_saver_backend
from shardckpt.saving.session import COMMIT_TIMEOUT, SaveHandle, SaveSession
from shardckpt.saving.unsaved import UnsavedStep
from shardckpt.storage import Storage

__all__ = ["Checkpointer"]

_log = logging.getLogger("shardckpt")

URL_TIMEOUT = 1800.0
"""Seconds that `restore` waits for a run that is out of reach, if there is nothing else to go on from."""


class Checkpointer:
    """The checkpoints of a run: saves every so many steps, keeps the newest, resumes from the newest good one.

    Every rank makes one with the same arguments, after `init_process_group` if there is one, and calls its
    methods together with the other ranks. Training waits only for a copy of the state in memory.

    A save is staged in the memory of the node's saver, a process that outlives the trainers, and goes from there
    to up to two durable tiers: `local`, a folder of this node, and `url`, the run. `restore` takes the newest
    checkpoint of any tier, and of several equal ones the nearest.

    Only `restore` asks a storage for anything or waits for one; what a storage answers to a save comes back
    through the save's handle. While a storage is out of reach, saves stay in memory, the newest in place of older
    ones, and are written when it answers.

    >>> import shardckpt, torch
    >>> state = {"weight": torch.zeros(3), "step": 0}
    >>> with shardckpt.Checkpointer("memory://example/run", every_steps=2) as checkpointer:
    ...     loaded = checkpointer.restore(state)  # None: the run is new
    ...     for step in range(state["step"] + 1, 6):
    ...         state["weight"] += 1
    ...         state["step"] = step
    ...         handle = checkpointer.step(step, state, {"loss": 1 / step})
    >>> shardckpt.Checkpointer("memory://example/run").restore(state).step  # saved by the end of `with`
    5
    """

    @public_api
    def __init__(
        self,
        url: str | os.PathLike[str] | Storage | None = None,
        *,
        every_steps: int | None = None,
        url_every_steps: int | None = None,
        local: str | os.PathLike[str] | None = None,
        local_every_steps: int | None = None,
        keep_last: int | None = None,
        snapshots: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        commit_timeout: float = COMMIT_TIMEOUT,
        url_timeout: float = URL_TIMEOUT,
    ) -> None:
        """Check the arguments. Nothing is read or written yet.

        Args:
            url: the run: a folder, local or in object storage, the same for all nodes of the job. None:
                LAUNCH_CKPT_URL, which `launch` sets.
            every_steps: `step` saves when the number of optimizer steps is a multiple of it. None: only `save`
                saves, and `close` the last step.
            url_every_steps: those of these saves that go to `url`: a multiple of `every_steps`. None: all. A save
                that goes to no durable tier is a snapshot in memory; the saver persists the last one of a job
                when the trainers have ended.
            local: a folder on this node's own disk, where saves are durable before they are at `url`. Only for a
                job on one node.
            local_every_steps: those of the saves that go to `local`: a multiple of `every_steps`. None: all.
            keep_last: how many good checkpoints each durable tier keeps; older ones are deleted. None: all.
            snapshots: how many saves this node's memory holds, each as large as what its ranks save. With 2, one
                can be staged while the one before is persisted, and a crash during a copy leaves the one before.
                0: no saver; a thread of each trainer writes the saves, which end with it, and saves that would go
                to no durable tier are left out. None: SHARDCKPT_SNAPSHOTS in the environment, or else 2.
            storage_options: arguments of the fsspec file system of `url`, such as `endpoint_url`.
            commit_timeout: seconds without progress of another rank, or without an answer of a storage that is
                out of reach, after which a save has failed. Under `launch` a storage is waited for no longer than
                `--drain-timeout`; without a saver, no longer than each of its requests may take.
            url_timeout: seconds that `restore` waits for `url` if it is out of reach and there is no snapshot.

        Raises ValueError for an argument that makes no sense, and for the URL of a checkpoint in a run.
        """
        schedule = SaveSchedule.every_steps(every_steps, url=url_every_steps, local=local_every_steps)
        check_count("keep_last", keep_last)
        if local is None and local_every_steps is not None:
            raise ValueError("local_every_steps needs local, the folder that these saves go to")
        held = _checked_snapshots(snapshots)
        root = open_run(url, storage_options)
        self.url = root.url
        self._tiers = open_tiers(root, local, schedule, keep_last=keep_last, options=storage_options)
        self._ranks = current_ranks()
        self._patience = url_timeout
        self._saver: SaverBackend | None = None
        if held and isinstance(url, str | os.PathLike | None):  # no other process can be given a Storage
            tiers = [tier.tier for tier in self._tiers]
            self._saver = make_saver_backend(root.url, tiers, held, commit_timeout)
        self._session = SaveSession(self._ranks, commit_timeout, self._saver)
        self._unsaved = UnsavedStep(self, self.url, logs=self._ranks.rank == 0)
        self._saves = RunSaves(root, self._tiers, schedule, self._session, self._saver, self._unsaved)
        self._has_cadence = every_steps is not None
        self._is_prepared = False
        self._has_left = False
        self._drain = DrainWatch.of_worker(self._ranks)
        self._progress = ProgressFile.of_worker()
        self._tell(joined=now(), world=self._ranks.size, steps=self._has_cadence or None)
        if self._drain is not None and self._drain.file.is_open:
            self._tell(drains=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._close(is_normal_end=True)
        else:  # without a goodbye to the saver: the next round starts from what it holds
            self._unsaved.forget()
            self._ignore_drain_requests()

    @public_api
    def restore(self, state: dict[str, Any], *, strict: bool = True) -> Loaded | None:
        """Load the newest good checkpoint of the run into `state`, as `load` does. Collective.

        Also begins the next attempt, to which later saves belong: call it before the first `step`. After a
        checkpoint that has all of the state, memory for the next saves is made ready in the background.

        The checkpoint is taken from the nearest place that has it: a snapshot in the memory of this job's nodes,
        if every rank had staged its part; the local tier; the run's URL. A checkpoint that fails verification is
        logged, marked as bad and passed over. Where `url` is out of reach, a snapshot is taken at once, and the
        attempt is claimed when `url` answers; without a snapshot this waits for `url`.

        Args:
            state: what `step` is given: tensors, modules, optimizers and plain values by name. Filled in place.
            strict: False: skip names that only the state or only the checkpoint has; the result lists them.

        Returns what was loaded; None for a run without checkpoints.

        Raises, on all ranks:
            StorageError: a rank does not see the attempt's folder, as on nodes that share no `url`; or `url` has
                been out of reach for `url_timeout` seconds, and there is no snapshot.
            RunInUseError: another job is at work in the run, which takes some seconds to find out.
            NotACheckpointError: `url` is a single checkpoint, or the folder of an attempt.
            CorruptError: there are checkpoints, and none is good.
            StateError: the checkpoint does not fit `state`.

        `state` is filled while the checkpoint is verified. After an error it is unchanged, unless the text says
        that it is partly loaded, and names its entries: do not go on with them.
        """
        started = time.monotonic()
        self._unsaved.forget()
        meet(self._ranks, Call.RESTORE, 0)
        check_one_node(self._tiers, self._ranks)
        client = connect_saver(self._saver)
        claim = self._saves.begin_attempt(is_restoring=True)
        snapshots = find_snapshots(client, self._ranks)
        is_reachable = claim.wait(self._patience, has_snapshot=bool(snapshots))
        candidates = RestoreCandidates(
            self.url,
            [(tier.name, tier.root) for tier in self._tiers],
            client,
            snapshots,
            self._ranks,
            patience=self._patience,
            is_reachable=is_reachable,
        )
        loaded = candidates.load(state, strict=strict, started=started)
        self._tell(restored=now())
        if loaded is not None:
            self._tell(restored_step=loaded.step, restored_tier=loaded.tier)
            if loaded.is_complete:
                self._saves.expect(loaded.nbytes, loaded.total_nbytes)
        return loaded

    @public_api
    def step(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> SaveHandle | None:
        """Report that `step` optimizer steps are done, and save if it is time to. Collective.

        The first call plans, and gets memory in the background, so that no save has to. A save that fails in the
        background is logged; `wait` raises it, and so does `close` if no later save makes it good.

        Under `launch` this also reports progress. Where the launcher asks the job to leave, to be started again
        (a preemption, or ranks to be added or given up), all ranks save here after the same step and raise
        `Drained`, whatever `every_steps` says. They have to call this equally often for that.

        Args:
            step: optimizer steps done, of the whole run.
            state: what is saved. It may change when this returns. Not so after the last call: `close` saves the
                state if nothing has, and it has to stay as it is until then.
            metrics: numbers by name, which are stored with the checkpoint; `launch` shows `metrics["loss"]` if it
                is a number on the host.

        Returns the save's handle; None if none was started: it is not time to, or earlier saves take up all the
        memory that there is for saves, which is logged. Raises StateError, and RankMismatchError if ranks make
        different calls.
        """
        if self._progress is not None:
            self._progress.step(step, metrics.get("loss") if metrics else None)
        if self._drain is not None and (request := self._drain.poll()) is not None:
            raise self._leave(step, state, metrics, request)
        self._unsaved.arguments = (step, state, metrics)
        if not self._has_cadence:
            self._unsaved.warn_once()
        elif self._saves.is_due(step):
            return self._saves.save_if_due(step, state, metrics)
        elif not self._is_prepared:
            meet(self._ranks, Call.FIRST_STEP, step)
            self._session.prepare(state)
            self._is_prepared = True
        return None

    @public_api
    def save(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> SaveHandle:
        """Save now, whatever the step, to every tier. Collective. Waits while saves take up all memory.

        Where this very state has just been saved at this step, it goes only to the tiers that do not have it; if
        all have it, its handle is returned. So a last save at the end of training needs no condition. No
        checkpoint is ever overwritten: a step that was saved with another state or other metrics, and a step
        before the newest saved one, are saved in a new attempt of the run, which counts more.

        Args:
            step: optimizer steps done, of the whole run.
            state: what is saved. It may change when this returns.
            metrics: numbers by name, which are stored with the checkpoint.

        Raises StateError, and RankMismatchError if ranks make different calls.
        """
        self._unsaved.knows_save()
        return self._saves.save(Call.SAVE, step, state, metrics)

    @public_api
    def wait(self) -> None:
        """Return when everything asked for so far is durable; at once after `Drained`.

        Raises SaveError, the first since the last `wait`, if something did not become durable.
        """
        if not self._has_left:
            self._saves.pending.finish()
            self._saves.pending.raise_first()

    @public_api
    def close(self) -> None:
        """Wait until everything asked for is over, and be done. Call it when training ends; `with` does.

        Saves what the last call of `step` was given, if nothing has saved it: this is collective, and the state
        must not have changed since. Not so after a `restore`, nor on the way out of an error, which other ranks
        may not have.

        Raises what `save` raises about that state; and SaveError for a save that did not become durable, unless a
        later one did in the same tiers, or `wait` has raised it. Under `launch` that is logged and not raised,
        since nothing is to be trained again: the node's saver outlives this process and answers for the save, and
        `launch` ends with 74 if it does not become durable after all. What the saver cannot answer for, such as a
        save that was lost with it, is raised.
        """
        self._close(is_normal_end=sys.exc_info()[0] is None)

    def _close(self, *, is_normal_end: bool) -> None:
        self._ignore_drain_requests()
        if self._has_left:
            return  # without a goodbye to the saver, which holds what the next round starts from
        pending = self._saves.pending
        try:
            try:
                if is_normal_end:
                    self._save_last()
            finally:
                self._unsaved.forget()
                self._session.limit_silence(environment.drain_timeout())
                pending.finish()
            has_launcher = environment.saver_address() is not None
            pending.raise_standing(is_launchers=has_launcher and self._session.outlives_trainer)
        finally:
            pending.forget_failures()
            self._session.close()
            if self._progress is not None:
                self._progress.over()

    def _save_last(self) -> None:
        """Save what the last call of `step` was given, if nothing has. Waits for memory, as `save` does."""
        if self._unsaved.arguments is None:
            return
        step, state, metrics = self._unsaved.arguments
        if step == 0:  # nothing was trained, so nothing is lost
            return
        if self._ranks.rank == 0:
            _log.info("step %d is saved at the end", step)
        self._saves.save_last(step, state, metrics)

    def _leave(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None, request: Request
    ) -> Drained:
        """Save, as all ranks were asked to, and be done. Returns what `step` is to raise. Collective."""
        is_durable = request.scope is Scope.DURABLE
        is_saved = self._saves.save_before_exit(step, state, metrics, is_durable=is_durable)
        self._has_left = True
        self._unsaved.forget()
        if self._drain is not None:
            self._drain.close()
            self._drain = None
        if self._ranks.rank == 0 and is_saved:
            _log.info("step %d is saved, and the job drains (%s)", step, request.reason)
        return Drained(step, request.reason, is_saved=is_saved)

    def _ignore_drain_requests(self) -> None:
        """Leave drain requests to others from here on, and tell the launcher so."""
        if self._drain is not None:
            self._drain.close()
            self._drain = None
            self._tell(drains=None)

    def _tell(self, **facts: Any) -> None:
        """Report facts of the worker contract, under a launcher."""
        if self._progress is not None:
            self._progress.tell(**facts)


def _checked_snapshots(snapshots: int | None) -> int:
    """Return how many snapshots a node holds; raise ValueError for a number that makes no sense."""
    number = environment.snapshots() if snapshots is None else snapshots
    if isinstance(number, bool) or number not in (0, 1, 2):
        raise ValueError(f"snapshots must be 0, 1 or 2; it is {number!r}")
    return number
