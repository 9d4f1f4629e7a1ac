"""The agent: starts the workers of a job on this node, watches them, and starts them again when one fails."""

from __future__ import annotations

import time
from types import TracebackType

from launcher.agent.departure import Departure
from launcher.agent.flush import flush_saver, report_halt
from launcher.agent.resources import Resources
from launcher.agent.watchdog import DIAGNOSIS_SECONDS, Watchdog
from launcher.agent.workers import Workers
from launcher.config.job import Config
from launcher.diagnosis.judge import find_culprit, fingerprint, judge
from launcher.diagnosis.reports import Death
from launcher.diagnosis.verdict import Verdict
from launcher.errors import ExitCode, InternalError, LaunchError, RunDirError, shell_code
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
)
from launcher.rendezvous.team import Team
from launcher.reporting.messages import next_step
from launcher.reporting.reporter import Reporter
from launcher.round.preemption import Answer, answer_signal
from launcher.round.restart import Again, Decision, Finish, GiveUp, History, Limits, decide
from launcher.round.round import Phase, Round, RoundEndRequest
from launcher.round.slots import Slots
from launcher.system.processes import Subreaper
from launcher.zygote.handle import ZygoteHandle

__all__ = ["Agent"]

_TICK = 1.0  # seconds between two looks at the workers' progress


class Agent:
    """Runs one job on this node. Enter it as a context, then call `run`, once.

    `Resources` says what is left of it after that.
    """

    def __init__(self, config: Config, zygote: ZygoteHandle, reaper: Subreaper) -> None:
        self.config = config
        self._resources = resources = Resources(config, zygote, reaper)
        self._group = resources.workers
        self._team_client = resources.team_client
        self._monitor = resources.monitor
        self._rendezvous = resources.rendezvous
        self._reporter = resources.reporter
        self._requests = resources.requests
        self._run_dir = resources.run_dir
        self._saver = resources.saver
        self._limits = Limits(config.max_restarts, config.crash_loop, config.nnodes[0])
        self._history = History()
        self._slots = Slots(config.nproc, config.nproc, config.min_nproc)
        self._watchdog = Watchdog(config.hang_timeout, config.grace)
        self._departure = Departure(config.grace)

    def __enter__(self) -> Agent:
        self._resources.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        if isinstance(exc, LaunchError):
            self._reporter.job_ended(exc.exit_code, str(exc))
        self._resources.__exit__(exc_type, exc, exc_traceback)

    def run(self) -> int:
        """Run the job to its end, and return the exit code of `launch`."""
        self._reporter.job_started()
        self._monitor.set_ticks(_TICK)
        team: Team | None = None
        decision: Decision = Again(self._history, "", same_team=False)
        while isinstance(decision, Again):
            round_ = self._begin_rendezvous(decision, team if decision.same_team else None)
            for event in self._monitor.events():
                before, round_ = round_, self._next_round_state(round_, event)
                self._handle_event(event, round_)
                if round_.phase is not before.phase:
                    self._enter_phase(round_)
                elif round_.phase is Phase.DRAINING and round_.end_requests != before.end_requests:
                    self._request_drain(round_)
                if round_.phase is Phase.SETTLED:
                    break
            decision = self._decide(round_)
            team = round_.team
        return self._end(decision)

    @property
    def _workers(self) -> Workers:
        return self._group.workers

    # -- rendezvous and start

    def _begin_rendezvous(self, decision: Again, team: Team | None) -> Round:
        """A new round, whose nodes meet after a pause: those of `team`, or all that join."""
        self._history = decision.history
        self._watchdog = self._watchdog.for_next_round()
        self._group.forget_round()
        self._rendezvous.close()
        self._monitor.set_deadline(decision.pause)
        round_ = Round(team)
        return self._leave(round_) if self._departure.is_leaving else round_

    def _on_joined(self, joined: Joined, round_: Round) -> None:
        self._history = self._rendezvous.take_team(joined)
        if not self.config.is_alone:
            self._reporter.joined(joined, has_secret=self._resources.secret is not None)
        self._rendezvous.say_ready(round_, self._slots.chosen)

    def _start_workers(self, round_: Round) -> None:
        self._monitor.set_deadline(None)
        self._group.start(round_, self._history, self._saver.address)
        if self._group.lost_zygote is not None:  # while the nodes were meeting
            self._monitor.push(self._group.lost_zygote)

    # -- monitor

    def _next_round_state(self, round_: Round, event: Event) -> Round:
        """The round after `event`. A scheduler's signal asks to save and leave, if workers can save."""
        if isinstance(event, StopRequested) and not self._departure.is_second_signal(round_, event):
            self._read_progress()
            answer = answer_signal(
                event.signum,
                can_save=self._workers.can_drain,
                can_resume=self._group.can_resume or self._may_resume(),
                is_started=round_.is_started,
            )
            if answer is Answer.LEAVE:
                return self._begin_to_leave(round_, event)
            if answer is Answer.KEEP:
                self._departure = self._departure.postpone(event)
                self._reporter.notice_kept(event.signum)
                return round_
            self._team_client.broadcast({"kind": "stop", "signum": event.signum})
        after = round_.after(event)
        leaves_alone = isinstance(event, MemberFailed) and self._departure.is_leaving
        return self._leave(after) if leaves_alone else after

    def _handle_event(self, event: Event, round_: Round) -> None:
        """Do what an event asks for apart from a new phase, and report it."""
        self._saver.take(event)
        self._reporter.on_event(event)
        self._group.take(event)
        match event:
            case Joined():
                self._on_joined(event, round_)
            case DeadlinePassed() if round_.phase is Phase.GATHERING and round_.team is None:
                self._reporter.gathering()
                self._rendezvous.join(self._history)
            case DeadlinePassed() if round_.phase is Phase.GATHERING:
                self._rendezvous.say_ready(round_, self._slots.chosen)
            case MessageReceived(node=node, message=message) if round_.team is not None:
                self._reporter.message_received(node, message, round_)
            case Tick():
                self._look(round_)
            case StacksTaken():
                self._requests.report_stacks(event, round_, self._workers)
            case RequestReceived():
                self._answer(event, round_)
            case SaverWanted():
                self._start_saver()
            case SaverEnded():
                is_closed = self._saver.is_closed
                self._reporter.saver_lost(self._saver.take_loss(), event, is_closed=is_closed)

    def _enter_phase(self, round_: Round) -> None:
        """Do what the phase asks for that the round has just entered."""
        self._reporter.phase_entered(round_.phase)
        match round_.phase:
            case Phase.RUNNING:
                self._start_workers(round_)
            case Phase.DRAINING:
                self._request_drain(round_)
            case Phase.DIAGNOSING:
                self._workers.mark_hung()
                self._reporter.hang_found(self._workers.still, is_draining=self._workers.are_draining)
                self._monitor.set_deadline(DIAGNOSIS_SECONDS)
                self._requests.take_stacks(round_, self._workers)
            case Phase.STOPPING | Phase.KILLING:
                if round_.has_failed_here:
                    self._team_client.broadcast({"kind": "ended"})
                self._limit(self._group.stop(round_, self._departure))
            case Phase.SETTLED if round_.cut_off is not None and self._workers.files:
                self._on_workers_gone(round_)
            case Phase.OVER:
                self._monitor.set_deadline(None)
                self._on_workers_gone(round_)
                self._team_client.broadcast(
                    {"kind": "report", "report": self._group.report(round_).to_json()}
                )

    def _request_drain(self, round_: Round) -> None:
        """Have the workers save at their next step boundary, and leave."""
        try:
            seconds = self._group.request_drain(
                round_.drain_tiers, self._departure, is_asked=bool(round_.end_requests)
            )
        except RunDirError as error:
            self._reporter.drain_refused(str(error))
            seconds = 0.0
        self._limit(seconds)

    def _limit(self, seconds: float | None) -> None:
        """Give the present phase so many seconds; None: the limit stays as it is."""
        if seconds is not None:
            self._monitor.set_deadline(seconds)

    def _on_workers_gone(self, round_: Round) -> None:
        self._read_progress()
        self._reporter.workers_ended(self._workers.progress, round_)

    def _look(self, round_: Round) -> None:
        """Read how far the workers are, and act on what is overdue."""
        self._read_progress()
        self._reporter.progress_read(self._workers.progress, round_)
        if round_.phase is Phase.RUNNING:
            if (timeline := self._group.take_recovery()) is not None:
                self._reporter.recovered(timeline)
            if (notice := self._departure.postponed) is not None and self._workers.can_drain:
                self._begin_to_leave(round_, notice)
        self._watchdog = self._watchdog.after(self._workers, round_, _TICK)
        for message in self._watchdog.messages:
            self._team_client.broadcast(message)
        if self._watchdog.misses_progress:
            self._reporter.progress_missing()
        if self._watchdog.wants_stacks:
            self._requests.take_stacks(round_, self._workers)
        report_halt(self._saver, self._reporter)

    def _answer(self, asked: RequestReceived, round_: Round) -> None:
        self._requests.answer(asked, round_, self._workers, self._slots, self._departure)

    def _read_progress(self) -> None:
        for saved in self._group.read_progress():
            self._saver.take(saved)
            self._reporter.on_event(saved)

    def _start_saver(self) -> None:
        try:
            self._saver.start()
        except InternalError as error:
            self._reporter.saver_refused(str(error))

    # -- leaving the job

    def _may_resume(self) -> bool:
        """True if the job has saved before, or its script names what saves, though no worker has said so."""
        return self._run_dir.has_saved() or self.config.command.names_checkpointer

    def _begin_to_leave(self, round_: Round, event: StopRequested) -> Round:
        """Have the job save and end within the grace, from now on."""
        was_leaving = self._departure.is_leaving
        self._departure = self._departure.after(event, time.monotonic())
        if round_.is_started:
            self._reporter.leaving(event, self.config.grace, can_save=self._workers.can_drain)
        if not was_leaving:
            return self._leave(round_)
        if round_.phase is Phase.DRAINING:
            self._request_drain(round_)
        return round_

    def _leave(self, round_: Round) -> Round:
        """Tell the other nodes that this one leaves; if it is in no team, the round after that."""
        if round_.team is None or round_.cut_off is not None:
            return round_.withdrawn()
        request = RoundEndRequest("leave", round_.team.rank, self._workers.can_drain)
        self._team_client.broadcast(request.to_json())
        return round_

    # -- decide

    def _decide(self, round_: Round) -> Decision:
        """Decide what comes after a settled round, and report it."""
        self._monitor.set_deadline(None)
        culprit = find_culprit(round_.deaths, is_explained=round_.is_explained)
        mark = fingerprint(culprit) if culprit else None
        decision = decide(round_, culprit, mark, self._history, self._limits)
        before, self._slots = self._slots, round_.slots_after(self._slots, culprit)
        if len(self._slots.left_out) > len(before.left_out):
            self._reporter.slots_left_out(self._slots)
        if isinstance(decision, Again) and not self._slots.chosen:
            decision = self._give_up_slots(round_, culprit)
        if round_.has_failed and round_.reports:
            self._reporter.round_failed(_judge(round_, decision, self._reporter), round_)
        else:
            has_saver = self._saver.backlog is not None
            self._reporter.round_ended(round_, decision, has_saver=has_saver)
            self._group.forget_recovery()
        if round_.is_stuck:
            self._group.report_unkillable()
        if isinstance(decision, Again):
            self._group.replace_lost_zygote()
        return decision

    def _give_up_slots(self, round_: Round, culprit: Death | None) -> GiveUp:
        """Too few devices of this node work. The other nodes go on without it, if they may."""
        assert round_.team is not None
        left = len(self._slots.working)
        reason = f"{left} of its devices are left, and it needs {self._slots.minimum} (--nproc MIN:MAX)"
        self._team_client.broadcast({"kind": "lost", "node": round_.team.rank, "why": reason})
        code = ExitCode.INTERNAL if culprit is None else shell_code(culprit.failure_code)
        return GiveUp(code, reason, is_final=self.config.is_alone)

    # -- the end

    def _end(self, decision: Finish | GiveUp) -> int:
        self._team_client.leave(outcome=decision.exit_code if decision.is_final else None)
        exit_code, reason = flush_saver(
            self._saver,
            self._monitor,
            self._reporter,
            decision,
            self._departure,
            timeout=self.config.drain_timeout,
            waited=self._workers.waited_for_saves,
            answer=lambda asked: self._answer(asked, Round(phase=Phase.SETTLED)),
        )
        if exit_code == ExitCode.PREEMPTED:
            self._reporter.preempted()
            asked = self._departure.signal
            if asked is not None and asked.is_asked and reason == decision.reason:
                reason = "stopped by `launch stop`: the same command goes on from what is saved"
        self._reporter.job_ended(exit_code, reason)
        return exit_code


def _judge(round_: Round, decision: Decision, reporter: Reporter) -> Verdict:
    assert round_.team is not None
    return judge(
        list(round_.reports.values()),
        {node: (round_.team.hosts[node], why) for node, why in round_.lost.items()},
        next_step(decision),
        newest_saved=reporter.newest_saved,
        is_only_in_memory=reporter.is_only_in_memory,
    )
