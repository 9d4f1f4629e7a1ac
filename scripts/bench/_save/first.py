"""What the first save of a job costs, with and without time to prepare it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from _peers.base import Candidate, Wait
from _peers.ours import Shardckpt

from _save.profile import Profile

__all__ = ["FIRST", "PARTS", "Ranks", "measure_first"]

FIRST: Mapping[str, str] = {
    "prepared": "shardckpt, 2 s after the first step",
    "resumed": "shardckpt, right after restore from disk",
    "resumed_later": "shardckpt, 1 s after restore from disk",
    "new": "shardckpt, new job, at step 1",
    "dcp-thread": "DCP async thread, new job",
    "dcp-process": "DCP async process, new job",
}
"""The first saves that are compared, in words."""

PARTS = ("flatten", "plan", "buffer", "copy")
"""What shardckpt does in a stall, on the slowest rank."""

_LATER = 1.0


class Ranks(Protocol):
    """What is needed of the bench."""

    def seconds(self, function: Callable[[], object]) -> float: ...
    def slowest(self, times: list[float]) -> list[float]: ...
    def settle(self) -> None: ...


def measure_first(
    ranks: Ranks, kinds: Sequence[str], make: Callable[[str], Candidate], wait: float
) -> dict[str, float]:
    """Seconds of stall of one first save of each kind, and of the second save of the prepared one.

    `make` makes a candidate with a folder of its own; `wait` is the time that preparing has.
    """
    times: dict[str, float] = {}
    for kind in kinds:
        candidate = make("shardckpt" if kind in ("prepared", "resumed", "resumed_later", "new") else kind)
        if kind.startswith("resumed"):
            assert isinstance(candidate, Shardckpt)
            candidate.prepare()
            candidate.save(1)()
            candidate.close()
            ranks.settle()
            times[f"{kind}_restore"] = ranks.seconds(candidate.resume)
            time.sleep(_LATER if kind == "resumed_later" else 0)
        elif kind == "new":
            assert isinstance(candidate, Shardckpt)
            ranks.settle()
            candidate.resume()
        else:
            candidate.prepare()
            time.sleep(wait)
            ranks.settle()
        times |= _stall(ranks, candidate, kind, 2)
        if kind == "prepared":
            times |= _stall(ranks, candidate, "second", 3)
        candidate.close()
    return times


def _stall(ranks: Ranks, candidate: Candidate, kind: str, step: int) -> dict[str, float]:
    """Save; returns, once that is over, the seconds of stall, and of its parts on the slowest rank."""
    waits: list[Wait] = []
    profile = Profile()
    with profile.phase("stall", kind):
        times = {kind: ranks.seconds(lambda: waits.append(candidate.save(step)))}
    waits.pop()()
    parts = [profile.results.get(f"{kind}|{what}|busy", 0.0) for what in PARTS]
    return times | {
        f"{kind}_{what}": seconds for what, seconds in zip(PARTS, ranks.slowest(parts), strict=True)
    }
