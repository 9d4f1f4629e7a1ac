"""What each of many saves in a row waits for, rank by rank, beside bare copies of the same bytes."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from _save.profile import SPANS, Profile, Usage

__all__ = ["Measured", "SlowSaves", "slow_saves_table"]

T = TypeVar("T")

_TICKS = os.sysconf("SC_CLK_TCK")
_SHOWN = 3  # slowest saves, beside the median one


@dataclass(frozen=True)
class Measured:
    """A save or a bare copy as one rank saw it.

    Attributes:
        name: "save 3" or "copy 3".
        usage: of the whole call.
        parts: seconds and more of each span, as `Profile` has them.
        machine: CPU seconds of all processes meanwhile, by kind: "busy", "stolen" by the host, "disk" waits.
    """

    name: str
    usage: Usage
    parts: dict[str, float]
    machine: dict[str, float]


class SlowSaves:
    """Measures calls on this rank, one after another."""

    def __init__(self) -> None:
        self.measured: list[Measured] = []

    def measure(self, name: str, function: Callable[[], T]) -> tuple[float, T]:
        """Call it, and note what it used. Returns the seconds and the result."""
        profile = Profile()
        with profile.phase("stall", name):
            machine, before = _machine(), Usage.now()
            result = function()
            after, later = Usage.now(), _machine()
        usage = after.since(before)
        used = {kind: later[kind] - machine[kind] for kind in machine}
        self.measured.append(Measured(name, usage, profile.results, used))
        return usage.clock, result


def slow_saves_table(ranks: Sequence[Sequence[Measured]]) -> str:
    """The slowest saves and the median one, by all ranks' measurements."""
    calls = list(zip(*ranks, strict=True))
    lines = []
    for kind in ("copy", "save"):
        of_kind = [call for call in calls if call[0].name.startswith(kind)]
        by_time = sorted(of_kind, key=_slowest)
        middle = by_time[len(by_time) // 2]
        median = statistics.median(map(_slowest, by_time))
        for call in (middle, *reversed(by_time[-_SHOWN:])):
            lines += _block(call, median)
    return "\n".join(lines)


def _slowest(call: Sequence[Measured]) -> float:
    return max(of.usage.clock for of in call)


def _block(call: Sequence[Measured], median: float) -> list[str]:
    seconds, machine = _slowest(call), call[0].machine
    title = f"{call[0].name}: {seconds:.3f} s, {seconds / median:.2f} x the median; all CPUs: "
    title += ", ".join(f"{kind} {value:.2f}" for kind, value in machine.items())
    spans = [span.what for span in SPANS["stall"]]
    names = [what for what in spans if f"{call[0].name}|{what}|busy" in call[0].parts]
    head = [f"{'rank':>6}", f"{'ms':>8}", f"{'CPU':>8}", f"{'no CPU':>8}", f"{'faults':>8}"]
    head += [f"{what:>9}" for what in names]
    head += [f"{'copy CPU':>9}", f"{'no CPU':>8}"] if "copy" in names else []
    lines = ["", title, "".join(head)]
    for rank, of in enumerate(call):
        usage, parts = of.usage, of.parts
        row = [f"{rank:6}", *(f"{1e3 * v:8.1f}" for v in (usage.clock, usage.cpu, usage.waiting))]
        row += [
            f"{usage.faults:8.0f}",
            *(f"{1e3 * parts[f'{of.name}|{what}|busy']:9.1f}" for what in names),
        ]
        if "copy" in names:
            row += [
                f"{1e3 * parts[f'{of.name}|copy|cpu']:9.1f}",
                f"{1e3 * parts[f'{of.name}|copy|waiting']:8.1f}",
            ]
        lines.append("".join(row))
    return lines


def _machine() -> dict[str, float]:
    with open("/proc/stat") as file:
        fields = [int(word) / _TICKS for word in file.readline().split()[1:]]
    user, nice, system, _idle, disk, _irq, _softirq, stolen = fields[:8]
    return {"busy": user + system, "niced": nice, "stolen": stolen, "disk": disk}
