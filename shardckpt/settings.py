"""The settings of a Checkpointer: what makes sense, and what the environment says."""

from __future__ import annotations

import os

from shardckpt.saver.wire import LINGER

__all__ = ["check_cadence", "linger_from_environment", "snapshots_from_environment"]

_SNAPSHOTS = 2


def check_cadence(
    every: int | None, url_every: int | None, local_every: int | None, keep_last: int | None
) -> None:
    """Raise ValueError for numbers of steps that make no sense together."""
    numbers = {
        "every_steps": every,
        "url_every_steps": url_every,
        "local_every_steps": local_every,
        "keep_last": keep_last,
    }
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} must be a whole number of 1 or more, or None; it is {number!r}")
    for name in ("url_every_steps", "local_every_steps"):
        number = numbers[name]
        if number is not None and (every is None or number % every):
            raise ValueError(
                f"{name} must be a multiple of every_steps, which is {every!r}; it is {number!r}: these saves "
                "are some of those"
            )


def snapshots_from_environment() -> int:
    """How many snapshots a node holds, unless a script says."""
    text = os.environ.get("SHARDCKPT_SNAPSHOTS", str(_SNAPSHOTS))
    if text not in ("0", "1", "2"):
        raise ValueError(f"SHARDCKPT_SNAPSHOTS must be 0, 1 or 2; it is {text!r}")
    return int(text)


def linger_from_environment() -> float:
    """Seconds that a saver without launcher waits for a restarted job."""
    text = os.environ.get("SHARDCKPT_LINGER", str(LINGER))
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"SHARDCKPT_LINGER must be a number of seconds; it is {text!r}") from None
