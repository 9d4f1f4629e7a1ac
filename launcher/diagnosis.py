"""One verdict per failure: who failed first, why, who was dragged along, what happens next."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launcher.events import WorkerExited
from launcher.hints import hint_for
from launcher.oom import OomWatch
from launcher.outcome import Death, NodeReport
from launcher.progress import read_progress
from launcher.run_dir import RankFiles, as_typed
from launcher.tracebacks import LastWords, innermost_frames, normalized, read_last_words
from launcher.wording import count, name_ranks

__all__ = [
    "LostNode",
    "Verdict",
    "Victim",
    "describe_exit",
    "find_culprit",
    "fingerprint",
    "gather",
    "judge",
]

_TAIL_BYTES = 64 * 1024
_FINGERPRINT_FRAMES = 3
_LONGEST = 200  # characters of an error in one line; what is cut is in the traceback, and in the log
_NO_PROGRESS = "no rank made progress any more"
_STOP_SIGNALS = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT)

# Patterns are compiled when they are used: most agents never need them, and all pay for their start.

# What workers say when it was another one that went away, or did not come.
_PEER_LOSS = (
    (r"connection (was likely )?reset|broken pipe", "connection reset by peer"),
    (r"connection (was likely )?refused", "connection refused by a peer"),
    (
        r"communicator (was|is|has been) aborted|ncclRemoteError",
        "NCCL aborted by a peer's end",
    ),
    (r"recvvalue failed|store.*(shut down|is not available)", "the store has gone"),
    (
        r"connection (was likely )?closed|closed by peer|remote process exited",
        "connection closed by peer",
    ),
    (r"failed to (recv|send)|socket (is )?closed", "connection closed by peer"),
)
_TIMEOUT = (
    r"timed out waiting|collective operation timeout|failed to pass monitoredbarrier"
    r"|timed? ?out after \d+ ?(ms|seconds)|socket timeout|waiting for key|barrier timed out"
)
_DISTRIBUTED = (
    r"torch[./](distributed|nn[./]parallel)|c10d|gloo|nccl|processgroup"
    r"|(TCP|Dist|Prefix|File|Hash)Store|\bthe store\b"
)
_NAMED = r"[\w.]+: rank (\d+): "  # how an exception begins that tells of another rank's
_OUTAGE = r"([\w.]+\.)?OutOfReachError\b"
_DATA_WORKER = r"DataLoader worker \(pid(?:\(s\))? (\d+)"


def gather(
    files: RankFiles,
    exit: WorkerExited,
    host: str,
    epoch_at: float,
    oom: OomWatch | None,
    is_ours: bool,
    said_before: int | None = None,
) -> Death:
    """Read what a failed worker left behind.

    `epoch_at` is its death in seconds since the epoch; `is_ours`, whether launch had told it to end. Of one
    that answers such a signal itself, `said_before` is how many bytes it had written to stderr when it was
    told: a traceback that begins later is its answer, and no failure.
    """
    words = _read_words(files, exit.code)
    if is_ours and said_before is not None:
        words = replace(words, has_traceback=_has_traceback(files.err, said_before))
    progress = read_progress(files.progress)
    return Death(
        rank=exit.rank,
        host=host,
        pid=exit.pid,
        code=exit.code,
        at=epoch_at,
        step=progress.step if progress else None,
        error=words.error,
        lines=words.lines,
        has_traceback=words.has_traceback,
        kill=_find_killer(exit, words, oom, is_ours),
        log=str(files.err),
        is_ours=is_ours,
        has_joined=progress is not None,
    )


def _read_words(files: RankFiles, code: int) -> LastWords:
    recorded = _read_error_file(files.error)
    if recorded is not None:
        message, stack = recorded
        words = read_last_words(stack.splitlines())
        if words.has_traceback:
            return words
    words = read_last_words(_read_tail(files.err), was_killed=code < 0)
    if not words.lines:
        words = LastWords(read_last_words(_read_tail(files.out)).lines)
    if recorded is not None and not words.has_traceback:
        return LastWords(words.lines, False, message.partition("\n")[0])
    return words


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


def _has_traceback(path: Path, end: int) -> bool:
    """Whether a traceback begins before byte `end` of a log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, end - _TAIL_BYTES))
            return b"Traceback (most recent call last):" in file.read(min(end, _TAIL_BYTES))
    except OSError:
        return False


def _read_error_file(path: Path) -> tuple[str, str] | None:
    """Message and call stack that torchelastic's @record wrote."""
    try:
        message = json.loads(path.read_text())["message"]
        if isinstance(message, str):
            return message, message
        return str(message["message"]), str(message["extraInfo"]["py_callstack"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _find_killer(exit: WorkerExited, words: LastWords, oom: OomWatch | None, is_ours: bool) -> str | None:
    if oom is None:
        return None
    if exit.code == -signal.SIGKILL:
        return None if is_ours else oom.explain(exit.pid)
    child = re.search(_DATA_WORKER, words.error or "")
    if child and "Killed" in (words.error or ""):
        found = oom.explain(int(child[1]))
        return f"its DataLoader worker was {found}" if found else None
    return None


def _last_said(death: Death) -> str:
    return death.error or "\n".join(death.lines[-3:])


def _says(pattern: str, said: str) -> bool:
    return re.search(pattern, said, re.IGNORECASE) is not None


def _peer_loss(death: Death) -> str | None:
    """What is said of a worker that says itself that a peer went away or did not come; else None."""
    said = _last_said(death)
    if death.kill or re.search(_DATA_WORKER, said):
        return None
    if death.has_traceback and not _says(_DISTRIBUTED, "\n".join((*death.lines, said))):
        return None  # a connection of its own, to a data server perhaps
    if _says(_TIMEOUT, said):
        return "timed out waiting for others"
    return next((text for pattern, text in _PEER_LOSS if _says(pattern, said)), None)


def _fails_by_itself(death: Death) -> bool:
    """Whether nothing but this worker explains its death, as far as it can be seen from it alone."""
    if _peer_loss(death) is not None:
        return False
    if not death.is_ours or death.kill:
        return True
    return death.has_traceback and not (death.error or "").startswith(("KeyboardInterrupt", "SystemExit"))


def _told_of(death: Death, deaths: Sequence[Death]) -> Death | None:
    """The death of the rank whose failure `death` only passes on, as an operation of all ranks does."""
    named = re.match(_NAMED, death.error or "")
    if not named or death.kill or int(named[1]) == death.rank:
        return None
    return next((other for other in deaths if other.rank == int(named[1])), None)


def find_culprit(deaths: Sequence[Death], *, has_lost_node: bool = False) -> Death | None:
    """The worker that failed first, of all nodes' in order of death; None if no worker is to blame.

    That is the first to die, unless it says that a peer went away, or did not come to a collective, or
    launch had told it to end, or it passes on what another one failed of: then the first of which that does
    not hold. If all say so, a lost node explains them; else the first that waited for others in vain, else
    the first whose peer went away.
    """
    own = [death for death in deaths if _fails_by_itself(death)]
    if own or has_lost_node:
        first = (death for death in own if _told_of(death, own) is None)
        return next(first, next(iter(own), None))
    theirs = [death for death in deaths if not (death.is_ours and death.code in _STOP_SIGNALS)]
    waited = [death for death in theirs if _says(_TIMEOUT, _last_said(death))]
    return next(iter(waited or theirs), None)


def fingerprint(death: Death) -> str | None:
    """Equal for the same failure again; None if too little is known to say so.

    Numbers, addresses and directories in messages do not count; the innermost frames of a traceback do. An outage
    passes, so that nothing is said of a storage that was out of reach.
    """
    if re.match(_OUTAGE, death.error or ""):
        return None
    if death.kill and "out of memory" in death.kill:
        return "out of memory"
    if death.has_traceback or death.error:
        # A DataLoader notices a dead worker in a signal handler, which may be anywhere.
        is_anywhere = re.search(_DATA_WORKER, death.error or "")
        frames = [] if is_anywhere else innermost_frames(death.lines, _FINGERPRINT_FRAMES)
        return "; ".join((normalized(death.error or ""), *frames))
    if death.code in _STOP_SIGNALS:
        return None
    if death.code < 0:
        return _signal_name(death.code)
    return f"exit code {death.code}: {normalized(death.lines[-1])}" if death.lines else None


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def describe_exit(code: int) -> str:
    """`exit code 3`, or `killed by SIGSEGV (signal 11, a crash in native code)`."""
    if code >= 0:
        return f"exit code {code}"
    name = _signal_name(code)
    hint = {
        "SIGKILL": ", as kill -9 or the kernel does when memory runs out",
        "SIGSEGV": ", a crash in native code",
        "SIGBUS": ", a crash in native code, or a full /dev/shm",
        "SIGABRT": ", an abort in native code",
        "SIGILL": ", an instruction that this processor does not have, or a trap in native code",
    }.get(name, "")
    return f"killed by {name} (signal {-code}{hint})"


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

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "steps_lost": self.steps_lost})

    def render(self) -> list[str]:
        """The block for the terminal."""
        what = "hung" if self.hang and self.rank is None else "failed"
        text = [f"round {self.round} {what} after {self.seconds:.1f} s", f"  {self._headline()}"]
        if (ended := _ended_in_words(self.finished, self.drained)) and ended != self.cause:
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
            return f"{self.cause}:" if self.cause == _NO_PROGRESS else self.cause
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


def _ended_in_words(finished: Sequence[int], drained: Sequence[int]) -> str:
    """That these ranks had ended; empty if none had."""
    kinds = ((finished, "0"), (drained, "75, as after saving to leave"))
    return "; ".join(
        f"{name_ranks(ranks)} had ended before the others, with exit code {how}"
        for ranks, how in kinds
        if ranks
    )


def _cut(error: str) -> str:
    return error if len(error) <= _LONGEST else f"{error[: _LONGEST - 1]}…"


def judge(
    reports: Sequence[NodeReport],
    lost: Mapping[int, tuple[str, str]],
    decision_text: str,
    *,
    newest_saved: int | None,
    is_only_in_memory: bool = False,
) -> Verdict:
    """The verdict on a round that failed, from what each node says of it; there is one report at least.

    `lost` has the nodes that say nothing any more: their host, and why. `decision_text` is what happens next.
    `newest_saved` is the step of the newest snapshot or checkpoint, `is_only_in_memory` whether no other tier
    has it.
    """
    deaths = sorted((death for report in reports for death in report.deaths), key=lambda death: death.at)
    trouble = tuple(_on(report, len(reports), report.trouble) for report in reports if report.trouble)
    hang = tuple(_on(report, len(reports), line) for report in reports for line in report.hang)
    explains = bool(lost or trouble or hang)
    first = find_culprit(deaths, has_lost_node=explains)
    at = first.at if first else min(report.at for report in reports)
    ended = _ended_before(reports, first, at)
    culprit = None if ended else first
    victims, stopped = _sort_others(deaths, culprit, at)
    finished = tuple(rank for rank, code in ended.items() if code == 0)
    drained = tuple(rank for rank, code in ended.items() if code != 0)
    losses = tuple(LostNode(node, host, why) for node, (host, why) in sorted(lost.items()))
    return Verdict(
        round=reports[0].round,
        time=at,
        seconds=_seconds_until(first, reports),
        rank=culprit.rank if culprit else None,
        code=culprit.failure_code if culprit else None,
        host=culprit.host if culprit else None,
        node=next((report.node for report in reports if culprit in report.deaths), None),
        cause=_cause(culprit, losses, trouble, hang, _ended_in_words(finished, drained)),
        kill=culprit.kill if culprit else None,
        hint=_hint(culprit, reports) if culprit else None,
        told_by=first.rank if first else None,
        lines=first.lines if first else (),
        has_traceback=first.has_traceback if first else False,
        victims=victims,
        stopped=stopped,
        finished=finished,
        drained=drained,
        trouble=trouble,
        hang=hang,
        lost=losses,
        nodes=len(reports) + len(lost),
        step=max((report.step for report in reports if report.step is not None), default=None),
        newest_saved=newest_saved,
        is_only_in_memory=is_only_in_memory,
        log=first.log if first else None,
        next=decision_text,
    )


def _seconds_until(first: Death | None, reports: Sequence[NodeReport]) -> float:
    """From the start of a round to its failure, by the monotonic clock of the node that it failed on."""
    report = next((one for one in reports if first in one.deaths), None) or min(
        reports, key=lambda one: one.at
    )
    return report.seconds + (first.at - report.at if first else 0.0)


def _on(report: NodeReport, nodes: int, line: str) -> str:
    return line if nodes == 1 else f"{report.host}: {line}"


def _sort_others(
    deaths: Sequence[Death], culprit: Death | None, at: float
) -> tuple[tuple[Victim, ...], tuple[int, ...]]:
    """Those that failed besides the first, and the ranks that only ended because launch told them to."""
    victims = []
    stopped = []
    for death in deaths:
        if death is culprit:
            continue
        loss = _peer_loss(death)
        told = _told_of(death, deaths)
        if told is not None and told is culprit:
            victims.append(Victim(death.rank, f"told of rank {told.rank}'s failure", True, death.at - at))
        elif loss is not None:
            victims.append(Victim(death.rank, loss, True, death.at - at))
        elif _fails_by_itself(death):
            how = death.kill or _cut(death.error or "") or describe_exit(death.code)
            victims.append(Victim(death.rank, how, False, death.at - at))
        else:
            stopped.append(death.rank)
    return tuple(victims), tuple(sorted(stopped))


def _ended_before(reports: Sequence[NodeReport], culprit: Death | None, at: float) -> dict[int, int]:
    """The ranks whose end explains the failure, if nothing better does, and with which code they ended.

    Others waited for them, or lost them.
    """
    if culprit is not None and _peer_loss(culprit) is None:
        return {}
    return dict(sorted((rank, code) for one in reports for rank, code, when in one.ended if when <= at))


def _cause(
    culprit: Death | None,
    lost: Sequence[LostNode],
    trouble: Sequence[str],
    hang: Sequence[str],
    ended: str,
) -> str:
    if culprit is not None:
        how = describe_exit(culprit.failure_code)
        if culprit.kill and culprit.code == -signal.SIGKILL:
            return culprit.kill
        why = f"; {culprit.kill}" if culprit.kill else ""
        if not culprit.error:
            return f"{how}{why}"
        return f"{_cut(culprit.error)} ({how}){why}"
    if trouble:
        return trouble[0]
    if lost:
        return f"lost: node {lost[0].node} ({lost[0].host}): {lost[0].why}"
    if hang:
        return _NO_PROGRESS
    return ended or "no worker failed, but the round ended"


def _hint(death: Death, reports: Sequence[NodeReport]) -> str | None:
    return hint_for(
        death,
        is_peer_loss=_peer_loss(death) is not None,
        is_timeout=_says(_TIMEOUT, _last_said(death)),
        ranks=sum(len(report.deaths) + len(report.ended) for report in reports),
        hosts=len({report.host for report in reports}),
    )
