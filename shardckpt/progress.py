"""The progress file, by which a worker tells the launcher how far it is; see docs/worker-contract.md."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field

__all__ = ["ProgressFile"]

_log = logging.getLogger("shardckpt")


@dataclass
class ProgressFile:
    """One rank's progress file at `path`."""

    path: str
    _descriptor: int | None = field(default=None, repr=False)

    @classmethod
    def of_worker(cls) -> ProgressFile | None:
        """The file that the launcher named in LAUNCH_PROGRESS_FILE, if there is a launcher."""
        path = os.environ.get("LAUNCH_PROGRESS_FILE")
        return cls(path) if path else None

    def write(self, step: int) -> None:
        """Best effort: progress is information, and training does not stop for it."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(self._descriptor, f"{step:20d} {time.time():20.6f}\n".encode(), 0)
        except OSError as error:
            _log.debug("%s cannot be written: %s", self.path, error)
