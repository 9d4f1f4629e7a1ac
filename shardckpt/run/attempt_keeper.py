"""Keeping an attempt: it is claimed in the background, however long the storage is out of reach, and its lease
renewed.

The process that persists an attempt's saves has a keeper of it: the node's saver, or the trainer where there is
none. Rank 0's keeper claims the attempt; the others find the claim in the storage, so no trainer need live for
it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from shardckpt.errors import OutOfReachError, SupersededError
from shardckpt.run.attempts import Attempt, claim_attempt, find_attempt
from shardckpt.run.lease import LEASE, Lease, Terms, read_lease
from shardckpt.run.places import ATTEMPT, attempt_number, attempts_in
from shardckpt.storage import Storage

__all__ = ["AttemptKeeper", "Condition"]

_log = logging.getLogger("shardckpt")

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0
_LOOK_EVERY = 0.5  # seconds between two looks whether it is still worth waiting


@dataclass(frozen=True)
class Condition:
    """How an attempt stands.

    Attributes:
        name: of its folder in the run; empty until it is claimed.
        error: why the last try to claim it failed, if it did.
        notice: for the job's users.
    """

    name: str = ""
    error: BaseException | None = None
    notice: str = ""


class AttemptKeeper:
    """Finds an attempt's claim; or, once told to `claim`, makes it and renews the lease.

    Args:
        attempt: the attempt.
        opener: opens the run's storage. Called by the keeper's thread.
        after: the keeper of the attempt before, which has to get its place first.
        tell: called with each new condition, by the keeper's thread.
        is_wanted: True while trainers of the attempt live.
        terms: of the lease.
    """

    def __init__(
        self,
        attempt: Attempt,
        opener: Callable[[], Storage],
        *,
        after: AttemptKeeper | None = None,
        tell: Callable[[Condition], object] = lambda _condition: None,
        is_wanted: Callable[[], bool] = lambda: True,
        terms: Terms | None = None,
    ) -> None:
        self.attempt = attempt
        self._opener = opener
        self._after = after
        self._tell = tell
        self._is_wanted = is_wanted
        self._terms = terms or Terms()
        self._claims = False
        self._changed = threading.Condition()
        self._condition = Condition()
        self._is_trying = False
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()  # the lease is not to be renewed any more
        self._is_retired = False
        self._is_over = False
        self._is_stopped = threading.Event()

    @property
    def condition(self) -> Condition:
        """How the attempt stands now."""
        with self._changed:
            return self._condition

    @property
    def is_over(self) -> bool:
        """True once its job has ended."""
        return self._is_over

    def learn(self, name: str) -> None:
        """Note the name of the attempt's folder, which another process has found; empty: it has not."""
        if name and not self.condition.name:
            self._note(Condition(name))

    def claim(self) -> None:
        """Claim the attempt, unless it is claimed already, and renew its lease from then on."""
        self._claims = True
        self._start()

    def wait(self, patience: float, is_given_up: Callable[[], bool] = lambda: False) -> str:
        """Wait until the attempt is claimed. Returns the name of its folder.

        Raises OutOfReachError if the storage is out of reach for `patience` seconds, or does not show another
        node's claim for so long; SupersededError once `is_given_up` returns True; or why it cannot be claimed.
        """
        if not self.condition.name:
            self._start()
        deadline = time.monotonic() + patience
        with self._changed:
            while not (found := self._condition).name:
                if not self._is_trying and found.error is not None:
                    raise found.error
                if is_given_up():
                    raise SupersededError("a newer save has taken its place, before the storage answered")
                if not self._is_trying or time.monotonic() >= deadline:
                    raise found.error or OutOfReachError(self._lack(patience))
                self._changed.wait(max(0.0, min(deadline - time.monotonic(), _LOOK_EVERY)))
            return found.name

    def wait_settled(self) -> None:
        """Return once this attempt has its place, or the keeper no longer tries to get one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_trying or bool(self._condition.name))

    def retire(self) -> None:
        """Renew the lease no more: a newer attempt of the job has begun. The attempt is still claimed for what
        was saved."""
        self._is_retired = True
        self._wake.set()

    def end(self, timeout: float, *, stop: bool) -> None:
        """Note in the run that the job has ended, and wait for that, `timeout` seconds at most.

        `stop`: also give up claiming the attempt.
        """
        self._is_over = True
        if stop:
            self._is_stopped.set()
        self._wake.set()
        with self._changed:  # once it is there, it has been started
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    # -- the thread

    def _start(self) -> None:
        """Begin to claim, or to look for the claim; again, if that had failed for good."""
        with self._changed:
            if self._thread is not None and self._thread.is_alive() and self._is_trying:
                return
            if self._is_stopped.is_set() or (self._condition.name and not self._claims):
                return
            if self._condition.name and self._thread is not None and self._thread.is_alive():
                return
            self._condition = Condition(self._condition.name)
            self._is_trying = True
            self._thread = threading.Thread(target=self._work, name="shardckpt-attempt", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        try:
            if self._after is not None:
                self._after.wait_settled()
                self._after = None
            if not self.condition.name:
                self._try()
            self._note(None, is_trying=False)
        except BaseException as error:  # for whoever waits, who may be at a loss without it
            self._note(Condition(error=error), is_trying=False)
            return
        if self._claims and self.condition.name:
            self._keep_lease()

    def _try(self) -> None:
        """Try until the attempt is claimed, or the keeper is stopped."""
        pause = _FIRST_PAUSE
        while True:
            try:
                root = self._opener()
                name = self._claim(root) if self._claims else find_attempt(root, self.attempt)
            except OutOfReachError as error:
                self._note(Condition(error=error))
            else:
                if name:
                    self._note(Condition(name))
                    return
            if self._is_stopped.wait(pause) or self.condition.name:
                return
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _claim(self, root: Storage) -> str:
        return claim_attempt(
            root,
            self.attempt,
            terms=self._terms,
            tell=lambda text: self._note(Condition(notice=text)),
            is_wanted=self._is_wanted,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        if self._is_stopped.wait(seconds):
            raise SupersededError("the job has ended before its attempt was claimed")

    def _keep_lease(self) -> None:
        """Renew the lease until the end; then mark it as over."""
        has_told = False
        while not self._wake.wait(self._terms.renew_every):
            self._write(is_over=False)
            try:
                newer = "" if has_told else self._newer()
            except Exception as error:
                _log.debug("newer attempts cannot be looked for: %s", error)
                continue
            if newer:
                has_told = True
                self._note(Condition(self.condition.name, notice=self._lost_to(newer)))
        if not self._is_retired:
            self._write(is_over=True)

    def _write(self, *, is_over: bool) -> None:
        lease = Lease(self.attempt.id, self.attempt.holder, time.time(), self._terms.lasts, is_over)
        try:
            self._opener().at(self.condition.name).write(LEASE, lease.encode())
        except Exception as error:  # the next one will do
            _log.debug("the lease of %s is not renewed: %s", self.condition.name, error)

    def _newer(self) -> str:
        """The name of another job's attempt that is newer than this one; empty if there is none."""
        own = self.condition.name
        root = self._opener()
        found = attempts_in(root.list())
        newest = found[-1] if found else own
        if (attempt_number(newest), newest) <= (attempt_number(own), own):
            return ""
        lease = read_lease(root.at(newest), ATTEMPT)
        return "" if lease is not None and lease.holder.is_same_job(self.attempt.holder) else newest

    def _note(self, condition: Condition | None, *, is_trying: bool | None = None) -> None:
        with self._changed:
            if is_trying is not None:
                self._is_trying = is_trying
            if condition is not None and (condition.name or not self._condition.name):
                self._condition = condition
            else:
                condition = None
            self._changed.notify_all()
        if condition is not None:
            self._tell(condition)

    def _lost_to(self, newer: str) -> str:
        return (
            f"the run has gone on in {newer}, which another job has begun: what this job saves from "
            f"now on lies in "
            f"{self.condition.name}, and is not resumed by itself. Stop one of the two jobs"
        )

    def _lack(self, patience: float) -> str:
        if self._claims:
            return f"the run's storage has not answered for {patience:g} s"
        return (
            f"rank 0 has begun an attempt of this run, and its claim is not to be seen here for "
            f"{patience:g} s. A run "
            "needs a URL that all nodes share: a folder of a network file system, or s3://bucket/run"
        )
