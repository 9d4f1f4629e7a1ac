"""How ranks and amounts are written wherever something is told about them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["amount", "name_ranks"]

_UNITS = ("B", "kB", "MB", "GB", "TB")


def name_ranks(ranks: Iterable[int]) -> str:
    """`ranks 0-3, 5`"""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    is_one = len(spans) == 1 and spans[0][0] == spans[0][1]
    return f"rank{'' if is_one else 's'} {text}"


def amount(size: float) -> str:
    """`64.0 GB`"""
    power = 0
    while size >= 1000 ** (power + 1) and power < len(_UNITS) - 1:
        power += 1
    return f"{size / 1000**power:.{1 if power else 0}f} {_UNITS[power]}"
