"""Decides which death is the cause of a failed round, and which followed from it. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence

from launcher.diagnosis.hints import hint_for
from launcher.diagnosis.reports import Death, NodeReport
from launcher.diagnosis.tracebacks import DATALOADER_WORKER, innermost_frames, normalized
from launcher.diagnosis.verdict import NO_PROGRESS, LostNode, Verdict, Victim, describe_ended
from launcher.formatting import describe_exit, signal_name

__all__ = ["find_culprit", "fingerprint", "judge"]

# Patterns are compiled when they are used: most agents never need them, and all pay for their start.
_FINGERPRINT_FRAMES = 3  # innermost frames of a traceback that tell one failure from another
_LONGEST = 200  # characters of an error in one line; the traceback and the log have the rest
_STOP_SIGNALS = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT)
_PEER_LOSS = (
    (r"connection (was likely )?reset|broken pipe", "connection reset by peer"),
    (r"connection (was likely )?refused", "connection refused by a peer"),
    (r"communicator (was|is|has been) aborted|ncclRemoteError", "NCCL aborted by a peer's end"),
    (r"recvvalue failed|store.*(shut down|is not available)", "the store has gone"),
    (r"connection (was likely )?closed|closed by peer|remote process exited", "connection closed by peer"),
    (r"failed to (recv|send)|socket (is )?closed", "connection closed by peer"),
)
"""What workers write when a peer went away, and how the verdict puts it."""
_TIMEOUT = (
    r"timed out waiting|collective operation timeout|failed to pass monitoredbarrier"
    r"|timed? ?out after \d+ ?(ms|seconds)|socket timeout|waiting for key|barrier timed out"
)
"""What workers write when a peer did not come in time."""
_DISTRIBUTED = (
    r"torch[./](distributed|nn[./]parallel)|c10d|gloo|nccl|processgroup"
    r"|(TCP|Dist|Prefix|File|Hash)Store|\bthe store\b"
)
_FAILURE_OF_RANK = r"[\w.]+: rank (\d+): "  # how an exception begins that passes on another rank's
_OUTAGE = r"([\w.]+\.)?OutOfReachError\b"


def judge(
    reports: Sequence[NodeReport],
    lost: Mapping[int, tuple[str, str]],
    decision_text: str,
    *,
    newest_saved: int | None,
    is_only_in_memory: bool = False,
) -> Verdict:
    """The verdict on a round that failed, from the reports of its nodes.

    Args:
        reports: one of each node that is left, at least one.
        lost: the nodes that are not: their host, and why they are taken for lost.
        decision_text: what happens next, in a line.
        newest_saved: the step of the newest snapshot or checkpoint; None if there is none.
        is_only_in_memory: True if no tier but memory has that one.
    """
    deaths = sorted((death for report in reports for death in report.deaths), key=lambda death: death.at)
    trouble = tuple(_on(report, len(reports), report.trouble) for report in reports if report.trouble)
    hang = tuple(_on(report, len(reports), line) for report in reports for line in report.hang)
    first = find_culprit(deaths, is_explained=bool(lost or trouble or hang))
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
        cause=_cause(culprit, losses, trouble, hang, describe_ended(finished, drained)),
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


def find_culprit(deaths: Sequence[Death], *, is_explained: bool = False) -> Death | None:
    """The worker that failed first; None if no worker is to blame.

    It is the first to die that fails by itself: whose last words do not blame a peer that went away or did not
    come to a collective, which `launch` had not told to end, and which does not pass on another rank's failure.
    Without such a worker there is no culprit if the failure `is_explained`; else it is the first that waited for
    others in vain, or the first whose peer went away.

    Args:
        deaths: of all nodes, in order of death.
        is_explained: True if something else than a worker's failure is known, such as a lost node or a hang.
    """
    own = [death for death in deaths if _fails_by_itself(death)]
    if own or is_explained:
        first = (death for death in own if _passed_on_from(death, own) is None)
        return next(first, next(iter(own), None))
    theirs = [death for death in deaths if not (death.is_ours and death.code in _STOP_SIGNALS)]
    waited = [death for death in theirs if _matches(_TIMEOUT, _last_words(death))]
    return next(iter(waited or theirs), None)


def fingerprint(death: Death) -> str | None:
    """A text that is equal for two deaths of the same failure; None if too little is known to compare.

    Numbers, addresses and directories in messages do not count; the innermost frames of a traceback do. A storage
    that was out of reach has none: an outage passes.
    """
    if re.match(_OUTAGE, death.error or ""):
        return None
    if death.kill and "out of memory" in death.kill:
        return "out of memory"
    if death.has_traceback or death.error:
        # A DataLoader notices a dead worker in a signal handler, which may be anywhere.
        is_anywhere = re.search(DATALOADER_WORKER, death.error or "")
        frames = [] if is_anywhere else innermost_frames(death.lines, _FINGERPRINT_FRAMES)
        return "; ".join((normalized(death.error or ""), *frames))
    if death.code in _STOP_SIGNALS:
        return None
    if death.code < 0:
        return signal_name(death.code)
    return f"exit code {death.code}: {normalized(death.lines[-1])}" if death.lines else None


def _sort_others(
    deaths: Sequence[Death], culprit: Death | None, at: float
) -> tuple[tuple[Victim, ...], tuple[int, ...]]:
    """The workers that failed besides the culprit, and the ranks that ended only because launch stopped them."""
    victims = []
    stopped = []
    for death in deaths:
        if death is culprit:
            continue
        loss = _peer_loss(death)
        source = _passed_on_from(death, deaths)
        if source is not None and source is culprit:
            victims.append(Victim(death.rank, f"told of rank {source.rank}'s failure", True, death.at - at))
        elif loss is not None:
            victims.append(Victim(death.rank, loss, True, death.at - at))
        elif _fails_by_itself(death):
            how = death.kill or _shortened(death.error or "") or describe_exit(death.code)
            victims.append(Victim(death.rank, how, False, death.at - at))
        else:
            stopped.append(death.rank)
    return tuple(victims), tuple(sorted(stopped))


def _ended_before(reports: Sequence[NodeReport], culprit: Death | None, at: float) -> dict[int, int]:
    """Ranks that had ended without failing, with their exit codes, if nothing better explains the failure.

    The others waited for them, or lost their connections to them.
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
        return f"{_shortened(culprit.error)} ({how}){why}"
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
        is_timeout=_matches(_TIMEOUT, _last_words(death)),
        ranks=sum(len(report.deaths) + len(report.ended) for report in reports),
        hosts=len({report.host for report in reports}),
    )


def _seconds_until(first: Death | None, reports: Sequence[NodeReport]) -> float:
    """Seconds from the start of a round to its failure, by the monotonic clock of the node that failed."""
    report = next((one for one in reports if first in one.deaths), None) or min(
        reports, key=lambda one: one.at
    )
    return report.seconds + (first.at - report.at if first else 0.0)


def _on(report: NodeReport, nodes: int, line: str) -> str:
    return line if nodes == 1 else f"{report.host}: {line}"


def _fails_by_itself(death: Death) -> bool:
    """True if a worker's death, looked at by itself, has no other explanation than this worker."""
    if _peer_loss(death) is not None:
        return False
    if not death.is_ours or death.kill:
        return True
    return death.has_traceback and not (death.error or "").startswith(("KeyboardInterrupt", "SystemExit"))


def _peer_loss(death: Death) -> str | None:
    """How the verdict puts it that a worker's last words blame a peer; None if they do not."""
    words = _last_words(death)
    if death.kill or re.search(DATALOADER_WORKER, words):
        return None
    if death.has_traceback and not _matches(_DISTRIBUTED, "\n".join((*death.lines, words))):
        return None  # it lost a connection of its own, to a data server perhaps
    if _matches(_TIMEOUT, words):
        return "timed out waiting for others"
    return next((text for pattern, text in _PEER_LOSS if _matches(pattern, words)), None)


def _passed_on_from(death: Death, deaths: Sequence[Death]) -> Death | None:
    """The death of the rank whose failure `death` passes on, as a collective operation does; else None."""
    named = re.match(_FAILURE_OF_RANK, death.error or "")
    if not named or death.kill or int(named[1]) == death.rank:
        return None
    return next((other for other in deaths if other.rank == int(named[1])), None)


def _last_words(death: Death) -> str:
    return death.error or "\n".join(death.lines[-3:])


def _matches(pattern: str, words: str) -> bool:
    return re.search(pattern, words, re.IGNORECASE) is not None


def _shortened(error: str) -> str:
    return error if len(error) <= _LONGEST else f"{error[: _LONGEST - 1]}…"
