"""Which death is the cause and which ones followed from it. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence

from launcher.diagnosis.death import DATA_WORKER
from launcher.diagnosis.hints import hint_for
from launcher.diagnosis.reports import Death, NodeReport
from launcher.diagnosis.tracebacks import innermost_frames, normalized
from launcher.diagnosis.verdict import NO_PROGRESS, LostNode, Verdict, Victim, cut, ended_in_words
from launcher.formatting import describe_exit, signal_name

__all__ = ["find_culprit", "fingerprint", "judge"]


_FINGERPRINT_FRAMES = 3


_STOP_SIGNALS = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT)


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


def _last_said(death: Death) -> str:
    return death.error or "\n".join(death.lines[-3:])


def _says(pattern: str, said: str) -> bool:
    return re.search(pattern, said, re.IGNORECASE) is not None


def _peer_loss(death: Death) -> str | None:
    """What is said of a worker that says itself that a peer went away or did not come; else None."""
    said = _last_said(death)
    if death.kill or re.search(DATA_WORKER, said):
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
        is_anywhere = re.search(DATA_WORKER, death.error or "")
        frames = [] if is_anywhere else innermost_frames(death.lines, _FINGERPRINT_FRAMES)
        return "; ".join((normalized(death.error or ""), *frames))
    if death.code in _STOP_SIGNALS:
        return None
    if death.code < 0:
        return signal_name(death.code)
    return f"exit code {death.code}: {normalized(death.lines[-1])}" if death.lines else None


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
        cause=_cause(culprit, losses, trouble, hang, ended_in_words(finished, drained)),
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
            how = death.kill or cut(death.error or "") or describe_exit(death.code)
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
        return f"{cut(culprit.error)} ({how}){why}"
    if trouble:
        return trouble[0]
    if lost:
        return f"lost: node {lost[0].node} ({lost[0].host}): {lost[0].why}"
    if hang:
        return NO_PROGRESS
    return ended or "no worker failed, but the round ended"


def _hint(death: Death, reports: Sequence[NodeReport]) -> str | None:
    return hint_for(
        death,
        is_peer_loss=_peer_loss(death) is not None,
        is_timeout=_says(_TIMEOUT, _last_said(death)),
        ranks=sum(len(report.deaths) + len(report.ended) for report in reports),
        hosts=len({report.host for report in reports}),
    )
