"""Asking a store whether it honours create-only writes."""

from __future__ import annotations

import threading

from shardckpt.storage.names import temporary_name
from shardckpt.storage.protocol import Storage

__all__ = ["ExclusiveProbe"]


class ExclusiveProbe:
    """Finds out once, for all folders that share it, whether `create` is exclusive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answer: bool | None = None

    def ask(self, storage: Storage) -> bool:
        """Create the same temporary file twice, and remove it: is the second refused?

        Raises what `storage.create` raises; the next call asks again then.
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
