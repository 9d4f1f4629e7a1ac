"""The verdict on a failed round: who failed first and why, who failed of it, what happens next. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.formatting import count, name_ranks
from launcher.run_dir import as_typed

__all__ = ["NO_PROGRESS", "LostNode", "Verdict", "Victim", "describe_ended"]

NO_PROGRESS = "no rank made progress any more"
"""The cause of a round that hung, as far as no worker or node is to blame."""


@dataclass(frozen=True, slots=True)
class Victim:
    """Another worker that failed in the same round."""

    rank: int
    how: str
    of_it: bool  # its words say that a peer went away or did not come, so that the first caused it
    later: float  # seconds after the first


@dataclass(frozen=True, slots=True)
class LostNode:
    """A node that is gone, and why the others think so."""

    node: int
    host: str
    why: str


@dataclass(frozen=True)
class Verdict:
    """What is known about one failed round, as it is recorded in verdicts.jsonl."""

    round: int
    time: float  # seconds since the epoch: when it failed
    seconds: float  # how long the round ran until then
    rank: int | None  # the rank that failed first; None if no worker is to blame
    code: int | None  # its exit code, or minus the signal
    host: str | None  # where it ran
    node: int | None
    cause: str
    kill: str | None  # who killed it, where that is known
    hint: str | None  # what the user may do
    told_by: int | None  # the rank that wrote `lines`; if none is to blame, the first victim
    lines: tuple[str, ...]  # its traceback, or else its last lines
    has_traceback: bool
    victims: tuple[Victim, ...]  # the other ranks that failed, in order
    stopped: tuple[int, ...]  # the other ranks that launch stopped
    finished: tuple[int, ...]  # ranks that had returned 0 before, which explains why others missed them
    drained: tuple[int, ...]  # ranks that had saved and left before, likewise
    trouble: tuple[str, ...]  # what else went wrong, a line each
    hang: tuple[str, ...]  # what the stacks say, a line each
    lost: tuple[LostNode, ...]
    nodes: int  # of the round
    step: int | None  # the highest that a rank reported
    newest_saved: int | None  # step of the newest snapshot or checkpoint
    is_only_in_memory: bool  # it may be lost with this host, or with its saver
    log: str | None  # the file that `lines` are from
    next: str  # what happens next

    @property
    def steps_lost(self) -> int | None:
        """Steps that must be repeated; None if that is not known."""
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
        """The lines for the terminal."""
        what = "hung" if self.hang and self.rank is None else "failed"
        text = [f"round {self.round} {what} after {self.seconds:.1f} s", f"  {self._headline()}"]
        if (ended := describe_ended(self.finished, self.drained)) and ended != self.cause:
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
        """Lines about the ranks that failed after the first, alike ones in one, and about other trouble."""
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


def describe_ended(finished: Sequence[int], drained: Sequence[int]) -> str:
    """A line about the ranks that had finished or saved and left before the others; empty without any."""
    kinds = ((finished, "0"), (drained, "75, as after saving to leave"))
    return "; ".join(
        f"{name_ranks(ranks)} had ended before the others, with exit code {how}"
        for ranks, how in kinds
        if ranks
    )
