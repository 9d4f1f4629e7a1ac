"""Checkpointer: when to save, where to resume from, and what to keep."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from shardckpt import environment
from shardckpt.drain import Drained, DrainWatch, Request, Scope
from shardckpt.errors import SaveError, SaverError, public_api
from shardckpt.loading.load import Loaded
from shardckpt.loading.restore import RestoreCandidates
from shardckpt.loading.snapshots import find_snapshots
from shardckpt.progress import ProgressFile, now
from shardckpt.ranks.calls import Call, meet
from shardckpt.ranks.world import Ranks, agree, current_ranks
from shardckpt.run.attempts import run_of
from shardckpt.run.tiers import LOCAL, MEMORY, REMOTE, Destination, Tier, tier_name
from shardckpt.saver.client import SaverClient
from shardckpt.saving.backend import SaveBackend
from shardckpt.saving.claim import RunClaim
from shardckpt.saving.saver_backend import SaverBackend
from shardckpt.saving.session import COMMIT_TIMEOUT, SaveHandle, SaveSession
from shardckpt.saving.settings import check_cadence
from shardckpt.saving.thread_backend import ThreadBackend
from shardckpt.saving.unsaved import Failures, Unsaved
from shardckpt.storage import Storage, open_storage

__all__ = ["Checkpointer"]

_log = logging.getLogger("shardckpt")

_PROBE = 3.0  # seconds for a saver to answer before what must not be lost is entrusted to it
_NAMED = 4  # saves in a message
_SETTLED_AT_ONCE = 4  # saves of which all ranks learn in one call, as many as fit into what that tells

URL_TIMEOUT = 1800.0
"""Seconds that `restore` waits for a run that is out of reach, if there is nothing else to go on from."""


@dataclass(frozen=True)
class _DurableTier:
    """A tier of the run below memory."""

    tier: Tier
    root: Storage
    every: int | None

    @property
    def name(self) -> str:
        return self.tier.name

    def is_due(self, step: int) -> bool:
        return self.every is None or step % self.every == 0


_newest_claims: dict[tuple[str, int], weakref.ref[Checkpointer]] = {}
"""Of each run, and each rank in this process, the Checkpointer that has begun an attempt last."""


class Checkpointer:
    """A run's checkpoints: saves every so many steps, keeps the newest, resumes from the newest good one.

    Every rank makes one, with the same arguments, after `init_process_group` if there is one, and calls
    its methods together with the others. Saving does not hold up training for longer than a copy.

    A save is staged in the memory of the node's saver, a process that outlives the trainers, and goes from
    there to up to two durable tiers: `local`, a folder of this node, and `url`, the run. `restore` takes the
    newest that it finds, in any tier, and of several equal ones the nearest.

    Only `restore` asks a storage for anything, or waits for one: what a storage says of a save comes back through
    the save's handle. While it is out of reach, saves stay in memory, the newest in place of older ones, and are
    written when it answers.
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
        """Nothing is read or written yet.

        Args:
            url: the run: a folder, local or in object storage, and the same one on all nodes of the job. None:
                what `launch` says, in LAUNCH_CKPT_URL.
            every_steps: `step` saves when the number of steps done is a multiple of it. None: only
                `save` saves, and `close` the last step.
            url_every_steps: of these saves, the ones that go to `url`: a multiple of `every_steps`. None: all.
                A save that goes to no durable tier is a snapshot in memory; the last one of a job is
                persisted when the trainers are gone.
            local: a folder on this node's own disk, where saves are durable before they are at `url`. Only for
                a job on one node.
            local_every_steps: of the saves, the ones that go to `local`. None: all.
            keep_last: how many good checkpoints to keep in each durable tier; older ones are deleted. None: all.
            snapshots: how many saves this node's memory holds, each as large as what its ranks save. With 2, one
                can be staged while the one before is being persisted, and a crash in the middle of a copy leaves
                the one before. 0: no saver; saves are written by a thread of each trainer, and end with it;
                those that would go to no durable tier are left out.
                None: SHARDCKPT_SNAPSHOTS in the environment, or else 2.
            storage_options: arguments of the fsspec file system of `url`, such as `endpoint_url`.
            commit_timeout: seconds without any progress of another rank, or without an answer of a storage that
                is out of reach, after which a save has failed. Under `launch` a storage is waited for no longer
                than `--drain-timeout`; without a saver, no longer than each of its requests may take.
            url_timeout: seconds that `restore` waits for `url` if it is out of reach and no snapshot is in
                memory.

        Raises ValueError for an argument that makes no sense, and for the URL of a checkpoint in a run.
        """
        if url is None:
            url = environment.checkpoint_url()
            if not url:
                raise ValueError(
                    "Checkpointer needs a url: no url was given, and LAUNCH_CKPT_URL is not set, as it is "
                    "in a worker of `launch`"
                )
        check_cadence(every_steps, url_every_steps, local_every_steps, keep_last)
        if local is None and local_every_steps is not None:
            raise ValueError("local_every_steps needs local, the folder that these saves go to")
        held = environment.snapshots() if snapshots is None else snapshots
        if isinstance(held, bool) or held not in (0, 1, 2):
            raise ValueError(f"snapshots must be 0, 1 or 2; it is {held!r}")
        self._root = open_storage(url, storage_options)
        if (run := run_of(self._root.url)) is not None:
            raise ValueError(
                f"{self._root.url} is a checkpoint in a run, and not the run: give {run}, of which the newest "
                "checkpoint is resumed; to begin with this one, load it with shardckpt.load(url, state)"
            )
        name = tier_name(self._root) if local is None else REMOTE
        last = Tier(name, self._root.url, dict(storage_options or {}), keep_last)
        self._tiers = [_DurableTier(last, self._root, url_every_steps)]
        if local is not None:
            root = open_storage(local)
            near = Tier(LOCAL, root.url, {}, keep_last)
            self._tiers.insert(0, _DurableTier(near, root, local_every_steps))
            if self._tiers[0].root.url == self._root.url:
                raise ValueError(f"local and url are the same folder, {self._root.url}: leave local out")
        self._ranks: Ranks = current_ranks()
        self._every = every_steps
        self._timeout = commit_timeout
        self._patience = url_timeout
        sink: SaveBackend = ThreadBackend(commit_timeout)
        self._saver: SaverBackend | None = None
        if held and isinstance(url, str | os.PathLike):
            self._saver = self._saver_sink(held)
            sink = self._saver or sink
        self._session = SaveSession(self._ranks, commit_timeout, sink)
        self._claim: RunClaim | None = None
        self._is_prepared = False
        self._last: SaveHandle | None = None
        self._saves: list[SaveHandle] = []  # that may be under way, the same ones on every rank
        self._failures = Failures()
        self.url = self._root.url
        self._unsaved = Unsaved(self, self.url, tells=self._ranks.rank == 0)
        self._is_told = every_steps is not None  # that `step` does not save
        self._is_other_told = False  # that its saves go on in a newer attempt
        self._is_passing_over = False  # saves for which there is no memory, which is told
        self._has_left = False
        self._drain = DrainWatch.of_worker(self._ranks)
        self._progress = ProgressFile.of_worker()
        self._tell(joined=now(), world=self._ranks.size, steps=every_steps is not None or None)
        if self._drain is not None and self._drain.file.is_open:
            self._tell(drains=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._close(is_normal_end=True)
        else:  # without a goodbye to the saver: whoever trains on starts from what it has
            self._unsaved.arguments = None
            self._answer_no_more()

    @public_api
    def restore(self, state: dict[str, Any], *, strict: bool = True) -> Loaded | None:
        """Load the newest good checkpoint of the run into `state`, as `load` does. Collective.

        It is taken from where it is nearest: a snapshot in the memory of this job's nodes, of which every rank
        had staged its part; the local tier; the run's URL. Returns None for a run without checkpoints. A
        checkpoint that fails verification is reported, marked as bad and passed over; if there is no good
        one, its CorruptError is raised rather than starting from nothing. Also makes the next attempt's folder
        this job's own: call it before the first `step`. Where a rank does not see that folder, as on nodes
        that share no `url`, StorageError is raised on all ranks.

        Where `url` is out of reach, a snapshot in memory is taken at once, and the folder is made when `url`
        answers again; without a snapshot this waits for it, up to `url_timeout` seconds, and then raises
        StorageError. Raises RunInUseError if another job is at work in the run, which takes some seconds to
        find out, and NotACheckpointError if `url` is a checkpoint or an attempt's folder.
        """
        started = time.monotonic()
        self._unsaved.arguments = None
        meet(self._ranks, Call.RESTORE, 0)
        self._check_one_node()
        client = self._client()
        claim = self._begin_attempt(is_restoring=True)
        snapshots = find_snapshots(client, self._ranks)
        is_reachable = claim.wait(self._patience, has_snapshot=bool(snapshots))
        newest = RestoreCandidates(
            self.url,
            [(tier.name, tier.root) for tier in self._tiers],
            client,
            snapshots,
            self._ranks,
            patience=self._patience,
            is_reachable=is_reachable,
        )
        loaded = newest.load(state, strict=strict, started=started)
        self._tell(restored=now())
        if loaded is not None:
            self._tell(restored_step=loaded.step, restored_tier=loaded.tier)
        return loaded

    @public_api
    def step(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> SaveHandle | None:
        """Tell that `step` optimizer steps are done; saves if it is time to. Collective.

        The first call prepares: it plans, and gets memory in the background, so that no save has to.

        Returns the save's handle, or None if none was started: not now, or because those before take up all
        the memory there is for saves, which is logged. The step of the last call of all is saved by `close`,
        if nothing has saved it. Safe to change the state when it returns, if another call is to come; after the
        last one the state has to stay as it is until `close`. A save that fails in the background is logged, and
        raised by `wait`, or by `close` if no later save makes it good.

        Under `launch` this also tells how far training is, with `metrics["loss"]` if it is a number on the host;
        and where the launcher asks the job to leave, to be started again (a preemption, or ranks to be added or
        given up), all ranks save here after the same step and raise `Drained`, whatever `every_steps` says. They
        have to call this equally often for that. Raises RankMismatchError if ranks make different calls.
        """
        if self._progress is not None:
            self._progress.step(step, metrics.get("loss") if metrics else None)
        if self._drain is not None and (request := self._drain.poll()) is not None:
            raise self._leave(step, state, metrics, request)
        self._unsaved.arguments = (step, state, metrics)
        if self._every is None:
            self._tell_once(step)
            return None
        if not self._is_save_step(step):
            if not self._is_prepared:
                meet(self._ranks, Call.FIRST_STEP, step)
                self._session.prepare(state)
                self._is_prepared = True
            return None
        tiers = self._due(step)
        if not tiers and not self._session.outlives_trainer:
            return None  # there is no memory that would keep it
        can_stage = self._settle(Call.STEP, step)
        last = self._save_of(step)
        if last is not None and not self._session.has_changed(state, metrics):
            tiers = [tier for tier in tiers if tier.name not in last.tiers]
            if not tiers:
                self._unsaved.arguments = None
                return last
        if not can_stage and self._saves:  # with none under way, memory is about to be there
            if self._ranks.rank == 0 and not self._is_passing_over:
                _log.warning(
                    "no checkpoint at step %d: %s still being written; others are left out until there is memory "
                    "again, but the last step of all is saved at the end",
                    step,
                    _are([save.step for save in self._saves]),
                )
            self._is_passing_over = True
            return None
        return self._start(step, state, metrics, tiers)

    @public_api
    def save(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> SaveHandle:
        """Save now, whatever the step, to every tier. Collective. Waits for memory, if saves take it all up.

        Where this very state has just been saved at this step, it goes only to the tiers that do not have it;
        if they all have, its handle is returned. So a last save at the end of training needs no condition. No
        checkpoint is ever overwritten: a state or metrics that differ from what was saved at this step, and a
        step before the newest saved one, are saved in a new attempt of the run, which counts more.

        Raises StateError, and RankMismatchError if ranks make different calls.
        """
        self._is_told = True
        return self._save(Call.SAVE, step, state, metrics)

    def _save(
        self, call: Call, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None
    ) -> SaveHandle:
        last = self._save_of(step)
        if last is not None:
            last.join()
        self._settle(call, step)
        tiers: Sequence[_DurableTier] = self._tiers
        if last is not None and not self._session.has_changed(state, metrics):
            self._unsaved.arguments = None
            failed = dict(zip(last.tiers, last.failures, strict=True))
            tiers = [tier for tier in self._tiers if failed.get(tier.name, True)]
        return self._start(step, state, metrics, tiers) if tiers or last is None else last

    @public_api
    def wait(self) -> None:
        """Return when everything asked for so far is durable; at once after `Drained`.

        Raises SaveError, the first since the last `wait`, if something did not become durable.
        """
        if self._has_left:
            return
        self._finish_saves()
        failures, self._failures = self._failures, Failures()
        if failures.first is not None:
            failures.first.wait()

    @public_api
    def close(self) -> None:
        """Wait until everything asked for is over, and be done. Call it when training ends; `with` does.

        What the last call of `step` was given is saved now, if that call, or a `save` since, has not saved it.
        This is collective, and the state must not have changed since. Not so after a `restore`, nor on the way
        out of an error, which other ranks may not have.

        Raises what `save` raises about that state; and SaveError for a save that did not become durable, unless
        a later one did, in all tiers that it was to go to, or `wait` has told. Under `launch` that is logged
        and not raised, since nothing is to be trained again: the node's saver outlives this process and
        answers for the save, and `launch` ends with 74 if it does not become durable after all. What the saver
        cannot answer for, as for one that was lost with it, is raised.
        """
        self._close(is_normal_end=sys.exc_info()[0] is None)

    def _close(self, *, is_normal_end: bool) -> None:
        self._answer_no_more()
        if self._has_left:
            return  # without a goodbye to the saver, which has what the next round starts from
        try:
            try:
                if is_normal_end:
                    self._save_last()
            finally:
                self._unsaved.arguments = None
                self._session.limit_silence(environment.drain_timeout())
                self._finish_saves()
            self._tell_failures()
        finally:
            self._failures = Failures()
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
        self._session.probe(_PROBE)
        self._save(Call.CLOSE, step, state, metrics)

    def _tell_once(self, step: int) -> None:
        """Without a cadence a script may take `step` for what saves."""
        if not self._is_told and self._ranks.rank == 0:
            _log.warning(
                "step %d is not saved, nor are those after it: every_steps is not given, so that "
                "only `save` saves, and "
                "`close` the last step",
                step,
            )
        self._is_told = True

    def _finish_saves(self) -> None:
        """Wait for all saves under way, and note what became of them."""
        saves, self._saves = sorted(self._saves, key=lambda save: save.step), []
        for handle in saves:
            handle.join()
        for handle in saves:
            self._failures.note(handle, failed=handle.outcome() is not None)

    def _tell_failures(self) -> None:
        """Raise what has failed and is not made good, unless that is for the launcher to tell."""
        standing = self._failures.standing
        is_launchers = environment.saver_address() is not None and self._session.outlives_trainer
        for handle in standing:
            if not (is_launchers and handle.is_saver_answerable):
                handle.wait()
        if standing and environment.is_first_on_node():
            _log.error(
                "training is over, and not all that it saved is durable; launch tells what becomes of it"
            )

    # -- draining

    def _leave(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None, request: Request
    ) -> Drained:
        """Save, as all ranks were asked to, and be done. Returns what `step` is to raise. Collective."""
        is_saved = True
        try:
            self._session.probe(_PROBE)
            self._save_to_leave(step, state, metrics, request.scope)
        except Exception as error:  # whatever it is, to stay would not help
            is_saved = False
            _log.error(
                "step %d, after which the job drains, is not saved; the last checkpoint stands: %s: %s",
                step,
                type(error).__name__,
                error,
            )
        self._has_left = True
        self._unsaved.arguments = None
        if self._drain is not None:
            self._drain.close()
            self._drain = None
        if self._ranks.rank == 0 and is_saved:
            _log.info("step %d is saved, and the job drains (%s)", step, request.reason)
        return Drained(step, request.reason, is_saved=is_saved)

    def _save_to_leave(
        self, step: int, state: dict[str, Any], metrics: Mapping[str, float] | None, scope: Scope
    ) -> None:
        """Return when the state is safe from the end of this process: in the saver's memory, if there is one.

        Raises on all ranks if it failed on any.
        """
        self._session.prepare(state)  # after which all ranks know whether there is a saver
        handle = self._save_of(step)
        if handle is not None and self._session.has_changed(state, metrics):
            handle = None
        if scope is Scope.MEMORY and handle is None and self._session.outlives_trainer:
            handle = self._start(step, state, metrics, self._due(step))
        if handle is None or scope is Scope.DURABLE or not self._session.outlives_trainer:
            handle = self._save(Call.SAVE, step, state, metrics)
        # Other nodes may go on at once without this one, and find only what is durable.
        is_alone = environment.has_one_node()
        is_staging_enough = self._session.outlives_trainer and (is_alone or scope is Scope.MEMORY)
        error: SaveError | None = None
        try:
            handle.wait(MEMORY if is_staging_enough else None)
        except SaveError as failure:
            error = failure
        agree(self._ranks, error)

    def _answer_no_more(self) -> None:
        """Drain requests are somebody else's affair from here on."""
        if self._drain is not None:
            self._drain.close()
            self._drain = None
            self._tell(drains=None)

    def _tell(self, **facts: Any) -> None:
        if self._progress is not None:
            self._progress.tell(**facts)

    # -- saving

    def _is_save_step(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0 and step != 0

    def _due(self, step: int) -> list[_DurableTier]:
        """The durable tiers that `step` goes to by itself."""
        return [tier for tier in self._tiers if self._is_save_step(step) and tier.is_due(step)]

    def _save_of(self, step: int) -> SaveHandle | None:
        """The last save, if it was of this step."""
        return self._last if self._last is not None and self._last.step == step else None

    def _start(
        self,
        step: int,
        state: dict[str, Any],
        metrics: Mapping[str, float] | None,
        tiers: Sequence[_DurableTier],
    ) -> SaveHandle:
        """Start a save, in a new attempt if this one's checkpoints or their order would be in its way.
        Collective."""
        claim = self._claim
        if claim is None:
            self._check_one_node()
        if claim is None or step < claim.newest_step or not self._is_free(step, tiers):
            claim = self._begin_attempt()
        self._unsaved.arguments = None
        self._is_passing_over = False
        self._tell_of_other(step)
        handle = self._session.start(
            claim.path(step),
            [Destination(tier.tier, claim.place(tier.root, step)) for tier in tiers],
            state,
            step=step,
            attempt=claim.newest,
            metrics=metrics,
        )
        claim.newest_step = step
        self._last = handle
        self._saves.append(handle)
        return handle

    def _tell_of_other(self, step: int) -> None:
        """Two of a process that save into one run by turns are each right alone, but only one is resumed."""
        newest = _newest_claims.get((self.url, self._ranks.rank), lambda: self)()
        if newest not in (self, None) and self._ranks.rank == 0 and not self._is_other_told:
            _log.warning(
                "step %d is saved, but not resumed from: another Checkpointer of this process has begun a newer "
                "attempt of %s, which `restore` takes. Use one Checkpointer for a run, or a URL for each",
                step,
                self.url,
            )
            self._is_other_told = True

    def _is_free(self, step: int, tiers: Sequence[_DurableTier]) -> bool:
        """Whether this attempt's last save is in none of these tiers, or is of another step."""
        last = self._save_of(step)
        if last is None:
            return True
        failed = dict(zip(last.tiers, last.failures, strict=True))
        return all(failed.get(tier.name, True) for tier in tiers)

    def _begin_attempt(self, *, is_restoring: bool = False) -> RunClaim:
        """A new attempt, which what is saved from now on is of. Collective; no storage is asked for anything."""
        known = self._claim.newest if self._claim is not None else 0
        if self._saver is not None:
            known = max(known, self._saver.newest)
        _newest_claims[self.url, self._ranks.rank] = weakref.ref(self)
        self._claim = RunClaim(self._root, self._ranks, self._session, known, is_restoring=is_restoring)
        self._last = None
        return self._claim

    def _settle(self, call: Call, step: int) -> bool:
        """Have all ranks know what became of the saves under way; whether all could stage another now.

        Raises RankMismatchError if they make different calls.
        """
        told: list[int] = [not self._session.is_ready]
        settled, left = self._saves[:_SETTLED_AT_ONCE], self._saves[_SETTLED_AT_ONCE:]
        for save in settled:
            told += [save.busy, *save.failures]
        outcomes = iter(meet(self._ranks, call, step, told))
        not_ready = next(outcomes)
        for save in settled:
            busy, *failures = (bool(outcome) for outcome in islice(outcomes, 1 + len(save.tiers)))
            if busy:
                left.append(save)
                continue
            save.settle(failures)
            self._failures.note(save, failed=any(failures))
        self._saves = left
        return not not_ready

    def _saver_sink(self, snapshots: int) -> SaverBackend | None:
        """Saves by the node's saver, unless another process cannot open the storage as this one does."""
        if self._root.url.startswith("memory://"):
            return None
        tiers = [tier.tier for tier in self._tiers]
        try:
            msgspec.msgpack.encode(tiers)
        except TypeError as error:
            _log.warning(
                "snapshots=0: storage_options cannot be told to the saver, so saves are written by the "
                "trainers, and end with them: %s",
                error,
            )
            return None
        linger = environment.saver_linger()
        return SaverBackend(
            self._root.url, tiers, snapshots, self._timeout, linger, environment.drain_timeout()
        )

    def _check_one_node(self) -> None:
        """What one node's disk has is no checkpoint if another's has the rest of it."""
        if len(self._tiers) == 1:
            return
        nodes = self._ranks.gather(_node().encode())
        if len(set(nodes)) > 1:
            raise ValueError(
                f"local={self._tiers[0].root.url!r} is for a job on one node, and this one is on "
                f"{len(set(nodes))}: leave it out; snapshots in memory are kept on each node"
            )

    # -- restoring

    def _client(self) -> SaverClient | None:
        """The node's saver, if it can be reached."""
        if self._saver is None:
            return None
        try:
            return self._saver.connect()
        except SaverError as error:
            _log.warning("no snapshots in memory: %s", error)
            return None


def _are(steps: Sequence[int]) -> str:
    """`step 4 is`, `steps 4 and 8 are`; of many, the newest."""
    steps = sorted(steps)
    if len(steps) > _NAMED:
        return f"steps {', '.join(map(str, steps[-_NAMED:]))} and {len(steps) - _NAMED} before them are"
    *others, last = map(str, steps)
    return f"steps {', '.join(others)} and {last} are" if others else f"step {last} is"


def _node() -> str:
    """Equal for two processes only if they are on the same machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"
