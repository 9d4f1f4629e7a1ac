"""Who depends on the store of a job: how the process that serves it knows when it may end."""

from __future__ import annotations

import time

from launcher.rendezvous.member.heartbeat import PERIOD, Watch
from launcher.rendezvous.member.stores import Store

__all__ = ["StoreUsers"]

_PAUSE = 0.05  # seconds between two looks


class StoreUsers:
    """One process's presence at a store. Its methods raise RuntimeError if the store is gone."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def enter(self) -> None:
        """Be counted."""
        self._store.add("present", 1)

    def exit(self) -> None:
        """Be counted no more."""
        self._store.add("present", -1)

    def beat(self) -> None:
        """Give a sign of life; to be called every `PERIOD`."""
        self._store.add("pulse", 1)

    def outlast_others(self, seconds: float) -> None:
        """Return when all have gone, or nobody gives a sign of life any more, or after `seconds`."""
        watch = Watch()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._store.add("present", 0) > 0:
            pulse = {0: str(self._store.add("pulse", 0))}
            if watch.look(pulse, time.monotonic()):
                return
            time.sleep(min(_PAUSE, PERIOD))
