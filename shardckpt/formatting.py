"""Amounts and times as text for people."""

from __future__ import annotations

__all__ = ["age", "count", "size"]


def size(nbytes: int) -> str:
    """A number of bytes in binary units: `48.1 KiB`."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1000 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.1f} {unit}" if unit != "B" and amount < 100 else f"{amount:.0f} {unit}"


def age(seconds: float) -> str:
    """A time span in seconds, in the largest unit of which it has two: `3 min`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def count(number: int, noun: str) -> str:
    """A number and its noun: `1 tensor`, `2,300 tensors`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
