"""Find out whether a store honours create-only writes."""

from __future__ import annotations

import threading

from shardckpt.storage.names import temporary_name
from shardckpt.storage.protocol import Storage

__all__ = ["ExclusiveProbe"]


class ExclusiveProbe:
    """Finds out whether `create` is exclusive: once for all folders that share the probe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answer: bool | None = None

    def ask(self, storage: Storage) -> bool:
        """True if the storage refuses to create the same temporary file a second time. It is removed again.

        Raises what `storage.create` raises; then the next call tries again.
        """
        with self._lock:
            if self._answer is None:
                name = temporary_name()
                storage.create(name, b"first")
                try:
                    storage.create(name, b"second")
                    self._answer = False
                except FileExistsError:
                    self._answer = storage.read(name) == b"first"
                finally:
                    storage.delete(name)
            return self._answer
