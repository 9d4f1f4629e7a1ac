"""The attempt that a job saves as: begun in memory, claimed in storage in the background.

Only `restore` waits for the claim. Saves do not: their backend learns the name of the attempt's folder when the
storage answers.
"""

from __future__ import annotations

import logging
import socket
import time
import weakref
from collections.abc import Sequence

import msgspec

from shardckpt.environment import JobEnvironment
from shardckpt.errors import OutOfReachError, RunInUseError, StorageError
from shardckpt.progress import alive
from shardckpt.ranks.waiting import wait_together
from shardckpt.ranks.world import Ranks
from shardckpt.run.attempt_keeper import Condition
from shardckpt.run.attempts import SHOWN_WITHIN, Attempt, find_claim
from shardckpt.run.lease import Holder, job_names
from shardckpt.run.places import Place, attempt_number, step_path
from shardckpt.saving.backend import JobAttempt
from shardckpt.saving.handle import SaveHandle
from shardckpt.saving.session import SaveSession
from shardckpt.storage import Storage

__all__ = ["RunClaim"]

_log = logging.getLogger("shardckpt")

_LOOK_SECONDS = 5.0
"""How long `restore` waits for a storage that it can do without, since a snapshot is in memory."""

_AGAIN = 2.0  # seconds between two tries


class RunClaim:
    """An attempt of this job. All ranks make one together; no storage is asked for anything.

    Args:
        root: the run.
        ranks: the world.
        session: makes the saves, which belong to this attempt from now on.
        newest: the number of the newest attempt of the run that this rank knows of; 0 for none.
        is_restoring: True if `wait` is called next, which then logs an outage of the storage.
        look_seconds: how long `wait` waits for a storage that it can do without.

    Attributes:
        attempt: the attempt as it began, by which its ranks and savers know it.
        name: the name of its folder in the run; empty until that is known here.
        steps: the steps that it has saved, oldest first.
        last: the save that was started last; None if there is none.
    """

    def __init__(
        self,
        root: Storage,
        ranks: Ranks,
        session: SaveSession,
        newest: int,
        *,
        is_restoring: bool,
        look_seconds: float = _LOOK_SECONDS,
    ) -> None:
        (base,) = ranks.maximum([newest])
        begun = b""
        if ranks.rank == 0:
            holder = Holder.of_this_process(job_names(JobEnvironment.read()))
            begun = msgspec.msgpack.encode(Attempt.begin(base, holder))
        self.attempt = msgspec.msgpack.decode(ranks.broadcast(begun), type=Attempt)
        self.name = ""
        self.steps: list[int] = []
        self.last: SaveHandle | None = None
        self._root = root
        self._ranks = ranks
        self._session = session
        self._look_seconds = look_seconds
        self._has_logged_outage = False
        self._notice = ""  # logged last, about another job in the run
        self._is_checking_other_job = False
        self._is_restoring = is_restoring
        self._is_known_out_of_reach = False
        note = weakref.WeakMethod(self._note)

        def tell(condition: Condition) -> None:
            if (method := note()) is not None:
                method(condition)

        session.adopt(JobAttempt(self.attempt, root, claims=ranks.rank == 0, tell=tell))

    @property
    def newest(self) -> int:
        """The highest number by which this attempt is known."""
        return max(attempt_number(self.attempt.name), attempt_number(self.name))

    def add(self, save: SaveHandle) -> None:
        """Record a save that has been started in this attempt."""
        self.last = save
        if self.steps[-1:] != [save.step]:
            self.steps.append(save.step)

    def save_of(self, step: int) -> SaveHandle | None:
        """Return the last save, if it is of this step."""
        return self.last if self.last is not None and self.last.step == step else None

    def has_room(self, step: int, tiers: Sequence[str]) -> bool:
        """Return True if a save of `step` in these tiers would come after all others, and overwrite none."""
        if self.steps and step < self.steps[-1]:
            return False
        last = self.save_of(step)
        return last is None or all(last.lacks(tier) for tier in tiers)

    def path(self, step: int) -> str:
        """Return the path of a save below the run, as savers know it."""
        return step_path(self.attempt.name, step)

    def place(self, root: Storage, step: int) -> Place:
        """Return where a save will be, as far as that is known yet."""
        return Place(root, step_path(self.name or self.attempt.name, step))

    def wait(self, seconds: float, *, has_snapshot: bool) -> bool:
        """Wait until the attempt is claimed and all ranks see it. Collective, for `restore`.

        Args:
            seconds: how long to wait for a storage that is out of reach.
            has_snapshot: True if the job can go on from a snapshot in memory: then this waits for a moment only.

        Returns False if there is a snapshot and the storage is out of reach. Raises, on all ranks,
        OutOfReachError if there is none, and whatever else is wrong with the run.
        """
        patience = self._look_seconds if has_snapshot else seconds
        error: BaseException | None = None
        name = ""
        try:
            name = wait_together(
                self._ranks,
                lambda: self._wait_claimed(patience, may_go_on=has_snapshot),
                f"waiting for {self._root.url}",
            )
        except StorageError as failure:
            error = failure
        finally:
            self._is_restoring = False
        if error is not None and (not has_snapshot or isinstance(error, RunInUseError)):
            raise error
        if not name:
            self._log_going_on(str(error) if error is not None else "")
            return False
        self._check_one_place(name, seconds)
        self.name = name
        self._session.learn(name)
        return True

    def _wait_claimed(self, patience: float, *, may_go_on: bool) -> str:
        """Return, on rank 0, the name of the claimed folder; empty if there is none yet and the job may go on."""
        started = time.monotonic()
        while True:
            left = patience - (time.monotonic() - started)
            name = self._session.wait_claimed(max(0.0, min(1.0, left)), is_urgent=may_go_on)
            if name:
                break
            if may_go_on and (left <= 0 or self._is_known_out_of_reach):
                return ""
            if left <= 0 and not self._is_checking_other_job:
                raise OutOfReachError(
                    f"{self._root.url} has been out of reach for {patience:g} s, and no snapshot is in memory "
                    "to go on from. Check the storage and the network; restore waits longer with a larger "
                    "url_timeout"
                )
            is_silent = not self._is_checking_other_job and patience - left > self._look_seconds
            if is_silent and not may_go_on and not self._has_logged_outage:
                self._has_logged_outage = True
                _log.warning(
                    "%s is out of reach: restore waits for it, for up to %g s", self._root.url, patience
                )
        if self._has_logged_outage:
            self._has_logged_outage = False
            _log.warning("%s answers again", self._root.url)
        return name

    def _log_going_on(self, reason: str) -> None:
        if self._ranks.rank == 0 and not self._has_logged_outage:
            self._has_logged_outage = True
            _log.warning(
                "%s is out of reach%s: this job goes on from memory, and what it saves stays there "
                "until the storage answers",
                self._root.url,
                f" ({reason})" if reason else "",
            )

    def _note(self, condition: Condition) -> None:
        """Take in what becomes of the claim. Called by another thread, on the node of rank 0."""
        if condition.name:
            self.name = condition.name
        self._is_known_out_of_reach = isinstance(condition.error, OutOfReachError)
        self._is_checking_other_job = (
            bool(condition.notice) and not condition.name and condition.error is None
        )
        if self._ranks.rank != 0:
            return
        if condition.notice:
            if condition.notice == self._notice:
                return
            self._notice = condition.notice
            (_log.error if condition.name else _log.warning)("%s", condition.notice)
        elif condition.name and self._has_logged_outage:
            self._has_logged_outage = False
            _log.warning("%s answers again: this job's saves go to %s", self._root.url, condition.name)
        elif self._is_known_out_of_reach and not self._has_logged_outage and not self._is_restoring:
            self._has_logged_outage = True
            _log.warning(
                "%s is out of reach: what is saved stays in memory until it answers: %s",
                self._root.url,
                condition.error,
            )

    def _check_one_place(self, name: str, seconds: float) -> None:
        """Raise StorageError, on all ranks, if a rank does not see the claim: its saves would go elsewhere."""
        ranks = self._ranks
        if ranks.size == 1:
            return
        host = socket.gethostname()
        first = ranks.broadcast(msgspec.msgpack.encode((self._root.at(name).url, host)))
        url, first_host = msgspec.msgpack.decode(first, type=tuple[str, str])
        deadline = time.monotonic() + seconds
        while True:
            reason, is_passing = "", False
            if ranks.rank != 0:
                try:
                    find_claim(self._root, name, self.attempt, within=min(SHOWN_WITHIN, seconds))
                except Exception as error:
                    reason = f"on {host} does not see it: {error}"
                    is_passing = isinstance(error, OutOfReachError) and time.monotonic() < deadline
            reasons = ranks.gather(reason.encode(errors="replace"))
            blind = [rank for rank, text in enumerate(reasons) if text]
            if not blind:
                return
            if not any(ranks.maximum([is_passing])):
                break
            alive()
            time.sleep(_AGAIN)
        raise StorageError(
            f"not all ranks see the same run: rank 0 on {first_host} has made {url}, but rank {blind[0]} "
            f"{reasons[blind[0]].decode()} ({len(blind)} of {ranks.size} ranks do not). A run needs a URL that "
            "all nodes share: a folder of a network file system, or s3://bucket/run. Give it to `launch` as "
            "--ckpt, or to Checkpointer."
        )
