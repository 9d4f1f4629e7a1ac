"""Progress of a copy, a reshard or an export: bytes done of bytes in all."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Counter", "Progress"]

Progress = Callable[[int, int], object]
"""Called with the bytes done so far, and the bytes in all."""


class Counter:
    """Counts bytes, and passes the count on.

    Args:
        total: bytes in all.
        progress: called at each change; None calls nothing.
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done = 0
        self.total = total
        self._progress = progress

    def add(self, nbytes: int) -> None:
        """Count `nbytes` more."""
        self.set(self.done + nbytes)

    def set(self, done: int) -> None:
        """Set the count, also back to an earlier one when work has to be repeated."""
        self.done = done
        if self._progress is not None:
            self._progress(done, self.total)
