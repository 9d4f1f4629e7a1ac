"""How long a transfer over a network may take."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardckpt.environment import transfer_setting
from shardckpt.errors import StorageError

__all__ = ["Limits", "Patience", "at_most", "client_options", "remaining"]

_DEADLINE, _LEAST_RATE = "transfer_deadline", "transfer_least_rate"


@dataclass(frozen=True)
class Limits:
    """When a request is given up.

    Attributes:
        deadline: seconds that a request may take, with all its attempts, while no bytes move.
        least_rate: bytes per second that a transfer must move to go on for longer than that.
    """

    deadline: float = 60.0
    least_rate: float = 8192.0

    @classmethod
    def of(cls, options: Mapping[str, Any], *, read_timeout: float = 0.0) -> Limits:
        """The limits in the storage options, else in the environment, else the defaults.

        Args:
            options: storage options; `transfer_deadline` and `transfer_least_rate` count.
            read_timeout: seconds that the client waits for an answer; the default deadline has room for two.

        Raises StorageError for a limit that is no number above 0.
        """
        deadline = _number(options, _DEADLINE, max(cls.deadline, 2 * read_timeout))
        return cls(deadline, _number(options, _LEAST_RATE, cls.least_rate))

    def seconds(self, nbytes: int) -> float:
        """Seconds that a transfer of `nbytes` may take in all, for clients that do not report progress."""
        return self.deadline + nbytes / self.least_rate


class Patience:
    """The deadline of a transfer, which moves on while bytes move.

    Args:
        seconds: from now to the deadline, and never more than that from any later moment.
        least_rate: bytes per second that keep the deadline from coming nearer.
        clock: returns the time in seconds.
    """

    def __init__(self, seconds: float, least_rate: float, clock: Callable[[], float]) -> None:
        self.end = clock() + seconds
        self._seconds = seconds
        self._least_rate = least_rate
        self._clock = clock
        self._done = 0

    def extend(self, nbytes: int) -> None:
        """Grant more time for `nbytes` transferred since the start, except those of an earlier attempt."""
        if nbytes > self._done:
            earned = (nbytes - self._done) / self._least_rate
            self.end = min(self.end + earned, self._clock() + self._seconds)
            self._done = nbytes


def client_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options for the client's library: all but the limits."""
    return {name: value for name, value in (options or {}).items() if name not in (_DEADLINE, _LEAST_RATE)}


_thread = threading.local()


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Give up the storage calls that this thread makes in the block once `seconds` have passed."""
    before = getattr(_thread, "until", math.inf)
    _thread.until = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _thread.until = before


def remaining() -> float | None:
    """Seconds that `at_most` leaves this thread; None outside such a block."""
    until = getattr(_thread, "until", math.inf)
    return None if math.isinf(until) else max(0.0, until - time.monotonic())


def _number(options: Mapping[str, Any], name: str, default: float) -> float:
    source, value = name, options.get(name)
    if value is None:
        source, text = transfer_setting(name)
        value = text or default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number > 0:
        unit = "seconds" if name == _DEADLINE else "bytes per second"
        raise StorageError(f"{source} must be a number of {unit} above 0; it is {value!r}")
    return number
