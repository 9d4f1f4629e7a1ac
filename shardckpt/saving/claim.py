"""The attempt of a job, as its ranks see it: begun in memory, claimed in the background, waited for by
`restore` only."""

from __future__ import annotations

import logging
import socket
import time
import weakref

import msgspec

from shardckpt.environment import JobEnvironment
from shardckpt.errors import OutOfReachError, RunInUseError, StorageError
from shardckpt.progress import alive
from shardckpt.ranks.waiting import wait_together
from shardckpt.ranks.world import Ranks
from shardckpt.run.attempt_keeper import Condition
from shardckpt.run.attempts import Attempt, find_claim
from shardckpt.run.lease import Holder, job_names
from shardckpt.run.places import Place, attempt_number, step_path
from shardckpt.saving.backend import JobAttempt
from shardckpt.saving.session import SaveSession
from shardckpt.storage import Storage

__all__ = ["LOOK_SECONDS", "RunClaim"]

_log = logging.getLogger("shardckpt")

LOOK_SECONDS = 5.0
"""How long `restore` waits for a storage that it can do without, since a snapshot is in memory."""

_AGAIN = 2.0  # seconds between two tries


class RunClaim:
    """An attempt of this job's. All ranks make one together, and no storage is asked for anything.

    Args:
        root: the run.
        newest: the number of the newest attempt of the run that is known to this rank.
        session: makes the saves, which are of this attempt from now on.
        is_restoring: whether `wait` is about to be called, which tells what is to be told until then.
    """

    def __init__(
        self, root: Storage, ranks: Ranks, session: SaveSession, newest: int, *, is_restoring: bool
    ) -> None:
        (base,) = ranks.maximum([newest])
        begun = b""
        if ranks.rank == 0:
            holder = Holder.of_this_process(job_names(JobEnvironment.read()))
            begun = msgspec.msgpack.encode(Attempt.begin(base, holder))
        self.attempt = msgspec.msgpack.decode(ranks.broadcast(begun), type=Attempt)
        self.newest_step = -1
        """The newest step that was saved."""
        self.name = ""
        """Of its folder in the run, once that is known here."""
        self._root = root
        self._ranks = ranks
        self._session = session
        self._is_told = False  # that the storage is out of reach
        self._noticed = ""  # what was told last of another job in the run
        self._is_looking = False  # whether that job is at work
        self._is_restoring = is_restoring
        self._is_known_out_of_reach = False
        note = weakref.WeakMethod(self._note)

        def tell(condition: Condition) -> None:
            if (is_heard := note()) is not None:
                is_heard(condition)

        session.adopt(JobAttempt(self.attempt, root, claims=ranks.rank == 0, tell=tell))

    @property
    def newest(self) -> int:
        """The highest number by which this attempt is known."""
        return max(attempt_number(self.attempt.name), attempt_number(self.name))

    def path(self, step: int) -> str:
        """The path of a save below the run, as the saver knows it."""
        return step_path(self.attempt.name, step)

    def place(self, root: Storage, step: int) -> Place:
        """Where a save will be, as far as that is known."""
        return Place(root, step_path(self.name or self.attempt.name, step))

    def wait(self, seconds: float, *, has_snapshot: bool) -> bool:
        """Return when the attempt is claimed, and all ranks see it. Collective, for `restore`.

        With a snapshot to go on from, this waits for a moment only, and returns False if the storage is out of
        reach; without, for `seconds`. Raises, on all ranks, OutOfReachError after that, and whatever else is
        wrong.
        """
        patience = LOOK_SECONDS if has_snapshot else seconds
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
            self._tell_out_of_reach(str(error) if error is not None else "")
            return False
        self._check_one_place(name, seconds)
        self.name = name
        self._session.learn(name)
        return True

    def _wait_claimed(self, patience: float, *, may_go_on: bool) -> str:
        """On rank 0: the name of the claimed folder; empty if there is none yet, and the job may go on
        without."""
        started = time.monotonic()
        while True:
            left = patience - (time.monotonic() - started)
            name = self._session.wait_claimed(max(0.0, min(1.0, left)), is_urgent=may_go_on)
            if name:
                break
            if may_go_on and (left <= 0 or self._is_known_out_of_reach):
                return ""
            if left <= 0 and not self._is_looking:
                raise OutOfReachError(
                    f"{self._root.url} has been out of reach for {patience:g} s, and no snapshot is "
                    f"in memory to go "
                    "on from. Check the storage and the network; restore waits longer with a larger url_timeout"
                )
            is_silent = not self._is_looking and patience - left > LOOK_SECONDS
            if is_silent and not may_go_on and not self._is_told:
                self._is_told = True
                _log.warning(
                    "%s is out of reach: restore waits for it, for up to %g s", self._root.url, patience
                )
        if self._is_told:
            self._is_told = False
            _log.warning("%s answers again", self._root.url)
        return name

    def _tell_out_of_reach(self, reason: str) -> None:
        if self._ranks.rank == 0 and not self._is_told:
            self._is_told = True
            _log.warning(
                "%s is out of reach%s: this job goes on from memory, and what it saves stays there "
                "until the storage "
                "answers",
                self._root.url,
                f" ({reason})" if reason else "",
            )

    def _note(self, condition: Condition) -> None:
        """What becomes of the claim; called by another thread, on rank 0's node."""
        if condition.name:
            self.name = condition.name
        self._is_known_out_of_reach = isinstance(condition.error, OutOfReachError)
        self._is_looking = bool(condition.notice) and not condition.name and condition.error is None
        if self._ranks.rank != 0:
            return
        if condition.notice:
            if condition.notice == self._noticed:
                return
            self._noticed = condition.notice
            (_log.error if condition.name else _log.warning)("%s", condition.notice)
        elif condition.name and self._is_told:
            self._is_told = False
            _log.warning("%s answers again: this job's saves go to %s", self._root.url, condition.name)
        elif self._is_known_out_of_reach and not self._is_told and not self._is_restoring:
            self._is_told = True
            _log.warning(
                "%s is out of reach: what is saved stays in memory until it answers: %s",
                self._root.url,
                condition.error,
            )

    def _check_one_place(self, name: str, seconds: float) -> None:
        """If ranks write to different places, there will never be a checkpoint. Raises the same on all ranks."""
        ranks = self._ranks
        if ranks.size == 1:
            return
        host = socket.gethostname()
        told = ranks.broadcast(msgspec.msgpack.encode((self._root.at(name).url, host)))
        url, first_host = msgspec.msgpack.decode(told, type=tuple[str, str])
        deadline = time.monotonic() + seconds
        while True:
            reason, is_passing = "", False
            if ranks.rank != 0:
                try:
                    find_claim(self._root, name, self.attempt)
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
            f"{reasons[blind[0]].decode()} ({len(blind)} of {ranks.size} ranks do not). A run needs a "
            f"URL that all "
            "nodes share: a folder of a network file system, or s3://bucket/run. Give it to `launch` "
            "as --ckpt, or to "
            "Checkpointer."
        )
