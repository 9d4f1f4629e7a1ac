"""Calls of torch that may never return, with a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["call_within"]

_Value = TypeVar("_Value")


def call_within(seconds: float, call: Callable[[], _Value]) -> _Value:
    """Call `call` in a thread and return its value, or raise its error.

    Raises TimeoutError after `seconds`; the thread is abandoned and goes on.
    """
    outcome: list[tuple[_Value | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # raised in the calling thread
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
