"""The attempts of the connected trainers: begun at their request, and told to them as they are claimed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from shardckpt.errors import OutOfReachError
from shardckpt.run.attempt_keeper import Condition
from shardckpt.run.tiers import Tier
from shardckpt.saver.attempts import KeptAttempts
from shardckpt.saver.connections import Client, Connections
from shardckpt.saver.loop import EventLoop
from shardckpt.saver.protocol import Claimed, Start
from shardckpt.storage import Storage

__all__ = ["AttemptReports"]

_log = logging.getLogger("shardckpt.saver")

_END_TIMEOUT = 10.0  # seconds for a run's storage to note that its job has ended


class AttemptReports:
    """Starts attempts, and sends their trainers what becomes of the claims.

    Args:
        attempts: keeps them.
        loop: runs what their threads hand over.
        connections: the trainers.
        root: opens a tier; called by other threads.
    """

    def __init__(
        self,
        attempts: KeptAttempts,
        loop: EventLoop,
        connections: Connections,
        root: Callable[[Tier], Storage],
    ) -> None:
        self._attempts = attempts
        self._loop = loop
        self._connections = connections
        self._root = root

    def newest(self, run: str) -> int:
        """The number of the run's newest attempt that is known here; 0 if none is."""
        return self._attempts.newest(run)

    def path(self, run: str, path: str) -> str:
        """Where a save lies in its run, as far as that is known."""
        return self._attempts.path(run, path)

    def start(self, client: Client, start: Start) -> None:
        """The next saves of a trainer are of this attempt: have it claimed, if this saver is to do that."""
        name, run, tier = start.attempt.name, client.run, list(client.tiers.values())[-1]
        client.attempt = name

        def is_wanted() -> bool:
            return any(other.attempt == name for other in self._connections.of_run(run))

        condition = self._attempts.start(
            run,
            start.attempt,
            claims=start.claims,
            name=start.name,
            opener=partial(self._root, tier),
            tell=lambda condition: self._loop.call(partial(self._tell, run, start, condition)),
            is_wanted=is_wanted,
        )
        if condition != Condition():
            self._tell(run, start, condition)

    def end(self, run: str) -> None:
        """A run's job has ended: note that in the run. This process waits for it, but not for long."""
        self._loop.start(lambda: self._attempts.end(run, _END_TIMEOUT))

    def end_all(self) -> None:
        """The jobs of all runs have ended."""
        for run in self._attempts.runs():
            self.end(run)

    def _tell(self, run: str, start: Start, condition: Condition) -> None:
        """Tell an attempt's trainers how it stands."""
        error = condition.error
        claimed = Claimed(
            start.attempt.id,
            condition.name,
            str(error) if error is not None else "",
            type(error).__name__ if error is not None else "",
            isinstance(error, OutOfReachError),
            condition.notice,
        )
        if claimed.error or claimed.notice:
            _log.info("%s: %s", start.attempt.name, claimed.error or claimed.notice)
        for client in self._connections.of_run(run):
            if client.attempt == start.attempt.name:
                self._connections.send(client, claimed)
