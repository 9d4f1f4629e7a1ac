"""The last step that training reported and that nothing has saved."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Mapping
from typing import Any

__all__ = ["UnsavedStep"]

_log = logging.getLogger("shardckpt")


class UnsavedStep:
    """The arguments of the last call of `Checkpointer.step`, until something saves that step.

    A Checkpointer that is collected with an unsaved step, and without an error on its way, logs a warning.

    Args:
        owner: the Checkpointer.
        url: the run's.
        logs: True on the rank that logs.

    Attributes:
        arguments: step, state and metrics; None if the step is saved, or is not to be saved any more.
    """

    def __init__(self, owner: object, url: str, *, logs: bool) -> None:
        self.arguments: tuple[int, dict[str, Any], Mapping[str, float] | None] | None = None
        self._logs = logs
        self._warns = True
        weakref.finalize(owner, self._warn_of_end, url)

    def warn_once(self) -> None:
        """Log, the first time, that `step` does not save without a cadence, unless the script calls `save`."""
        if self._logs and self._warns and self.arguments is not None:
            _log.warning(
                "step %d is not saved, nor are those after it: every_steps is not given, so that only `save` "
                "saves, and `close` the last step",
                self.arguments[0],
            )
        self._warns = False

    def knows_save(self) -> None:
        """Note that the script calls `save`: it does not take `step` for what saves."""
        self._warns = False

    def forget(self) -> None:
        """Drop the step: it is saved, or its state is not what it was any more."""
        self.arguments = None

    def _warn_of_end(self, url: str) -> None:
        if (
            self.arguments is not None
            and self.arguments[0]
            and self._logs
            and not hasattr(sys, "last_value")
        ):
            _log.warning(
                "step %d is not saved in %s: training has ended without Checkpointer.close, which saves the last "
                "step; so does the end of `with Checkpointer(...)`",
                self.arguments[0],
                url,
            )
        self.arguments = None
