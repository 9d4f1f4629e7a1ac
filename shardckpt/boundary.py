"""What users see of an error: its sentence, and the line of theirs that it came from."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from shardckpt.errors import CheckpointError, SaveError, StorageError

__all__ = ["plain_errors"]

_log = logging.getLogger("shardckpt")

P = ParamSpec("P")
T = TypeVar("T")


def plain_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Have a public function raise what a storage or a checkpoint is wrong about without the errors below it.

    Their chain, of a hundred lines and more, is logged at debug level. What is wrong about the state keeps its
    chain: its cause may be in the user's own code.
    """

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (StorageError, CheckpointError, SaveError) as error:
            _log.debug("%s failed", function.__qualname__, exc_info=True)
            raise error.with_traceback(None) from _cause_of(error)

    return public


def _cause_of(error: Exception) -> BaseException | None:
    """What programs may look at: why a save failed, if that is more than another SaveError. Not in turn why."""
    cause = error.__cause__ if isinstance(error, SaveError) else None
    if type(cause) is SaveError:  # a saver's words, which `error` repeats
        return None
    if isinstance(cause, StorageError):
        cause.__cause__, cause.__suppress_context__ = None, True
        return cause.with_traceback(None)
    return cause
