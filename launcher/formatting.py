"""How ranks, amounts, times and exits are written, for people and in JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "amount",
    "count",
    "describe_exit",
    "duration",
    "json_values",
    "name_ranks",
    "part",
    "signal_name",
    "spans",
]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def name_ranks(ranks: Iterable[int]) -> str:
    """`ranks 0-3, 5`, or `rank 5`."""
    found = spans(ranks)
    is_one = len(found) == 1 and "-" not in found[0]
    return f"rank{'' if is_one else 's'} {', '.join(found)}"


def spans(ranks: Iterable[int]) -> list[str]:
    """Ranks as spans: `["0-3", "5"]`."""
    found: list[list[int]] = []
    for rank in sorted(ranks):
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]


def count(number: int, what: str, several: str = "") -> str:
    """`1 rank`, `8 ranks`; `several` is the plural, where it is no plain one with s."""
    return f"{number} {what if number == 1 else several or f'{what}s'}"


def amount(size: float) -> str:
    """`64.0 GiB`, of a number of bytes."""
    power = _power(size)
    return f"{_in_units(size, power)} {_UNITS[power]}"


def part(done: float, total: float) -> str:
    """`1.2 of 64.0 GiB`, of numbers of bytes."""
    power = _power(total)
    return f"{_in_units(done, power)} of {_in_units(total, power)} {_UNITS[power]}"


def _power(size: float) -> int:
    power = 0
    while size >= 1024 ** (power + 1) and power < len(_UNITS) - 1:
        power += 1
    return power


def _in_units(size: float, power: int) -> str:
    return f"{size / 1024**power:.{1 if power else 0}f}"


def duration(seconds: float) -> str:
    """`42 s`, `5 min 3 s`, `2 h 5 min`, `3 d 4 h`, of a number of seconds."""
    whole = max(0, int(seconds))
    for unit, name, lower, lower_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit:
            rest = whole % unit // lower
            return f"{whole // unit} {name}" + (f" {rest} {lower_name}" if rest else "")
    return f"{whole} s"


def signal_name(code: int) -> str:
    """The name of the signal that gave the exit code `code`, which is minus its number."""
    import signal  # takes a millisecond, for which the start of the zygote would wait

    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def describe_exit(code: int) -> str:
    """`exit code 3`, or `killed by SIGSEGV (signal 11, a crash in native code)`."""
    if code >= 0:
        return f"exit code {code}"
    name = signal_name(code)
    hint = {
        "SIGKILL": ", as kill -9 or the kernel does when memory runs out",
        "SIGSEGV": ", a crash in native code",
        "SIGBUS": ", a crash in native code, or a full /dev/shm",
        "SIGABRT": ", an abort in native code",
        "SIGILL": ", an instruction that this processor does not have, or a trap in native code",
    }.get(name, "")
    return f"killed by {name} (signal {-code}{hint})"


def json_values(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that JSON lacks become "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): json_values(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json_values(item) for item in value]
    return value
