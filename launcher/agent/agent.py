"""The agent: starts the workers of a job on this node, watches them, and starts them again when one fails."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from launcher import clock
from launcher.agent.control import Control
from launcher.agent.control_record import RECORD
from launcher.agent.monitor import Monitor
from launcher.agent.saver_handle import SaverHandle
from launcher.agent.worker_env import worker_orders
from launcher.agent.workers import Workers
from launcher.config.command import Kind
from launcher.config.job import Config
from launcher.config.secret import Secret, find_secret
from launcher.diagnosis.death import read_death
from launcher.diagnosis.judge import find_culprit, fingerprint, judge
from launcher.diagnosis.reports import Death, NodeReport
from launcher.diagnosis.stack_dump import StackTaker
from launcher.errors import ExitCode, InternalError, LaunchError, RunDirError, UsageError, shell_code
from launcher.events import (
    DeadlinePassed,
    Event,
    Joined,
    MemberFailed,
    MessageReceived,
    RequestReceived,
    SaverEnded,
    SaverWanted,
    StacksTaken,
    StopRequested,
    Tick,
    WorkerExited,
    WorkerStarted,
    ZygoteReady,
)
from launcher.rendezvous.client import MemberHandle, RendezvousSettings, SingleNodeClient, TeamClient
from launcher.rendezvous.master_port import reserve_master_port
from launcher.rendezvous.team import Ready
from launcher.reporting.messages import how_it_ends, next_step
from launcher.reporting.reporter import Reporter
from launcher.round.preemption import Answer, answer_signal
from launcher.round.recovery import Recovery
from launcher.round.restart import Again, Decision, Finish, GiveUp, History, Limits, decide
from launcher.round.round import Phase, Round, RoundEndRequest
from launcher.round.saver_flush import Backlog, Flush
from launcher.round.slots import Slots
from launcher.run_dir import RunDir
from launcher.system.gpus import find_gpu_holders
from launcher.system.left_behind import LeftBehind, find_left_behind
from launcher.system.oom import OomWatch
from launcher.system.process_state import ProcessState, read_remaining_state
from launcher.system.processes import Subreaper, descendant_pids
from launcher.zygote.handle import ZygoteHandle

__all__ = ["Agent"]

_TICK = 1.0  # seconds between looks at how far the workers are
_KILL_PATIENCE = 10.0  # seconds that dead processes get to disappear (uninterruptible sleep)
_SLACK = 5.0  # seconds more that other nodes get for what takes this one no time
_DIAGNOSIS_PATIENCE = 30.0  # seconds that taking stacks may take
_HANG_REPORT = 600.0  # seconds without progress after which stacks are taken, if nothing else is asked for
_HELPERS = 0.3  # seconds for helpers of libraries to find out that their rank has finished
_SILENCE = 30.0  # seconds after which it is told that no worker reports steps, if hangs are looked for
_JOIN_PATIENCE = 30.0  # seconds after which workers that report nothing are taken not to be able to drain
# Of the grace that a scheduler gives: to reach a step boundary, and to end after that was missed.
_DRAIN_SHARE, _STOP_SHARE = 0.7, 0.1


class Agent:
    """Runs one job on this node. Enter it as a context, then call `run`, once.

    On leaving the context no process that it started exists any more, but for a saver that still
    persists when it is not waited for any longer, the node's part in the rendezvous while other nodes
    depend on it, and processes that even SIGKILL does not end.
    """

    def __init__(self, config: Config, zygote: ZygoteHandle, reaper: Subreaper) -> None:
        self.config = config
        self._zygote = zygote
        self._reaper = reaper
        with ExitStack() as undo:
            undo.callback(zygote.close)
            if config.is_alone:
                with reserve_master_port(config.master_addr, config.master_port):
                    pass  # what is wrong with them is found before anything is changed
            self._run_dir = RunDir(config.directory, config.logs, is_shared=not config.is_alone)
            undo.callback(self._run_dir.close)
            self._reporter = Reporter(config, self._run_dir)
            undo.callback(self._reporter.close)
            self._control = Control(self._run_dir.own / RECORD)
            undo.callback(self._control.close)
            self._secret = _secret(config, self._run_dir)
            self._team_client = _team_client(config, self._secret, self._run_dir, reaper)
            undo.pop_all()
        self._monitor = Monitor()
        self._saver = SaverHandle(self._run_dir.saver_log, reaper)
        self._backlog: Backlog | None = None  # of the saver that runs
        self._stacks = StackTaker()
        self._stack_askers: list[int] = []
        self._oom = OomWatch()
        self._limits = Limits(config.max_restarts, config.crash_loop, config.nnodes[0])
        self._history = History()
        self._slots = Slots(config.nproc, config.nproc, config.min_nproc)
        self._addr = config.master_addr  # of this node, as others reach it
        self._meeting = ExitStack()  # the port that is held for the round
        self._workers = Workers()
        self._forget_round()
        self._recovery: Recovery | None = None
        self._can_resume = False  # workers have said that they can save when they are asked to
        self._leave_by: float | None = None  # monotonic: when a scheduler will have lost its patience
        self._left_for: StopRequested | None = None  # why it is to be left
        self._kept: StopRequested | None = None  # a notice that nobody can answer yet
        self._left: list[ProcessState] = []  # processes that nothing can end

    def __enter__(self) -> Agent:
        self._monitor.__enter__()
        self._watch()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        if isinstance(exc, LaunchError):
            self._reporter.job_ended(exc.exit_code, str(exc))
        with ExitStack() as closing:  # from the last to the first, whatever fails
            closing.callback(self._run_dir.close)
            closing.callback(self._reporter.close)
            closing.push(self._monitor)
            closing.callback(self._meeting.close)
            closing.callback(self._stacks.close)
            closing.callback(self._control.close)
            closing.callback(self._team_client.close)
            closing.callback(self._saver.close)
            closing.callback(self._zygote.close, 0.0 if self._left else _KILL_PATIENCE)

    def run(self) -> int:
        """Run the job to its end, and return the exit code of `launch`."""
        self._reporter.job_started()
        self._monitor.set_ticks(_TICK)
        team = None
        decision: Decision = Again(self._history, "", same_team=False)
        while isinstance(decision, Again):
            round_ = self._gather(decision, Round(team if decision.same_team else None))
            for event in self._monitor.events():
                before, round_ = round_, self._next_round_state(round_, event)
                self._handle_event(event, round_)
                if round_.phase is not before.phase:
                    self._enter_phase(round_)
                elif round_.phase is Phase.DRAINING and round_.end_requests != before.end_requests:
                    self._request_drain(round_)
                if round_.phase is Phase.SETTLED:
                    break
            decision = self._conclude(round_)
            team = round_.team
        return self._end(decision)

    # -- a round

    def _gather(self, decision: Again, round_: Round) -> Round:
        """Come together with the other nodes, or with those of the round before after a pause."""
        self._history = decision.history
        self._forget_round()
        self._monitor.set_deadline(decision.pause)
        return self._leave(round_) if self._is_leaving else round_

    def _join(self) -> None:
        self._reporter.gathering()
        self._team_client.join(
            {
                "host": os.uname().nodename,
                "job": _describe_job(self.config),
                "args": list(self.config.command.args),
                "history": self._history.to_json(),
            }
        )

    def _forget_round(self) -> None:
        self._workers = Workers(usual_start=self._workers.usual_start)
        self._has_told_hang = False
        self._hung_at: tuple[str, ...] = ()
        self._waited = 0.0  # seconds, for nodes that should have spoken
        self._meeting.close()

    def _next_round_state(self, round_: Round, event: Event) -> Round:
        """The round after `event`. A scheduler's signal asks to save and leave, where workers can save."""
        if isinstance(event, StopRequested) and not self._is_second_signal(round_, event):
            self._read_progress()
            answer = answer_signal(
                event.signum,
                can_save=self._workers.can_drain,
                can_resume=self._can_resume or self._finds_resumable(),
                is_started=round_.is_started,
            )
            if answer is Answer.LEAVE:
                return self._begin_to_leave(round_, event)
            if answer is Answer.KEEP:
                self._kept = event
                self._reporter.notice_kept(event.signum)
                return round_
            self._team_client.broadcast({"kind": "stop", "signum": event.signum})
        after = round_.after(event)
        return self._leave(after) if isinstance(event, MemberFailed) and self._is_leaving else after

    def _finds_resumable(self) -> bool:
        """Whether the job has saved before, or its script names what saves, though no worker has said so yet."""
        return self._run_dir.has_saved() or self.config.command.names_checkpointer

    def _begin_to_leave(self, round_: Round, event: StopRequested) -> Round:
        """Have the job save and end within the grace, from now on."""
        is_news = not self._is_leaving
        by = time.monotonic() + self.config.grace
        self._leave_by = by if self._leave_by is None else min(by, self._leave_by)
        self._left_for, self._kept = event, None
        if round_.is_started:
            self._reporter.leaving(event, self.config.grace, can_save=self._workers.can_drain)
        if is_news:
            return self._leave(round_)
        if round_.phase is Phase.DRAINING:
            self._request_drain(round_)
        return round_

    @property
    def _is_leaving(self) -> bool:
        """Whether a scheduler has told this node to end, and the job can be resumed."""
        return self._leave_by is not None

    def _is_second_signal(self, round_: Round, event: StopRequested | None = None) -> bool:
        """Whether a signal is not the first. A scheduler sends SIGTERM some time after a notice by SIGUSR1."""
        before = self._left_for
        follows = before is not None and before.signum == signal.SIGUSR1
        is_second = event is not None and event.signum == signal.SIGTERM and not event.is_asked and follows
        return round_.stop_signal is not None or (self._is_leaving and not is_second)

    def _leave(self, round_: Round) -> Round:
        """Tell the other nodes that this one leaves; `round_` without them, if it is in no team."""
        if round_.team is None or round_.cut_off is not None:
            return round_.withdrawn()
        self._request_round_end(round_, "leave")
        return round_

    def _request_round_end(
        self,
        round_: Round,
        reason: str,
        *,
        slots: int | None = None,
        without: tuple[int, ...] = (),
        at_once: bool = False,
    ) -> None:
        """Tell all nodes why the round should end, at its next step boundary or `at_once`."""
        assert round_.team is not None
        request = RoundEndRequest(
            reason, round_.team.rank, self._workers.can_drain and not at_once, slots, without
        )
        self._team_client.broadcast(request.to_json())

    def _handle_event(self, event: Event, round_: Round) -> None:
        """Do what an event asks for, and tell of it, where that does not change the round's phase."""
        if self._backlog is not None:
            self._backlog = self._backlog.after(event)
        self._reporter.on_event(event)
        match event:
            case Joined(rank=rank, hellos=hellos):
                self._history = History.of_team([History.from_json(hello["history"]) for hello in hellos])
                if not self.config.is_alone:
                    self._addr = hellos[rank]["addr"]
                    self._reporter.joined(event, has_secret=self._secret is not None)
                self._get_ready(round_)
            case DeadlinePassed() if round_.phase is Phase.GATHERING and round_.team is None:
                self._join()
            case DeadlinePassed() if round_.phase is Phase.GATHERING:
                self._get_ready(round_)
            case MessageReceived(node=node, message=message) if round_.team is not None:
                self._reporter.message_received(node, message, round_)
            case WorkerStarted(rank=rank, pid=pid):
                self._workers.pids[rank] = pid
                if self._recovery is not None and self._workers.have_all_started:
                    self._recovery = replace(self._recovery, forked=clock.now())
            case WorkerExited(rank=rank):
                self._workers.end(rank)
            case Tick():
                self._look(round_)
            case StacksTaken():
                self._tell_stacks(event, round_)
            case RequestReceived():
                self._answer(event, round_)
            case ZygoteReady():
                self._check_zygote(event)
            case SaverWanted():
                self._start_saver()
            case SaverEnded():
                self._on_saver_ended(event)

    def _enter_phase(self, round_: Round) -> None:
        """Do what the phase asks for that the round has just entered."""
        self._reporter.phase_entered(round_.phase)
        match round_.phase:
            case Phase.RUNNING:
                self._start_workers(round_)
            case Phase.DRAINING:
                self._request_drain(round_)
            case Phase.DIAGNOSING:
                self._hung_at = self._workers.places()
                self._reporter.hang_found(self._workers.still, is_draining=self._workers.are_draining)
                self._monitor.set_deadline(_DIAGNOSIS_PATIENCE)
                self._take_stacks(round_)
            case Phase.STOPPING | Phase.KILLING:
                self._stop_workers(round_)
            case Phase.SETTLED if round_.cut_off is not None and self._workers.files:
                self._tell_end_of_workers(round_)
            case Phase.OVER:
                self._monitor.set_deadline(None)
                self._tell_end_of_workers(round_)
                self._team_client.broadcast({"kind": "report", "report": self._report(round_).to_json()})

    def _get_ready(self, round_: Round) -> None:
        assert round_.team is not None
        port = 0
        if round_.team.rank == 0:
            wanted = self.config.master_port if self.config.is_alone else 0
            port = self._meeting.enter_context(reserve_master_port(self._addr, wanted)).port
        ready = Ready(self._slots.chosen, self._addr, port, self._run_dir.next_round())
        self._team_client.broadcast(ready.to_json())

    def _start_workers(self, round_: Round) -> None:
        plan = round_.plan
        self._monitor.set_deadline(None)
        files = self._run_dir.begin_round(plan.number, plan.ranks)
        self._workers = Workers(files, self._workers.usual_start)
        self._oom.mark()
        self._reporter.round_started(round_, files, self._history)
        orders = worker_orders(
            self.config,
            plan,
            self._history,
            files,
            saver=self._saver.address,
            drain=self._run_dir.drain,
        )
        self._zygote.spawn(orders)
        if self._zygote.lost is not None:  # while the nodes were coming together
            self._monitor.push(self._zygote.lost)

    def _request_drain(self, round_: Round) -> None:
        """Have the workers save at their next step boundary, and end."""
        tiers, grace = round_.drain_tiers, self.config.grace
        self._workers.ask_to_drain()
        if self._leave_by is not None:
            self._monitor.set_deadline(self._leave_by - time.monotonic() - (1 - _DRAIN_SHARE) * grace)
        elif not round_.end_requests and not self._workers.can_drain:
            # One has left by itself, and the others may wait for it for ever.
            self._monitor.set_deadline(grace)
        try:
            self._run_dir.request_drain("preemption" if tiers == "durable" else "restart", tiers)
        except RunDirError as error:
            self._reporter.drain_refused(str(error))
            self._monitor.set_deadline(0.0)

    def _stop_workers(self, round_: Round) -> None:
        """Signal all that is left of a round, and set the time that it has to disappear."""
        grace = self.config.grace
        if self._leave_by is not None:  # workers that could not be asked may save by a handler of their own
            left = max(0.0, self._leave_by - time.monotonic())
            grace = grace * _STOP_SHARE if self._workers.are_draining else left
        self._reporter.stopping(round_, grace, self._find_left_behind(round_))
        if round_.has_failed_here:
            self._team_client.broadcast({"kind": "ended"})
        if self._recovery is None and not (round_.is_asked_to_end or round_.has_drained):
            self._recovery = Recovery(clock.now())
        if not self._zygote.is_ready:
            self._zygote.kill()  # nothing is forked yet
        elif round_.phase is Phase.STOPPING:
            self._workers.note_stop()
            self._zygote.signal(signal.SIGTERM)
            self._monitor.set_deadline(grace)
        else:
            self._zygote.signal(signal.SIGKILL)
            self._monitor.set_deadline(_KILL_PATIENCE)

    def _find_left_behind(self, round_: Round) -> list[LeftBehind]:
        """What ranks that have finished leave behind, which is about to be signalled."""
        if not round_.has_finished:
            return []
        workers = {pid: rank for rank, pid in self._workers.pids.items()}
        patience = _HELPERS if round_.phase is Phase.STOPPING else 0.0
        return find_left_behind(self._zygote.pid, workers, patience)

    def _tell_end_of_workers(self, round_: Round) -> None:
        self._read_progress()
        self._reporter.workers_ended(self._workers.progress, round_)

    def _report(self, round_: Round) -> NodeReport:
        """What all nodes should know of the round, once nothing is left of it here."""
        assert round_.team is not None
        now, epoch = time.monotonic(), time.time()
        begun = self._recovery or Recovery(clock.now())  # there was nothing to stop, as without the zygote
        self._recovery = replace(begun, stopped=clock.now(), forked=None)
        host = round_.team.hosts[round_.team.rank]
        deaths = tuple(
            read_death(
                self._workers.files[exit_.rank],
                exit_,
                host,
                epoch - (now - exit_.at),
                self._oom,
                round_.is_ours(exit_) or self._answered_stop(round_, exit_),
                self._workers.said_before.get(exit_.rank),
            )
            for exit_ in round_.failed_exits
        )
        return NodeReport(
            node=round_.team.rank,
            host=host,
            round=round_.plan.number,
            at=deaths[0].at if deaths else epoch,
            seconds=(round_.failed_exits[0].at if deaths else now) - self._workers.began,
            has_finished=round_.has_finished,
            has_drained=round_.has_drained,
            deaths=deaths,
            ended=tuple(
                (exit_.rank, exit_.code, epoch - (now - exit_.at))
                for exit_ in round_.unasked_exits
                if exit_ not in round_.failed_exits
            ),
            trouble=round_.trouble_in_words,
            is_stuck=round_.is_stuck,
            step=self._workers.step,
            hang=(*self._hung_at, *round_.hang) if round_.hang else (),
        )

    def _answered_stop(self, round_: Round, exit_: WorkerExited) -> bool:
        """Whether a worker ended by a handler of its own, when it was told to."""
        before = round_.exits_before_stop
        return (
            before is not None
            and exit_ in round_.exits[before:]
            and exit_.rank in self._workers.said_before
        )

    def _conclude(self, round_: Round) -> Decision:
        """Decide what comes after a round that is settled, and tell about it."""
        self._monitor.set_deadline(None)
        culprit = find_culprit(round_.deaths, is_explained=round_.is_explained)
        mark = fingerprint(culprit) if culprit else None
        decision = decide(round_, culprit, mark, self._history, self._limits)
        before, self._slots = self._slots, round_.slots_after(self._slots, culprit)
        if len(self._slots.left_out) > len(before.left_out):
            self._reporter.slots_left_out(self._slots)
        if isinstance(decision, Again) and not self._slots.chosen:
            decision = self._out_of_slots(round_, culprit)
        if round_.has_failed and round_.reports:
            lost = {node: (round_.team.hosts[node], why) for node, why in round_.lost.items()}  # type: ignore[union-attr]
            verdict = judge(
                list(round_.reports.values()),
                lost,
                next_step(decision),
                newest_saved=self._reporter.newest_saved,
                is_only_in_memory=self._reporter.is_only_in_memory,
            )
            self._reporter.round_failed(verdict, round_)
        else:
            has_saver = self._backlog is not None
            self._reporter.round_ended(round_, decision, has_saver=has_saver)
            self._recovery = None
        if round_.is_stuck:
            self._tell_what_is_left()
        if self._zygote.lost is not None and isinstance(decision, Again):
            self._replace_zygote()
        return decision

    # -- looking after the workers

    def _look(self, round_: Round) -> None:
        """Read how far the workers are, and see what follows from it."""
        self._read_progress()
        self._reporter.progress_read(self._workers.progress, round_)
        if self._recovery is not None and round_.phase is Phase.RUNNING:
            timeline = self._recovery.timeline(self._workers.files, self._workers.progress)
            if timeline is not None:
                self._reporter.recovered(timeline)
                self._recovery = None
        if self._kept is not None and round_.phase is Phase.RUNNING and self._workers.can_drain:
            self._begin_to_leave(round_, self._kept)
        if round_.phase in (Phase.RUNNING, Phase.DRAINING):
            self._look_for_hang(round_)
        if round_.phase is Phase.RUNNING:
            self._look_for_newcomers(round_)
        self._look_for_silence(round_)
        self._look_at_saver()

    def _look_at_saver(self) -> None:
        """Tell if the saver cannot go on. Workers go on without it, and nothing becomes durable."""
        self._reporter.saver_halted(self._saver.look(), self._saver.pid)

    def _read_progress(self) -> None:
        for saved in self._workers.look():
            if self._backlog is not None:
                self._backlog = self._backlog.after(saved)
            self._reporter.on_event(saved)
        self._can_resume = self._can_resume or self._workers.can_drain

    def _look_for_hang(self, round_: Round) -> None:
        timeout, still = self.config.hang_timeout, self._workers.still
        is_dumb = not self._workers.is_watched and self._workers.age > max(timeout or 0.0, _SILENCE)
        if timeout and is_dumb and self._reporter.progress_missing():
            self._take_stacks(round_)
        if timeout and not round_.leavers and self._workers.hang(timeout):  # who leaves has --grace
            self._team_client.broadcast({"kind": "hang"})
        elif timeout is None and still < _HANG_REPORT:
            self._has_told_hang = False
        elif timeout is None and not self._has_told_hang:
            self._has_told_hang = True
            self._take_stacks(round_)

    def _look_for_newcomers(self, round_: Round) -> None:
        """Have nodes taken in that wait, when the workers can save, or never will be able to."""
        assert round_.team is not None
        if not round_.waiting or round_.end_requests or round_.team.rank != 0:
            return
        if self._workers.can_drain or self._workers.age > _JOIN_PATIENCE:
            self._request_round_end(round_, "join")

    def _look_for_silence(self, round_: Round) -> None:
        """Wait no longer for nodes whose `launch` says nothing, though it exists: it may be stopped."""
        self._waited = self._waited + _TICK if round_.is_late else 0.0
        patience = self.config.grace + _KILL_PATIENCE + _SLACK
        if round_.is_hung:
            patience += _DIAGNOSIS_PATIENCE
        if self._waited >= patience:
            why = f"its launch has said nothing for {self._waited:.0f} s, and may be stopped"
            for node in sorted(round_.silent):
                self._team_client.broadcast({"kind": "lost", "node": node, "why": why})

    def _take_stacks(self, round_: Round) -> None:
        directory = self._run_dir.stacks(round_.plan.number)
        self._stacks.start(self._workers.pids, self._workers.steps, directory)

    def _tell_stacks(self, taken: StacksTaken, round_: Round) -> None:
        askers, self._stack_askers = self._stack_askers, []
        for client in askers:
            self._control.answer(client, {"summary": list(taken.summary), "directory": taken.directory})
        if round_.is_hung or not askers:
            still = self._workers.still if self._workers.is_watched else self._workers.age
            self._reporter.stacks_taken(taken, still, is_in_verdict=round_.is_hung)

    def _answer(self, asked: RequestReceived, round_: Round) -> None:
        """Do what `launch status`, `scale` and the others ask this job for."""
        answer: dict[str, object] = {}
        if asked.verb not in ("status", "stacks"):
            self._reporter.request_received(asked)
        match asked.verb:
            case "status":
                answer = self._reporter.status()
            case "kill":
                self._monitor.push(*[StopRequested(signal.SIGTERM, is_asked=True)] * 2)
            case "stop" if self._is_second_signal(round_):
                left = None if self._leave_by is None else self._leave_by - time.monotonic()
                answer = {"error": f"{how_it_ends(left)}: --now ends it at once"}
            case "stop":
                answer = {"can_drain": self._workers.can_drain}
                self._monitor.push(StopRequested(signal.SIGTERM, is_asked=True))
            case "restart" if round_.phase is Phase.DRAINING and not round_.leavers:
                self._request_round_end(round_, "restart", at_once=True)
                answer = {"at_once": True}
            case "stacks" if round_.phase in (Phase.RUNNING, Phase.DRAINING):
                self._stack_askers.append(asked.client)
                self._take_stacks(round_)
                return
            case _ if round_.phase is not Phase.RUNNING:
                answer = {"error": f"the job is {self._reporter.phase}: ask again later"}
            case "restart":
                answer = {"can_drain": self._workers.can_drain}
                self._request_round_end(round_, "restart")
            case "scale":
                answer = self._scale(asked.number or 0, asked.without, round_)
        self._control.answer(asked.client, answer)

    def _scale(self, workers: int, without: tuple[int, ...], round_: Round) -> dict[str, object]:
        slots = self._slots.scaled(workers, without)
        try:
            replace(self.config, nproc=slots.present)
        except UsageError as error:
            return {"error": str(error)}
        unknown = [slot for slot in without if slot >= slots.present]
        if unknown:
            return {"error": f"--without: expected slots from 0 to {slots.present - 1}, found {unknown[0]}"}
        self._request_round_end(round_, "scale", slots=workers, without=without)
        return {"from": len(round_.plan.slots), "to": workers, "can_drain": self._workers.can_drain}

    def _tell_what_is_left(self) -> None:
        """Nothing can end these processes: tell of them, and wait for them no longer."""
        left = map(read_remaining_state, descendant_pids([self._zygote.pid]))
        self._left = [process for process in left if process is not None]
        pids = {process.pid for process in self._left}
        self._reporter.processes_stuck(
            self._left, [holder for holder in find_gpu_holders() if holder.pid in pids]
        )

    # -- zygote and saver

    def _watch(self) -> None:
        self._monitor.watch(self._zygote, self._saver, self._team_client, self._control, self._stacks)

    def _check_zygote(self, ready: ZygoteReady) -> None:
        """A preload that fails is the user's mistake; without torch, workers start cold."""
        if ready.error is None:
            return
        if self.config.preload:
            raise UsageError(f"--preload {','.join(self.config.preload)} failed:\n{ready.error}")
        self._reporter.cold_start(ready.error.rstrip().rpartition("\n")[2])

    def _replace_zygote(self) -> None:
        self._zygote.close()
        self._zygote = ZygoteHandle(self.config, self._reaper)
        self._watch()

    def _start_saver(self) -> None:
        try:
            self._saver.start()
            self._backlog = Backlog()
        except InternalError as error:
            self._reporter.saver_refused(str(error))

    def _on_saver_ended(self, ended: SaverEnded) -> None:
        """Tell what is lost. The workers go on, and the next to connect has another saver started."""
        backlog, self._backlog = self._backlog or Backlog(), None
        self._reporter.saver_lost(backlog, ended, is_closed=self._saver.is_closed)

    # -- the end

    def _out_of_slots(self, round_: Round, culprit: Death | None) -> GiveUp:
        """Too few devices of this node work. The others go on without it, if they may."""
        assert round_.team is not None
        left = len(self._slots.working)
        reason = f"{left} of its devices are left, and it needs {self._slots.minimum} (--nproc MIN:MAX)"
        self._team_client.broadcast({"kind": "lost", "node": round_.team.rank, "why": reason})
        code = ExitCode.INTERNAL if culprit is None else shell_code(culprit.failure_code)
        return GiveUp(code, reason, is_final=self.config.is_alone)

    def _end(self, decision: Finish | GiveUp) -> int:
        self._team_client.leave(outcome=decision.exit_code if decision.is_final else None)
        exit_code, reason = self._flush_saver(decision)
        if exit_code == ExitCode.PREEMPTED:
            self._reporter.preempted()
            if self._left_for is not None and self._left_for.is_asked and reason == decision.reason:
                reason = "stopped by `launch stop`: the same command goes on from what is saved"
        self._reporter.job_ended(exit_code, reason)
        return exit_code

    def _flush_saver(self, decision: Finish | GiveUp) -> tuple[int, str]:
        """Wait until the saver has made all that it holds durable; the workers are gone.

        Returns the exit code of `launch` after `decision`, and why it is that.
        """
        if self._backlog is None:
            return decision.exit_code, decision.reason
        timeout = self.config.drain_timeout
        is_halted = self._saver.look(at_last=True) is not None
        waited = min(self._workers.waited, timeout) if is_halted else 0.0  # by the workers, for it alone
        flush = Flush(self._backlog, timeout - waited, waited=waited)
        if (
            self._leave_by is not None
            and (left := max(0.0, self._leave_by - time.monotonic())) < flush.timeout
        ):
            flush = replace(flush, timeout=left, limit="--grace")
        self._saver.flush()
        self._monitor.set_deadline(flush.timeout)
        for event in self._monitor.events():
            if isinstance(event, Tick):
                self._look_at_saver()
            if isinstance(event, DeadlinePassed):
                flush = replace(flush, halt=self._saver.look(at_last=True))
            flush = flush.after(event)
            self._reporter.on_event(event)
            if isinstance(event, RequestReceived):
                self._answer(event, Round(phase=Phase.SETTLED))
            if flush.ending is not None:
                break
            self._reporter.flushing(flush)
        told = self._reporter.flushed(flush, self._saver.pid)
        after = flush.exit_code(decision.exit_code)
        return after, told if after != decision.exit_code else decision.reason


def _secret(config: Config, run_dir: RunDir) -> Secret | None:
    """What the nodes of the job know each other by; a job of one node needs none."""
    return None if config.is_alone else find_secret(config.secret, config.rdzv_endpoint[0], run_dir.path)


def _team_client(config: Config, secret: Secret | None, run_dir: RunDir, reaper: Subreaper) -> TeamClient:
    if config.is_alone:
        return SingleNodeClient()
    least, most = config.nnodes
    settings = RendezvousSettings(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.rdzv_id or "none",
        min_nodes=least,
        max_nodes=most,
        node_rank=config.node_rank,
        local_addr=config.local_addr,
        conf=config.rdzv_conf,
        secret=secret.text if secret else None,
        secret_source=secret.source if secret else "",
    )
    return MemberHandle(settings, run_dir.member_log, reaper)


def _describe_job(config: Config) -> str:
    """What tells this job from another that happens to meet at the same place."""
    least, most = config.nnodes
    words = [Path(config.command.target).name, *config.command.args[: config.command.kind is Kind.PROGRAM]]
    return f"{' '.join(words)} on {least}:{most} nodes"
