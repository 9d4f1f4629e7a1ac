"""The settings of a Checkpointer: what makes sense, and what the environment says."""

from __future__ import annotations

__all__ = ["check_cadence"]


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
