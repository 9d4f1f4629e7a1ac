"""What users read on the terminal, one function a message. Pure: no clock, no I/O."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from signal import Signals
from typing import Any

from launcher.diagnosis.verdict import Verdict
from launcher.events import Event, Joined, SaveFailed, SaverEnded, StacksTaken, StopRequested, describe
from launcher.formatting import count, duration, name_ranks
from launcher.reporting.message import Level, Message, Style, detail, error, headline, warning
from launcher.reporting.status_board import StatusBoard
from launcher.round.restart import Again, Decision, Finish, GiveUp
from launcher.round.round import Phase, Round, RoundEndRequest
from launcher.round.saver_flush import Backlog, Flush
from launcher.round.slots import Slots
from launcher.run_dir import as_typed
from launcher.system.gpus import GpuHolder
from launcher.system.left_behind import LeftBehind
from launcher.system.process_state import ProcessState

__all__ = [
    "arguments_differ",
    "cold_start",
    "debug_event",
    "drain_refused",
    "flushed",
    "hang_found",
    "how_it_ends",
    "job_finished",
    "joined",
    "leaving",
    "message_received",
    "next_step",
    "no_secret",
    "notice_kept",
    "phase_in_words",
    "preempted",
    "processes_stuck",
    "progress_missing",
    "recovered",
    "round_ended",
    "round_failed",
    "round_started",
    "save_failed",
    "saver_halted",
    "saver_lost",
    "saver_refused",
    "slots_left_out",
    "stacks_taken",
    "stopping",
    "waiting_for_nodes",
]

_LONGEST_EVENT = 400  # characters
_MOST_LEFT = 8  # processes that are named
_NO_MORE_SAVERS = "no saver is started for this job any more"
_PHASES = {
    Phase.GATHERING: "waiting for nodes",
    Phase.RUNNING: "running",
    Phase.DRAINING: "saving at its next step boundary",
    Phase.DIAGNOSING: "hanging, and being looked at",
    Phase.STOPPING: "stopping",
    Phase.KILLING: "stopping",
    Phase.OVER: "waiting for the other nodes",
    Phase.SETTLED: "between rounds",
}
_PHASES_OF_ONE_NODE = {**_PHASES, Phase.GATHERING: "starting", Phase.OVER: "stopping"}
_ENDS_AFTER_STEP = {
    "leave": "it was told to leave; saving at the next step boundary",
    "join": "nodes are taken in at the next step boundary",
    "scale": "scaling to {workers} at the next step boundary",
    "restart": "a restart at the next step boundary",
}
_ENDS_AT_ONCE = {
    "leave": "it was told to leave; its workers cannot save, and are stopped",
    "join": "nodes are taken in; the workers cannot save, and are stopped",
    "scale": "scaling to {workers}; those that run cannot save, and are stopped",
    "restart": "a restart; the workers cannot save, and are stopped",
}


def phase_in_words(phase: Phase, *, is_alone: bool) -> str:
    """`phase` in a word or two, for a job of one node (`is_alone`) or of several."""
    return (_PHASES_OF_ONE_NODE if is_alone else _PHASES)[phase]


# -- the job and its team


def job_finished(board: StatusBoard, seconds: float, lost: float) -> Message:
    """A job has succeeded: how long it took, how far it got, what is saved, what was lost.

    Args:
        seconds: from the start of `launch`.
        lost: seconds from failures to the next step of all ranks.
    """
    durable = {tier: saved.step for tier, saved in board.saved.items() if tier != "memory"}
    parts = ["" if board.step is None else f"step {board.step}"]
    if durable:
        newest = max(durable.values())
        where = " and ".join(tier for tier, step in durable.items() if step == newest)
        parts.append(f"last checkpoint step {newest} ({where})")
    if board.restarts:
        cost = f", {lost:.1f} s lost" if lost else ""
        parts.append(f"{count(board.restarts, 'restart')}{cost}")
    facts = "; ".join(filter(None, parts))
    return headline(f"finished in {duration(seconds)}" + (f": {facts}" if facts else ""))


def waiting_for_nodes(endpoint: tuple[str, int], nnodes: tuple[int, int]) -> Message:
    host, port = endpoint
    least, most = nnodes
    nodes = f"{least} to {most}" if least < most else f"{least}"
    return detail(f"meeting at {host}:{port}: waiting for {nodes} nodes")


def joined(event: Joined) -> Message:
    hosts = ", ".join(str(hello["host"]) for hello in event.hellos)
    return detail(f"node {event.rank} of {len(event.hellos)}: {hosts}")


def no_secret(endpoint: tuple[str, int]) -> Message:
    host, port = endpoint
    return warning(
        f"this job has no secret: whoever reaches {host}:{port} can stop it, or take part in it and so "
        f"run code on its nodes; give all nodes one with LAUNCH_SECRET or --rdzv-conf secret=FILE "
        f"(docs/security.md)"
    )


def arguments_differ(event: Joined) -> list[Message]:
    """One for each node that has started the script with other arguments than this one."""
    ours = event.hellos[event.rank]["args"]
    return [
        warning(
            f"node {node} ({hello['host']}) has other arguments: {_typed(hello['args'])}; here: {_typed(ours)}"
        )
        for node, hello in enumerate(event.hellos)
        if hello["args"] != ours
    ]


def _typed(args: Iterable[str]) -> str:
    return shlex.join(args) or "none"


def message_received(node: int, message: Mapping[str, Any], round_: Round) -> Message | None:
    """What a node of the team has broadcast; None if users need not know."""
    assert round_.team is not None
    hosts = round_.team.hosts
    is_other = node != round_.team.rank
    match message["kind"]:
        case "lost":
            lost = int(message["node"])
            return warning(f"node {lost} ({hosts[lost]}) is lost: {message['why']}")
        case "waiting" if message["count"]:
            number = message["count"]
            who = "a node waits" if number == 1 else f"{number} nodes wait"
            return detail(f"{who} to be taken in at a step boundary")
        case "stop" if is_other:
            return headline(f"{Signals(message['signum']).name} on {hosts[node]}: the job stops")
        case "wish" if is_other or message["reason"] != "leave":
            request = RoundEndRequest.from_json(message)
            what = (_ENDS_AFTER_STEP if request.can_drain else _ENDS_AT_ONCE)[request.reason]
            on = f"{hosts[node]}: " if len(hosts) > 1 else ""
            return headline(f"{on}{what.format(workers=count(request.slots or 0, 'worker'))}")
        case "hang" if is_other:
            return warning(f"{hosts[node]} has found a hang")
        case _:
            return None


# -- a round


def round_started(round_: Round, logs: Path) -> Message:
    plan = round_.plan
    workers = count(plan.world, "worker")
    if plan.nodes > 1:
        workers += f" on {plan.nodes} nodes, {name_ranks(plan.ranks)} here"
    return detail(f"round {plan.number}: {workers}, output in {as_typed(logs)}")


def recovered(timeline: Mapping[str, float]) -> list[Message]:
    """Every rank has made a step again. `timeline` has seconds since the failure, by what was done then."""
    parts = ", ".join(f"{part.replace('_', ' ')} {seconds:.2f}" for part, seconds in timeline.items())
    return [
        detail(f"recovered; seconds since the failure: {parts}", level=Level.DEBUG),
        detail(f"recovered in {timeline['first_step']:.1f} s"),
    ]


def leaving(event: StopRequested, grace: float, *, can_save: bool) -> Message:
    """The job saves and ends within `grace` seconds."""
    name = Signals(event.signum).name
    who, again = ("launch stop", "`launch stop --now`") if event.is_asked else (name, f"another {name}")
    what = (
        "saving at the next step boundary" if can_save else "stopping, since there is nothing to save yet"
    )
    return headline(f"{who}: {what}, to end within {grace:g} s (--grace); {again} ends it at once")


def notice_kept(signum: int) -> Message:
    return warning(
        f"{Signals(signum).name}: no worker has a Checkpointer yet; as soon as one has, the job saves and ends; "
        f"without one it goes on"
    )


def drain_refused(reason: str) -> Message:
    return warning(f"workers cannot be asked to save, and are stopped: {reason}")


def progress_missing() -> Message:
    return warning(
        "--hang-timeout has nothing to look at yet: no worker has made a Checkpointer or reported a step "
        "(Checkpointer.step does, or launcher.report)"
    )


def hang_found(seconds: float, *, is_draining: bool) -> Message:
    what = "workers have not saved and ended" if is_draining else "no progress"
    return warning(f"{what} for {seconds:.0f} s: looking where the workers are (--hang-timeout)")


def stacks_taken(taken: StacksTaken, seconds: float, *, is_in_verdict: bool) -> Message:
    """Where all workers of this node were that have made no progress for `seconds`."""
    where = f"stacks of all workers here: {as_typed(Path(taken.directory))}"
    if is_in_verdict:
        return detail(where)
    return warning(f"no progress for {seconds:.0f} s:", *(f"  {line}" for line in (*taken.summary, where)))


def stopping(round_: Round, grace: float, left_behind: Sequence[LeftBehind]) -> Message | None:
    """Workers are told to end, or killed; or what they have left behind, if they have all finished.

    Args:
        grace: seconds that they have to end.
    """
    is_killing = round_.phase is Phase.KILLING
    if round_.stop_signal is not None and not is_killing:
        name = Signals(round_.stop_signal).name
        return headline(f"{name}: stopping; workers have {grace:g} s to end, or until another {name}")
    if round_.has_finished:
        return _left_behind(left_behind, grace, is_killing=is_killing) if left_behind else None
    if is_killing:
        left = len(round_.plan.slots) - len(round_.exits)
        return warning(f"killing what has not ended, {left} of the ranks")
    return None


def _left_behind(left: Sequence[LeftBehind], grace: float, *, is_killing: bool) -> Message:
    what = count(len(left), "process", "processes")
    lines = [f"  {one}" for one in left[:_MOST_LEFT]]
    if len(left) > _MOST_LEFT:
        lines.append(f"  and {len(left) - _MOST_LEFT} more")
    if is_killing:
        return warning(f"killing {what} that ranks left behind, which SIGTERM did not end:", *lines)
    return warning(
        f"{what} left behind by ranks, told to end (SIGTERM), within {grace:g} s (--grace):", *lines
    )


def round_ended(round_: Round, decision: Decision, *, has_saver: bool) -> Message | None:
    """A round is over in which nothing went wrong."""
    if round_.stop_signal is not None:
        what = "no worker" if has_saver else "nothing"
        left = "" if round_.is_stuck else f"; {what} is left running"
        return headline(f"stopped by {Signals(round_.stop_signal).name}{left}")
    if round_.cut_off is not None:
        if isinstance(decision, Finish) and round_.cut_off.kind == "over":
            return headline(round_.cut_off.reason)
        again = f"; {decision.reason}" if isinstance(decision, Again) else ""
        return error(f"{round_.cut_off.reason}{again}")
    match decision:
        case GiveUp():
            return error(decision.reason)
        case Again():
            is_drained = round_.end_requests and round_.was_drained
            at = "round ended at a step boundary: " if is_drained else ""
            return detail(f"{at}{decision.reason}")
        case Finish():
            return None


def round_failed(verdict: Verdict, round_: Round) -> Message:
    """The verdict: in full on the first node that is left and on the one that failed, in brief on others."""
    assert round_.team is not None
    me = round_.team.rank
    speaker = min(set(range(round_.team.size)) - set(round_.lost), default=me)
    lines = verdict.render()
    return error(*(lines if me in (speaker, verdict.node) else (*lines[:2], lines[-1])))


def next_step(decision: Decision) -> str:
    """What a decision means, for the last line of a verdict."""
    match decision:
        case Again(pause=0):
            return f"restarting: {decision.reason}"
        case Again():
            return f"restarting in {decision.pause:g} s: {decision.reason}"
        case GiveUp():
            return f"giving up: {decision.reason}; exit code {decision.exit_code}"
        case Finish():
            return f"stopping, as asked; exit code {decision.exit_code}"


def slots_left_out(slots: Slots) -> Message | None:
    """A device is not used any more; None if the node has too few left to go on."""
    if not slots.chosen:
        return None
    out = ", ".join(map(str, slots.left_out))
    return warning(
        f"slot {out} left out, since its worker fails at the start; going on with "
        f"{len(slots.chosen)} of {slots.wanted}; `launch scale` tries it again"
    )


def cold_start(reason: str) -> Message:
    return warning(f"workers start as fresh interpreters, as in --cold: {reason}")


def how_it_ends(seconds: float | None) -> str:
    """What a job does that was told to end; `seconds` are left of its grace, None if it does not save."""
    if seconds is None:
        return "it is stopping already"
    return f"it is saving already, to end within {max(0.0, seconds):.0f} s"


def preempted(step: int | None, durable: Collection[int], *, has_drained: bool) -> Message:
    """The job was told to leave, and has: what it goes on from when it is started again.

    Args:
        step: that the workers had reached; None if they have reported none.
        durable: the newest step in each tier that outlives this launch.
        has_drained: whether every worker has saved and left.
    """
    at = "" if step is None else f" at step {step}"
    if has_drained and (not durable or step in durable):
        return headline(f"saved{at}; start it again to go on")
    if not durable:
        return warning(f"stopped{at}: nothing was saved since this launch began; start it again to go on")
    newest = max(durable)
    if step is None:
        return headline(f"stopped; start it again to go on from step {newest}")
    if step in durable or step < newest:
        return headline(f"stopped{at}, which is saved; start it again to go on")
    lost = f"{count(step - newest, 'step')} later than what is saved"
    return warning(f"stopped{at}, {lost}; start it again to go on from step {newest}")


# -- saves


def save_failed(event: SaveFailed, before: int) -> Message:
    """A checkpoint did not become durable; so did `before` others before it, of the same error."""
    what = f"step {event.step} did not become durable in {event.url}"
    if before:
        return error(f"{what} either: the same error, {before + 1} checkpoints in a row")
    return error(f"{what}: {event.error}")


def saver_refused(reason: str) -> Message:
    return error(f"{reason}; {_NO_MORE_SAVERS}")


def saver_lost(backlog: Backlog, ended: SaverEnded, log: Path, *, is_closed: bool) -> Message:
    """The saver has ended unasked; `is_closed`: it does so each time, and is not started again."""
    closed = f"; it keeps ending: {_NO_MORE_SAVERS}" if is_closed else ""
    return warning(f"{backlog.describe_loss(ended, str(as_typed(log)))}{closed}")


def saver_halted(halt: str | None, pid: int | None) -> Message:
    """The saver cannot go on, since it is `halt`; or it can again (None)."""
    if halt is None:
        return detail(f"the saver (pid {pid}) goes on")
    return warning(f"the saver (pid {pid}) is {halt}: nothing becomes durable until it goes on")


def flushed(flush: Flush, pid: int | None, log: Path) -> Message | None:
    """How the wait for the saver ended; None if it had nothing to make durable."""
    text = flush.render(pid, str(as_typed(log)))
    if not text:
        return None
    return headline(text) if flush.succeeded else Message((text,), Style.RED, Level.WARNING)


def processes_stuck(left: Sequence[ProcessState], holders: Sequence[GpuHolder]) -> Message | None:
    """Processes that even SIGKILL does not end; some of them may hold GPUs. None if there are none."""
    if not left:
        return None
    lines = []
    for process in left:
        devices = [holder.device for holder in holders if holder.pid == process.pid]
        held = f", holds {', '.join(devices)}" if devices else ""
        state = process.kernel or f"in state {process.state}"
        lines.append(f"  pid {process.pid} is {state}{held}: {process.command}")
    return error(f"{count(len(left), 'process', 'processes')} left that even SIGKILL does not end:", *lines)


def debug_event(event: Event) -> Message:
    """For --log-level debug."""
    return detail(describe(event)[:_LONGEST_EVENT], level=Level.DEBUG)
