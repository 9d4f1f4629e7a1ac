"""What saving does to training: the stalls of many saves in a row, and how fast a compute loop goes meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from _peers.base import Candidate

from _save.slow import Measured, SlowSaves

__all__ = ["ALONE_SECONDS", "Ranks", "measure_stalls", "measure_training"]

ALONE_SECONDS = 3.0
"""How long the loop runs undisturbed, before the save and again after it."""

_WIDTH = 256


class Ranks(Protocol):
    """What is needed of the bench."""

    def barrier(self) -> None: ...
    def seconds(self, function: Callable[[], object]) -> float: ...
    def slowest(self, times: list[float]) -> list[float]: ...
    def total(self, numbers: list[float]) -> list[float]: ...


def measure_stalls(
    ranks: Ranks, candidate: Candidate, copy: Callable[[], object], count: int
) -> tuple[dict[str, float], list[Measured]]:
    """So many saves of a new job, each durable before the next; before each a copy of the same bytes.

    Returns the seconds of the slowest rank, and what this one did in them.
    """
    times: dict[str, float] = {}
    slow = SlowSaves()
    copy()  # so that its pages are there
    for number in range(count):
        ranks.barrier()
        seconds = slow.measure(f"copy {number}", copy)[0]
        times[f"copy_{number:03d}"] = ranks.slowest([seconds])[0]
        ranks.barrier()
        seconds, wait = slow.measure(f"save {number}", partial(candidate.save, number + 1))
        times[f"stall_{number:03d}"] = ranks.slowest([seconds])[0]
        wait()
    return times, slow.measured


def measure_training(ranks: Ranks, candidate: Candidate, window: float) -> dict[str, float]:
    """Iterations per second over all ranks: alone, while a save is persisted, and in the window after its stall.

    `window_rate` is missing where the save took longer than the window, in seconds.
    """
    durable: list[float] = []

    def watch() -> None:
        wait()
        durable.append(time.perf_counter())

    ranks.barrier()
    before = _compute(lambda seconds: seconds < ALONE_SECONDS)
    ranks.barrier()
    wait = candidate.save(2)
    watcher = threading.Thread(target=watch)
    begun = time.perf_counter()
    watcher.start()
    during = _compute(lambda seconds: not durable or seconds < window)
    watcher.join()
    ranks.barrier()
    after = _compute(lambda seconds: seconds < ALONE_SECONDS)
    persist = durable[0] - begun
    rates = [
        (len(before) + len(after)) / (before[-1] + after[-1]),
        sum(when <= persist for when in during) / persist,
        sum(when <= window for when in during) / window,
    ]
    alone, meanwhile, within = ranks.total(rates)
    longest = ranks.slowest([persist])[0]
    times = {"alone_rate": alone, "persist_rate": meanwhile, "persist": longest}
    return times | ({"window_rate": within} if longest <= window else {})


def _compute(goes_on: Callable[[float], bool]) -> list[float]:
    """Multiply small matrices while `goes_on`, which is given the seconds; the times when one was done."""
    one, other = torch.ones(_WIDTH, _WIDTH), torch.ones(_WIDTH, _WIDTH)
    product = torch.empty(_WIDTH, _WIDTH)
    ends = [0.0]
    started = time.perf_counter()
    while goes_on(ends[-1]):
        torch.mm(one, other, out=product)
        ends.append(time.perf_counter() - started)
    return ends[1:]
