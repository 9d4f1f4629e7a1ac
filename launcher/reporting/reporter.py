"""What people and programs are told of a job: the terminal, the journal, the status, metrics. Decides nothing."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from signal import Signals
from typing import Any

from launcher import clock
from launcher.config.job import Config
from launcher.diagnosis.tracebacks import normalized
from launcher.diagnosis.verdict import Verdict
from launcher.errors import ExitCode
from launcher.events import (
    Event,
    Joined,
    MemberNews,
    RequestReceived,
    SavedByWorkers,
    SaveFailed,
    SavePersisted,
    SaverEnded,
    SaveStaged,
    StacksTaken,
    StopRequested,
    Tick,
    describe,
)
from launcher.formatting import count, name_ranks
from launcher.progress import Progress
from launcher.reporting.console import Console, Level, Sink
from launcher.reporting.journal import Journal
from launcher.reporting.status import Status
from launcher.reporting.status_board import StatusBoard, finished_in_words
from launcher.round.restart import Again, Decision, Finish, GiveUp, History
from launcher.round.round import Phase, Round, RoundEndRequest
from launcher.round.saver_flush import Backlog, Flush
from launcher.round.slots import Slots
from launcher.run_dir import RankFiles, RunDir, as_typed
from launcher.system.gpus import GpuHolder
from launcher.system.left_behind import LeftBehind
from launcher.system.process_state import ProcessState

__all__ = ["Reporter"]

_NO_MORE_SAVERS = "no saver is started for this job any more"
_BOLD, _DIM, _ALARM, _WARN = 1, 2, 31, 33  # ANSI styles
_LONGEST_EVENT = 400  # characters
_MOST_LEFT = 8  # processes that are named
_PROGRESS_SECONDS = 5.0  # between two lines of progress in the journal
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
_PHASES_ALONE = {**_PHASES, Phase.GATHERING: "starting", Phase.OVER: "stopping"}


class Reporter:
    """Everything that one agent has to say. Its methods return at once, but for `close`."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        self._config = config
        self._run_dir = run_dir
        level = max(Level[config.log_level.upper()], Level.WARNING if config.quiet else Level.DEBUG)
        self._is_debugging = level == Level.DEBUG
        self._console = Console(Sink(1), Sink(2), level)
        self._journal = Journal(run_dir.journal, self._warn)
        self._board = StatusBoard(config.directory.name)
        self._metrics = None
        if config.metrics_port is not None:
            from launcher.reporting.metrics import Metrics

            try:
                self._metrics = Metrics(config.metrics_port)
            except BaseException:
                self._console.close()
                raise
        self._left_at: tuple[int | None, bool] = (None, False)  # step, and whether all saved there
        self._phases = _PHASES_ALONE if config.is_alone else _PHASES
        self._has_told_silence = False
        self._began = time.monotonic()
        self._save_error = ""  # of the last save that failed, without numbers and paths
        self._lost = 0.0  # seconds, from failures to the next step of all ranks
        self._has_told_trust = False
        self._saver_halt: str | None = None
        self._progress_told: tuple[float, int | None] = (0.0, None)  # when, and which step

    @property
    def newest_saved(self) -> int | None:
        """The step of the newest checkpoint in any tier, as far as the saver has told."""
        return self._board.newest_saved

    @property
    def is_only_in_memory(self) -> bool:
        """Whether that is in no tier that outlives the node's saver."""
        return self._board.is_only_in_memory

    def close(self) -> None:
        """Print everything to the end. Waits as long as the reader takes."""
        if self._metrics is not None:
            self._metrics.close()
        self._console.close()
        self._journal.close()

    # -- the job

    def job_started(self) -> None:
        config = self._config
        self._journal.record(
            "job_started",
            command=[config.command.target, *config.command.args],
            nproc=[config.min_nproc, config.nproc],
            nodes=list(config.nnodes),
            pid=os.getpid(),
            host=os.uname().nodename,
        )

    def job_ended(self, exit_code: int, reason: str) -> None:
        self._board = self._board.in_phase("ended")
        self._journal.record("job_ended", exit_code=exit_code, reason=reason)
        if exit_code == ExitCode.OK and not reason and self._board.round:
            took = time.monotonic() - self._began
            self._console.say(finished_in_words(self._board, took, self._lost), style=_BOLD)

    # -- the team

    def gathering(self) -> None:
        self._board = self._board.in_phase(self._phases[Phase.GATHERING])
        if not self._config.is_alone:
            host, port = self._config.rdzv_endpoint
            least, most = self._config.nnodes
            nodes = f"{least} to {most}" if least < most else f"{least}"
            self._console.say(f"meeting at {host}:{port}: waiting for {nodes} nodes", style=_DIM)

    def joined(self, event: Joined, *, has_secret: bool) -> None:
        hosts = ", ".join(str(hello["host"]) for hello in event.hellos)
        self._console.say(f"node {event.rank} of {len(event.hellos)}: {hosts}", style=_DIM)
        self._journal.record("node_joined", node=event.rank, hosts=hosts)
        if event.rank == 0 and not has_secret and not self._has_told_trust:
            self._has_told_trust = True
            host, port = self._config.rdzv_endpoint
            self._warn(
                f"this job has no secret: whoever reaches {host}:{port} can stop it, or take part in it and so "
                f"run code on its nodes; give all nodes one with LAUNCH_SECRET or --rdzv-conf secret=FILE "
                f"(docs/security.md)"
            )
        mine = event.hellos[event.rank]["args"]
        for node, hello in enumerate(event.hellos):
            if hello["args"] != mine:
                theirs, ours = (shlex.join(args) or "none" for args in (hello["args"], mine))
                self._warn(f"node {node} ({hello['host']}) has other arguments: {theirs}; here: {ours}")

    def heard(self, node: int, message: Mapping[str, Any], round_: Round) -> None:
        """What a node has said, where users want to know."""
        assert round_.team is not None
        hosts = round_.team.hosts
        match message["kind"]:
            case "lost":
                lost, why = int(message["node"]), str(message["why"])
                self._warn(f"node {lost} ({hosts[lost]}) is lost: {why}")
                self._journal.record("node_lost", node=lost, host=hosts[lost], why=why)
            case "waiting" if message["count"]:
                number = message["count"]
                who = "a node waits" if number == 1 else f"{number} nodes wait"
                self._console.say(f"{who} to be taken in at a step boundary", style=_DIM)
            case "stop" if node != round_.team.rank:
                name = Signals(message["signum"]).name
                self._console.say(f"{name} on {hosts[node]}: the job stops", style=_BOLD)
            case "wish":
                wish = RoundEndRequest.from_json(message)
                self._journal.record("drain_requested", reason=wish.reason, by=hosts[node])
                if node != round_.team.rank or wish.reason != "leave":
                    on = f"{hosts[node]}: " if len(hosts) > 1 else ""
                    how = (_WISHES if wish.can_drain else _AT_ONCE)[wish.reason].format(
                        workers=count(wish.slots or 0, "worker")
                    )
                    self._console.say(f"{on}{how}", style=_BOLD)
            case "hang" if node != round_.team.rank:
                self._warn(f"{hosts[node]} has found a hang")

    # -- a round

    def round_started(self, round_: Round, files: Sequence[RankFiles], history: History) -> None:
        plan = round_.plan
        assert round_.team is not None
        self._board = self._board.began_round(
            plan.number,
            dict.fromkeys(plan.ranks, round_.team.hosts[plan.node]),
            now=clock.now(),
            world=plan.world,
            nodes=plan.nodes,
            restarts=history.restarts,
        )
        self._console.follow(files, self._config.shown)
        workers = count(plan.world, "worker")
        if plan.nodes > 1:
            workers += f" on {plan.nodes} nodes, {name_ranks(plan.ranks)} here"
        logs = as_typed(files[0].out.parent)
        self._console.say(f"round {plan.number}: {workers}, output in {logs}", style=_DIM)
        self._journal.record(
            "round_started",
            round=plan.number,
            world=plan.world,
            nodes=plan.nodes,
            restarts=history.restarts,
            slots=plan.slots,
        )

    def phase_entered(self, phase: Phase) -> None:
        self._board = self._board.in_phase(self._phases[phase])

    def progress_read(self, progress: Mapping[int, Progress], round_: Round) -> None:
        """How far workers are, about once a second."""
        now = clock.now()
        seen = {rank: one for rank, one in progress.items() if one.step is not None}
        self._board = self._board.sampled(seen, now)
        self.phase_entered(round_.phase)
        status = self._board.status(now)
        if self._console.has_live_view:
            self._console.live(status.render(self._console.paint))
        if self._metrics is not None:
            self._metrics.update(status)
        if now - self._progress_told[0] >= _PROGRESS_SECONDS:
            self._record_progress(status)

    def _record_progress(self, status: Status) -> None:
        if status.step is not None and status.step != self._progress_told[1]:
            self._progress_told = (status.time, status.step)
            self._journal.record(
                "progress", round=status.round, step=status.step, rate=status.rate, loss=status.loss
            )

    def recovered(self, timeline: Mapping[str, float]) -> None:
        """Every rank has made a step again. Seconds since the failure, by what was done then."""
        self._journal.record("recovered", round=self._board.round, **timeline)
        self._lost += timeline["first_step"]
        parts = ", ".join(f"{part.replace('_', ' ')} {seconds:.2f}" for part, seconds in timeline.items())
        self._console.say(f"recovered; seconds since the failure: {parts}", style=_DIM, level=Level.DEBUG)
        self._console.say(f"recovered in {timeline['first_step']:.1f} s", style=_DIM)

    def leaving(self, event: StopRequested, grace: float, *, can_save: bool) -> None:
        name = Signals(event.signum).name
        who, again = (
            (name, f"another {name}") if not event.is_asked else ("launch stop", "`launch stop --now`")
        )
        what = (
            "saving at the next step boundary"
            if can_save
            else "stopping, since there is nothing to save yet"
        )
        self._console.say(
            f"{who}: {what}, to end within {grace:g} s (--grace); {again} ends it at once", style=_BOLD
        )

    def notice_kept(self, signum: int) -> None:
        """Nobody can answer a notice yet."""
        name = Signals(signum).name
        self._warn(
            f"{name}: no worker has a Checkpointer yet; as soon as one has, the job saves and ends; without one "
            f"it goes on"
        )

    def drain_refused(self, reason: str) -> None:
        self._warn(f"workers cannot be asked to save, and are stopped: {reason}")

    def hang_found(self, seconds: float, *, is_draining: bool) -> None:
        what = "workers have not saved and ended" if is_draining else "no progress"
        self._warn(f"{what} for {seconds:.0f} s: looking where the workers are (--hang-timeout)")

    def stacks_taken(self, taken: StacksTaken, still: float, *, is_in_verdict: bool) -> None:
        """Where all workers of this node were that made no progress."""
        self._journal.record(
            "hang", round=self._board.round, summary=taken.summary, directory=taken.directory
        )
        where = f"stacks of all workers here: {as_typed(Path(taken.directory))}"
        if is_in_verdict:
            self._console.say(where, style=_DIM)
        else:
            lines = [f"  {line}" for line in (*taken.summary, where)]
            self._warn(f"no progress for {still:.0f} s:", *lines)

    def stopping(self, round_: Round, grace: float, left_behind: Sequence[LeftBehind]) -> None:
        """Workers are told to end, or killed; or what they have left behind, if they have all finished."""
        if round_.stop_signal is not None and round_.phase is Phase.STOPPING:
            name = Signals(round_.stop_signal).name
            patience = f"workers have {grace:g} s to end, or until another {name}"
            self._console.say(f"{name}: stopping; {patience}", style=_BOLD)
        elif round_.has_finished:
            self._left_behind(round_.phase, grace, left_behind)
        elif round_.phase is Phase.KILLING:
            left = len(round_.plan.slots) - len(round_.exits)
            text = f"killing what has not ended, {left} of the ranks"
            self._warn(text)
        if round_.stop_signal is None and not round_.has_finished:
            self._console.mute_victims([exit_.rank for exit_ in round_.exits])

    def _left_behind(self, phase: Phase, grace: float, left: Sequence[LeftBehind]) -> None:
        if not left:
            return
        what = count(len(left), "process", "processes")
        if phase is Phase.KILLING:
            self._warn(f"killing {what} that ranks left behind, which SIGTERM did not end:", *_lines(left))
            return
        self._journal.record("left_behind", processes=[str(one) for one in left])
        self._warn(
            f"{what} left behind by ranks, told to end (SIGTERM), within {grace:g} s (--grace):",
            *_lines(left),
        )

    def workers_ended(self, progress: Mapping[int, Progress], round_: Round) -> None:
        """The workers are dead: tell the rest of what they wrote."""
        self._console.unfollow()
        self.progress_read(progress, round_)
        self._record_progress(self._board.status(clock.now()))

    def round_ended(self, round_: Round, decision: Decision, *, has_saver: bool) -> None:
        """A round is over in which nothing went wrong."""
        if round_.end_requests and _have_all_drained(round_):
            self._journal.record("drained", step=round_.step)
        if round_.stop_signal is not None:
            name = Signals(round_.stop_signal).name
            what = "no worker" if has_saver else "nothing"
            left = "" if round_.is_stuck else f"; {what} is left running"
            self._console.say(f"stopped by {name}{left}", style=_BOLD)
        elif isinstance(decision, Finish) and round_.cut_off is not None and round_.cut_off.kind == "over":
            self._console.say(round_.cut_off.reason, style=_BOLD)
        elif round_.cut_off is not None:
            again = f"; {decision.reason}" if isinstance(decision, Again) else ""
            self._alarm(f"{round_.cut_off.reason}{again}")
        elif isinstance(decision, Finish) and decision.exit_code == ExitCode.PREEMPTED:
            self._left_at = (round_.step, _have_all_drained(round_))
        elif isinstance(decision, GiveUp):
            self._alarm(decision.reason)
        elif isinstance(decision, Again):
            at = (
                "round ended at a step boundary: "
                if round_.end_requests and _have_all_drained(round_)
                else ""
            )
            self._console.say(f"{at}{decision.reason}", style=_DIM)

    def preempted(self) -> None:
        """The job was told to leave, and has: what it goes on from when it is started again."""
        step, has_drained = self._left_at
        at = "" if step is None else f" at step {step}"
        durable = [saved.step for tier, saved in self._board.saved.items() if tier != "memory"]
        if has_drained and (not durable or step in durable):
            self._console.say(f"saved{at}; start it again to go on", style=_BOLD)
            return
        if step is not None and step in durable:
            self._console.say(f"stopped{at}, which is saved; start it again to go on", style=_BOLD)
            return
        if not durable:
            self._warn(f"stopped{at}: nothing was saved since this launch began; start it again to go on")
        elif step is None:
            self._console.say(f"stopped; start it again to go on from step {max(durable)}", style=_BOLD)
        else:
            lost = f"{count(step - max(durable), 'step')} later than what is saved"
            self._warn(f"stopped{at}, {lost}; start it again to go on from step {max(durable)}")

    def how_it_ends(self, leave_by: float | None) -> str:
        """What a job does that was told to end; `leave_by` is when it has to have ended, monotonic."""
        if leave_by is None:
            return "it is stopping already"
        left = max(0.0, leave_by - time.monotonic())
        return f"it is saving already, to end within {left:.0f} s"

    def slots_left_out(self, slots: Slots) -> None:
        """A device is not used any more."""
        out = ", ".join(map(str, slots.left_out))
        if slots.chosen:
            self._warn(
                f"slot {out} left out, since its worker fails at the start; going on with "
                f"{len(slots.chosen)} of {slots.wanted}; `launch scale` tries it again"
            )

    def progress_missing(self) -> bool:
        """Hangs are looked for, and no worker tells how far it is. False if that is told already."""
        is_news, self._has_told_silence = not self._has_told_silence, True
        if is_news:
            self._warn(
                "--hang-timeout has nothing to look at yet: no worker has made a Checkpointer or reported a step "
                "(Checkpointer.step does, or launcher.report)"
            )
        return is_news

    def round_failed(self, verdict: Verdict, round_: Round) -> None:
        """A round is over in which something went wrong: the verdict, once in full for all nodes."""
        assert round_.team is not None
        me = round_.team.rank
        speaker = min(set(range(round_.team.size)) - set(round_.lost), default=me)
        lines = verdict.render()
        if me not in (speaker, verdict.node):
            lines = [*lines[:2], lines[-1]]
        self._alarm(*lines)
        self._board = self._board.failed(_kind(verdict))
        self._journal.record("failure", **asdict(verdict))
        try:
            self._run_dir.record(verdict.to_json())
        except OSError as error:  # a full disk is no reason to end the job
            self._warn(f"verdict not recorded: {error}")

    def cold_start(self, reason: str) -> None:
        text = f"workers start as fresh interpreters, as in --cold: {reason}"
        self._warn(text)

    # -- saves

    def on_event(self, event: Event) -> None:
        """What the agent hears; users are told of saves, and of what a node waits for."""
        if self._is_debugging and not isinstance(event, Tick):
            self._console.say(describe(event)[:_LONGEST_EVENT], style=_DIM, level=Level.DEBUG)
        self._board = self._board.after(event, clock.now())
        match event:
            case SaveStaged(step=step):
                self._journal.record("staged", step=step)
            case SavePersisted():
                self._save_error = ""
                self._journal.record(
                    "persisted", step=event.step, tier=event.tier, url=event.url, seconds=event.seconds
                )
            case SavedByWorkers(step=step, tier=tier):
                self._journal.record("persisted", step=step, tier=tier)
            case SaveFailed(again=False):
                self._journal.record(
                    "save_failed", step=event.step, tier=event.tier, url=event.url, error=event.error
                )
                kind = normalized(event.error)
                error = "the same" if kind == self._save_error else event.error
                self._save_error = kind
                self._alarm(f"step {event.step} did not become durable in {event.url}: {error}")
            case MemberNews(text=text, is_bad=True):
                self._warn(text)
            case MemberNews(text=text, phase=phase):
                self._board = self._board.in_phase(phase or self._board.phase)
                self._console.say(text, style=_DIM)

    def saver_refused(self, reason: str) -> None:
        self._alarm(f"{reason}; {_NO_MORE_SAVERS}")

    def saver_lost(self, backlog: Backlog, ended: SaverEnded, *, is_closed: bool) -> None:
        text = backlog.describe_loss(ended, str(as_typed(self._run_dir.saver_log)))
        if is_closed:
            text += f"; it keeps ending: {_NO_MORE_SAVERS}"
        self._warn(text)

    def flushing(self, drain: Flush) -> None:
        """The workers are gone, and the saver makes durable what is left."""
        self._board = self._board.in_phase("persisting")
        if drain.backlog.pending:
            self._console.show(f"persisting {drain.backlog}")

    def saver_halted(self, halt: str | None, pid: int | None) -> None:
        """Why the saver cannot go on; None if it can."""
        was, self._saver_halt = self._saver_halt, halt
        if halt and not was:
            self._journal.record("saver_halted", pid=pid, reason=halt)
            self._warn(f"the saver (pid {pid}) is {halt}: nothing becomes durable until it goes on")
        elif was and not halt and pid is not None:
            self._console.say(f"the saver (pid {pid}) goes on", style=_DIM)

    def flushed(self, drain: Flush, pid: int | None) -> str:
        """Tell how the wait for the saver ended. Returns what was told."""
        told = drain.render(pid, str(as_typed(self._run_dir.saver_log)))
        if told:
            good = drain.succeeded
            level = Level.INFO if good else Level.WARNING
            self._console.say(told, style=_BOLD if good else _ALARM, level=level)
        return told

    def processes_stuck(self, left: Sequence[ProcessState], holders: Sequence[GpuHolder]) -> None:
        """Processes are left that nothing can end, and some of them may hold GPUs."""
        lines = []
        for process in left:
            devices = [holder.device for holder in holders if holder.pid == process.pid]
            held = f", holds {', '.join(devices)}" if devices else ""
            state = process.kernel or f"in state {process.state}"
            lines.append(f"  pid {process.pid} is {state}{held}: {process.command}")
        if lines:
            what = f"{count(len(lines), 'process', 'processes')} left that even SIGKILL does not end:"
            self._alarm(what, *lines)

    # -- for those who ask

    def request_received(self, asked: RequestReceived) -> None:
        """A user wants something of the job."""
        self._journal.record("control", verb=asked.verb, number=asked.number)

    def status(self) -> dict[str, object]:
        return {"status": self._board.status(clock.now()).to_json()}

    @property
    def phase(self) -> str:
        """What the job does, in a word or two."""
        return self._board.phase

    @staticmethod
    def next_in_words(decision: Decision) -> str:
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

    def _warn(self, *lines: str) -> None:
        self._console.say(*lines, style=_WARN, level=Level.WARNING)

    def _alarm(self, *lines: str) -> None:
        self._console.say(*lines, style=_ALARM, level=Level.ERROR)


_WISHES = {
    "leave": "it was told to leave; saving at the next step boundary",
    "join": "nodes are taken in at the next step boundary",
    "scale": "scaling to {workers} at the next step boundary",
    "restart": "a restart at the next step boundary",
}
_AT_ONCE = {
    "leave": "it was told to leave; its workers cannot save, and are stopped",
    "join": "nodes are taken in; the workers cannot save, and are stopped",
    "scale": "scaling to {workers}; those that run cannot save, and are stopped",
    "restart": "a restart; the workers cannot save, and are stopped",
}


def _lines(left: Sequence[LeftBehind]) -> list[str]:
    lines = [f"  {one}" for one in left[:_MOST_LEFT]]
    return [*lines, f"  and {len(left) - _MOST_LEFT} more"] if len(left) > _MOST_LEFT else lines


def _have_all_drained(round_: Round) -> bool:
    """Whether workers have run, and all of them have saved or finished."""
    reports = round_.reports.values()
    return bool(reports) and all(report.has_drained for report in reports)


def _kind(verdict: Verdict) -> str:
    """What it was, in a word, for those who count."""
    if verdict.hang:
        return "hang"
    if verdict.kill is not None:
        return "oom"
    if verdict.rank is None:
        if verdict.finished or verdict.drained:
            return "crash"
        return "node" if verdict.lost else "launcher"
    return "crash" if verdict.code is not None and verdict.code >= 0 else "signal"
