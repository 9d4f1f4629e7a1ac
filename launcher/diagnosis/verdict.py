"""One verdict per failure: who failed first, why, who was dragged along, what happens next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.formatting import count, name_ranks
from launcher.run_dir import as_typed

__all__ = ["NO_PROGRESS", "LostNode", "Verdict", "Victim", "cut", "ended_in_words"]

_LONGEST = 200  # characters of an error in one line; what is cut is in the traceback, and in the log
NO_PROGRESS = "no rank made progress any more"

# Patterns are compiled when they are used: most agents never need them, and all pay for their start.


@dataclass(frozen=True, slots=True)
class Victim:
    """Another worker that failed in the same round."""

    rank: int
    how: str
    of_it: bool  # it failed because of the first: it says that a peer went away or did not come
    later: float  # seconds after the first


@dataclass(frozen=True, slots=True)
class LostNode:
    """A node that is gone, and how that was noticed."""

    node: int
    host: str
    why: str


@dataclass(frozen=True)
class Verdict:
    """All that is known about one failed round, as it goes to verdicts.jsonl."""

    round: int
    time: float  # seconds since the epoch: when it failed
    seconds: float  # how long the round ran until then
    rank: int | None  # that failed first; None if no worker is to blame
    code: int | None  # its exit code, or minus the signal
    host: str | None  # it ran on
    node: int | None
    cause: str
    kill: str | None  # who killed it, where that is known
    hint: str | None
    told_by: int | None  # the rank whose last words these are; if none is to blame, of the first victim
    lines: tuple[str, ...]
    has_traceback: bool
    victims: tuple[Victim, ...]  # the others that failed by themselves or of it, in order
    stopped: tuple[int, ...]  # the others that launch stopped
    finished: tuple[int, ...]  # had returned 0 before, which explains that others missed them
    drained: tuple[int, ...]  # had ended before as those do that have saved and leave: likewise
    trouble: tuple[str, ...]  # what else went wrong, a line each
    hang: tuple[str, ...]  # what the stacks said
    lost: tuple[LostNode, ...]
    nodes: int  # of the round
    step: int | None  # the highest that a rank reported
    newest_saved: int | None  # step of the newest snapshot or checkpoint
    is_only_in_memory: bool  # that one; it may be lost with this host, or with its saver
    log: str | None
    next: str

    @property
    def steps_lost(self) -> int | None:
        """Steps that have to be done again; None if that is not known."""
        if self.step is None or self.newest_saved is None:
            return None
        return max(0, self.step - self.newest_saved)

    @property
    def kind(self) -> str:
        """What kind of failure it was, in a word: crash, signal, oom, hang, node or launcher."""
        if self.hang:
            return "hang"
        if self.kill is not None:
            return "oom"
        if self.rank is None:
            if self.finished or self.drained:
                return "crash"
            return "node" if self.lost else "launcher"
        return "crash" if self.code is not None and self.code >= 0 else "signal"

    def to_json(self) -> dict[str, Any]:
        """Its fields as plain values, with what follows from them: `kind` and `steps_lost`."""
        return {**asdict(self), "kind": self.kind, "steps_lost": self.steps_lost}

    def render(self) -> list[str]:
        """The block for the terminal."""
        what = "hung" if self.hang and self.rank is None else "failed"
        text = [f"round {self.round} {what} after {self.seconds:.1f} s", f"  {self._headline()}"]
        if (ended := ended_in_words(self.finished, self.drained)) and ended != self.cause:
            text.append(f"  {ended}")
        if self.hint:
            text.append(f"  hint: {self.hint}")
        text += [f"  {line}" for line in self.hang]
        if self.lines:
            whose = "its" if self.told_by == self.rank else f"rank {self.told_by}'s"
            text.append(f"  {whose} {'traceback' if self.has_traceback else 'last lines'}:")
            text += [f"    {line}" for line in self.lines]
        elif self.rank is not None:
            text.append("  it left no output")
        text += self._others()
        if self.stopped:
            text.append(f"  stopped: {name_ranks(self.stopped)}")
        if self.step is not None:
            text.append(f"  {self._progress()}")
        if self.log is not None:
            text.append(f"  log: {as_typed(Path(self.log))}")
        return [*text, f"  {self.next}"]

    def _headline(self) -> str:
        if self.rank is None:
            return f"{self.cause}:" if self.cause == NO_PROGRESS else self.cause
        moment = time.strftime("%H:%M:%S", time.localtime(self.time))
        where = f" on {self.host}" if self.nodes > 1 else ""
        return (
            f"rank {self.rank}{where} failed first, at {moment}.{self.time % 1 * 1000:03.0f}: {self.cause}"
        )

    def _others(self) -> list[str]:
        """Those that failed after the first, alike ones together, and what else went wrong."""
        alike: dict[tuple[bool, str], list[int]] = {}
        for victim in self.victims:
            alike.setdefault((victim.of_it, victim.how), []).append(victim.rank)
        text = [
            f"  then{', of it' if of_it else ''}: {name_ranks(ranks)}: {how}"
            for (of_it, how), ranks in alike.items()
        ]
        text += [f"  lost: node {one.node} ({one.host}): {one.why}" for one in self.lost]
        text += [f"  {trouble}" for trouble in self.trouble]
        return [line for line in text if line.strip() != self.cause]

    def _progress(self) -> str:
        if self.newest_saved is None or self.steps_lost is None:
            return f"step {self.step} reached"
        if self.is_only_in_memory:
            return f"step {self.step} reached; snapshot of step {self.newest_saved} in memory"
        if self.steps_lost == 0:
            return f"step {self.step} reached and saved: nothing is lost"
        lost = count(self.steps_lost, "step")
        return f"step {self.step} reached, snapshot of step {self.newest_saved}: {lost} lost"


def ended_in_words(finished: Sequence[int], drained: Sequence[int]) -> str:
    """That these ranks had ended; empty if none had."""
    kinds = ((finished, "0"), (drained, "75, as after saving to leave"))
    return "; ".join(
        f"{name_ranks(ranks)} had ended before the others, with exit code {how}"
        for ranks, how in kinds
        if ranks
    )


def cut(error: str) -> str:
    return error if len(error) <= _LONGEST else f"{error[: _LONGEST - 1]}…"
