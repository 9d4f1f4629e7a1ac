"""One verdict per failure: who failed first, why, who was dragged along, what happens next."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.events import DeadlinePassed, SpawnFailed, WorkerExited, ZygoteLost
from launcher.progress import read_progress
from launcher.restart import Decision, Finish, GiveUp, Restart, Round
from launcher.run_dir import RankFiles

__all__ = ["Evidence", "Verdict", "describe_exit", "find_culprit", "gather", "judge"]

_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 10
_TRACEBACK_LINES = 30

# What workers say when it was another one that went away.
_PEER_LOSS = re.compile(
    r"connection (was likely )?(closed|reset|refused)|broken pipe|closed by peer|remote process exited"
    r"|recvvalue failed|failed to recv|socket closed|store.*(shut down|is not available)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Evidence:
    """What a failed worker left behind."""

    lines: tuple[str, ...] = ()  # its traceback, or else its last lines
    has_traceback: bool = False
    error: str | None = None  # the exception in one line
    step: int | None = None

    @property
    def blames_peer(self) -> bool:
        return _PEER_LOSS.search(self.error or "\n".join(self.lines[-3:])) is not None


def gather(files: RankFiles) -> Evidence:
    """Read what a rank left in its files."""
    step = progress.step if (progress := read_progress(files.progress)) else None
    recorded = _read_error_file(files.error)
    stderr = _read_tail(files.err)
    traceback = _last_traceback(recorded[1].splitlines() if recorded else stderr)
    if traceback:
        error = recorded[0] if recorded else traceback[-1]
        return Evidence(tuple(traceback[-_TRACEBACK_LINES:]), True, error, step)
    lines = _not_blank(stderr) or _not_blank(_read_tail(files.out))
    return Evidence(tuple(lines[-_TAIL_LINES:]), False, recorded[0] if recorded else None, step)


def _read_tail(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    # What a progress bar showed last is all that counts of it.
    return [line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip("\n").split("\n")]


def _not_blank(lines: list[str]) -> list[str]:
    return [line for line in lines if line.strip()]


def _last_traceback(lines: list[str]) -> list[str]:
    """The last traceback up to its exception line; empty if there is none."""
    starts = [i for i, line in enumerate(lines) if "Traceback (most recent call last):" in line]
    if not starts:
        return []
    prefix = lines[starts[-1]].partition("Traceback (most")[0]  # torch writes [rank3]: there
    own = [line.removeprefix(prefix) for line in lines[starts[-1] :]]
    for end, line in enumerate(own[1:], start=1):
        if line and not line[0].isspace():
            return own[: end + 1]
    return own


def _read_error_file(path: Path) -> tuple[str, str] | None:
    """Message and call stack that torchelastic's @record wrote."""
    try:
        message = json.loads(path.read_text())["message"]
        if isinstance(message, str):
            return message, message
        return str(message["message"]), str(message["extraInfo"]["py_callstack"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_culprit(round_: Round, evidence: Mapping[int, Evidence]) -> WorkerExited | None:
    """The worker that failed first.

    That is the first to die, unless it says that a peer went away: then the first that does not.
    """
    failed = [exit_ for exit_ in round_.exits if exit_.code != 0]
    own_fault = [
        exit_
        for index, exit_ in enumerate(failed)
        if not evidence[exit_.rank].blames_peer
        and (index == 0 or exit_.code != -signal.SIGTERM or evidence[exit_.rank].has_traceback)
    ]
    return next(iter(own_fault or failed), None)


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "a signal"
    hint = {
        "SIGKILL": ", as kill -9 or the kernel does when memory runs out",
        "SIGSEGV": ", a crash in native code",
        "SIGBUS": ", a crash in native code, or a full /dev/shm",
        "SIGABRT": ", an abort in native code",
    }.get(name, "")
    return f"killed by {name} (signal {-code}{hint})"


@dataclass(frozen=True)
class Verdict:
    """All that is known about one failed round, as it goes to verdicts.jsonl."""

    round: int
    time: float  # seconds since the epoch
    seconds: float  # how long the round ran
    rank: int | None  # that failed first; None if no worker is to blame
    code: int | None  # its exit code, or minus the signal
    cause: str
    lines: tuple[str, ...]
    has_traceback: bool
    step: int | None
    victims: dict[int, str]  # the others that failed by themselves, and how
    stopped: tuple[int, ...]  # the others that launch stopped
    log: str | None
    next: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def render(self) -> list[str]:
        """The block for the terminal."""
        at_step = "" if self.step is None else f", {self.step} steps done"
        who = "" if self.rank is None else f"rank {self.rank} failed first: "
        text = [
            f"round {self.round} failed after {self.seconds:.1f} s",
            f"  {who}{self.cause}{at_step}",
        ]
        if self.lines:
            text.append("  its traceback:" if self.has_traceback else "  its last lines:")
            text += [f"    {line}" for line in self.lines]
        elif self.rank is not None:
            text.append("  it left no output")
        for rank, how in self.victims.items():
            text.append(f"  then rank {rank}: {how}")
        if self.stopped:
            text.append(f"  stopped: {_ranges(self.stopped)}")
        if self.log is not None:
            text.append(f"  log: {self.log}")
        return [*text, f"  {self.next}"]


def _ranges(ranks: tuple[int, ...]) -> str:
    """`ranks 0-3, 5`"""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def judge(
    round_: Round,
    culprit: WorkerExited | None,
    files: list[RankFiles],
    evidence: Mapping[int, Evidence],
    decision: Decision,
    *,
    now: float,
    wall_time: float,
) -> Verdict:
    """The verdict on a round that failed. `now` is monotonic, `wall_time` since the epoch."""
    others = [exit_ for exit_ in round_.exits if exit_.code != 0 and exit_ is not culprit]
    victims = {
        exit_.rank: evidence[exit_.rank].error or describe_exit(exit_.code)
        for exit_ in others
        if exit_.code not in (-signal.SIGTERM, -signal.SIGKILL)
    }
    left = evidence[culprit.rank] if culprit else Evidence()
    return Verdict(
        round=round_.number,
        time=wall_time,
        seconds=(culprit.at if culprit else now) - round_.started,
        rank=culprit.rank if culprit else None,
        code=culprit.code if culprit else None,
        cause=_cause(round_, culprit, left),
        lines=left.lines,
        has_traceback=left.has_traceback,
        step=left.step,
        victims=victims,
        stopped=tuple(sorted(exit_.rank for exit_ in others if exit_.rank not in victims)),
        log=str(files[culprit.rank].err) if culprit else None,
        next=_next(decision),
    )


def _cause(round_: Round, culprit: WorkerExited | None, left: Evidence) -> str:
    match round_.trouble:
        case SpawnFailed(rank=rank, reason=reason):
            return f"rank {rank} could not be started: {reason}"
        case ZygoteLost(code=code):
            return f"the zygote was lost, and all workers with it: {describe_exit(code)}"
        case DeadlinePassed():
            return "processes are left that do not die of SIGKILL (stuck in a driver or file system)"
    if culprit is None:
        return "no worker failed, but the round ended"
    how = describe_exit(culprit.code)
    return f"{left.error} ({how})" if left.error else how


def _next(decision: Decision) -> str:
    match decision:
        case Restart(number=number, of=of):
            return f"restarting: {number} of at most {of} restarts"
        case GiveUp(exit_code=code, restarts=restarts):
            used = (
                f"{restarts} restart{'s' if restarts > 1 else ''} used up"
                if restarts
                else "no restarts allowed"
            )
            return f"giving up: {used}; exit code {code}"
        case Finish(exit_code=code):
            return f"stopping, as asked; exit code {code}"
