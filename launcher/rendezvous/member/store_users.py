"""Counts the processes that use a job's store, so that the one that serves it knows when it can end."""

from __future__ import annotations

import time

from launcher.rendezvous.member.heartbeat import PERIOD, HeartbeatWatch
from launcher.rendezvous.member.stores import Store

__all__ = ["StoreUsers"]

_POLL = 0.05  # seconds between two looks


class StoreUsers:
    """The users of a store, this process among them after `register`.

    Methods raise RuntimeError if the store is gone.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def register(self) -> None:
        """Count this process as a user."""
        self._store.add("present", 1)

    def unregister(self) -> None:
        """Count this process no longer."""
        self._store.add("present", -1)

    def beat(self) -> None:
        """Send a heartbeat; call it every `PERIOD` seconds."""
        self._store.add("pulse", 1)

    def wait_until_unused(self, seconds: float) -> None:
        """Return when there are no users, when none of them sends heartbeats, or after `seconds`."""
        watch = HeartbeatWatch()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._store.add("present", 0) > 0:
            heartbeats = {0: str(self._store.add("pulse", 0))}
            if watch.silent_nodes(heartbeats, time.monotonic()):
                return
            time.sleep(min(_POLL, PERIOD))
