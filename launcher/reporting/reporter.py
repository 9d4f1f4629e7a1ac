"""What people and programs are told of a job: terminal, journal, status and metrics. Decides nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
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
    SaveFailed,
    SavePersisted,
    SaverEnded,
    StacksTaken,
    StopRequested,
    Tick,
)
from launcher.progress import Progress
from launcher.reporting import messages
from launcher.reporting.console import Console, Sink
from launcher.reporting.journal import JobJournal
from launcher.reporting.message import Level, Message, detail, warning
from launcher.reporting.status_board import StatusBoard
from launcher.round.restart import Decision, Finish, History
from launcher.round.round import Phase, Round
from launcher.round.saver_flush import Backlog, Flush
from launcher.round.slots import Slots
from launcher.run_dir import RankFiles, RunDir
from launcher.system.gpus import GpuHolder
from launcher.system.left_behind import LeftBehind
from launcher.system.process_state import ProcessState

__all__ = ["Reporter"]


class Reporter:
    """Reports what one agent does: a method for each thing that happens. All but `close` return at once."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        self._config = config
        self._run_dir = run_dir
        level = max(Level[config.log_level.upper()], Level.WARNING if config.quiet else Level.DEBUG)
        self._is_debugging = level == Level.DEBUG
        self._console = Console(Sink(1), Sink(2), level)
        self._journal = JobJournal(run_dir.journal, lambda text: self._print(warning(text)))
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
        self._began = time.monotonic()
        self._seconds_lost = 0.0  # from failures to the next step of all ranks
        self._failed_saves: dict[
            str, tuple[str, int]
        ] = {}  # by tier: the last error, and how often in a row
        self._has_warned_of_no_secret = False
        self._saver_halt: str | None = None

    def close(self) -> None:
        """Print everything to the end. Waits as long as the reader takes."""
        if self._metrics is not None:
            self._metrics.close()
        self._console.close()
        self._journal.close()

    def _print(self, message: Message | None) -> None:
        if message is not None:
            self._console.say(message)

    # -- what the agent asks

    @property
    def phase(self) -> str:
        """What the job does, in a word or two."""
        return self._board.phase

    @property
    def newest_saved(self) -> int | None:
        """The step of the newest checkpoint in any tier, as far as the saver has reported."""
        return self._board.newest_saved

    @property
    def is_only_in_memory(self) -> bool:
        """Whether that checkpoint is in no tier that outlives the node's saver."""
        return self._board.is_only_in_memory

    def status(self) -> dict[str, object]:
        """The answer to `launch status`."""
        return {"status": self._board.status(clock.now()).to_json()}

    # -- the job and its team

    def job_started(self) -> None:
        self._journal.job_started(self._config)

    def job_ended(self, exit_code: int, reason: str) -> None:
        self._board = self._board.in_phase("ended")
        self._journal.job_ended(exit_code, reason)
        if exit_code == ExitCode.OK and not reason and self._board.round:
            took = time.monotonic() - self._began
            self._print(messages.job_finished(self._board, took, self._seconds_lost))

    def gathering(self) -> None:
        """The nodes come together."""
        self.phase_entered(Phase.GATHERING)
        if not self._config.is_alone:
            self._print(messages.waiting_for_nodes(self._config.rdzv_endpoint, self._config.nnodes))

    def joined(self, event: Joined, *, has_secret: bool) -> None:
        self._print(messages.joined(event))
        self._journal.joined(event)
        if event.rank == 0 and not has_secret and not self._has_warned_of_no_secret:
            self._has_warned_of_no_secret = True
            self._print(messages.no_secret(self._config.rdzv_endpoint))
        for message in messages.arguments_differ(event):
            self._print(message)

    def message_received(self, node: int, message: Mapping[str, Any], round_: Round) -> None:
        """What a node of the team has broadcast, where users want to know."""
        assert round_.team is not None
        self._print(messages.message_received(node, message, round_))
        self._journal.message_received(node, message, round_.team.hosts)

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
        self._print(messages.round_started(round_, files[0].out.parent))
        self._journal.round_started(round_, history.restarts)

    def phase_entered(self, phase: Phase) -> None:
        self._board = self._board.in_phase(messages.phase_in_words(phase, is_alone=self._config.is_alone))

    def progress_read(
        self, progress: Mapping[int, Progress], round_: Round, *, at_last: bool = False
    ) -> None:
        """How far workers are, about once a second, and `at_last` when they are dead."""
        now = clock.now()
        seen = {rank: one for rank, one in progress.items() if one.step is not None}
        self._board = self._board.sampled(seen, now)
        self.phase_entered(round_.phase)
        status = self._board.status(now)
        if self._console.has_live_view:
            self._console.live(status.render(self._console.paint))
        if self._metrics is not None:
            self._metrics.update(status)
        self._journal.progress(status, at_last=at_last)

    def progress_missing(self) -> None:
        """Hangs are looked for, and no worker reports how far it is."""
        self._print(messages.progress_missing())

    def recovered(self, timeline: Mapping[str, float]) -> None:
        """Every rank has made a step again. `timeline` has seconds since the failure, by what was done then."""
        self._journal.recovered(self._board.round, timeline)
        self._seconds_lost += timeline["first_step"]
        for message in messages.recovered(timeline):
            self._print(message)

    def leaving(self, event: StopRequested, grace: float, *, can_save: bool) -> None:
        """The job saves and ends within `grace` seconds."""
        self._print(messages.leaving(event, grace, can_save=can_save))

    def notice_kept(self, signum: int) -> None:
        """No worker can answer a scheduler's notice yet."""
        self._print(messages.notice_kept(signum))

    def drain_refused(self, reason: str) -> None:
        """The drain request cannot be written."""
        self._print(messages.drain_refused(reason))

    def hang_found(self, seconds: float, *, is_draining: bool) -> None:
        self._print(messages.hang_found(seconds, is_draining=is_draining))

    def stacks_taken(self, taken: StacksTaken, seconds: float, *, is_in_verdict: bool) -> None:
        """Where all workers of this node were that have made no progress for `seconds`."""
        self._journal.stacks_taken(self._board.round, taken)
        self._print(messages.stacks_taken(taken, seconds, is_in_verdict=is_in_verdict))

    def stopping(self, round_: Round, grace: float, left_behind: Sequence[LeftBehind]) -> None:
        """Workers get `grace` seconds to end, or are killed; `left_behind` is what finished ones left."""
        self._print(messages.stopping(round_, grace, left_behind))
        if round_.stop_signal is not None and round_.phase is Phase.STOPPING:
            return
        if round_.has_finished:
            if left_behind and round_.phase is Phase.STOPPING:
                self._journal.left_behind(left_behind)
        elif round_.stop_signal is None:
            self._console.mute_victims([exit_.rank for exit_ in round_.exits])

    def workers_ended(self, progress: Mapping[int, Progress], round_: Round) -> None:
        """The workers are dead: the rest of what they wrote is printed."""
        self._console.unfollow()
        self.progress_read(progress, round_, at_last=True)

    def round_ended(self, round_: Round, decision: Decision, *, has_saver: bool) -> None:
        """A round is over in which nothing went wrong."""
        if round_.end_requests and round_.was_drained:
            self._journal.drained(round_.step)
        is_preempted = isinstance(decision, Finish) and decision.exit_code == ExitCode.PREEMPTED
        if is_preempted and round_.cut_off is None:
            self._left_at = (round_.step, round_.was_drained)
        self._print(messages.round_ended(round_, decision, has_saver=has_saver))

    def round_failed(self, verdict: Verdict, round_: Round) -> None:
        """A round is over in which something went wrong: the verdict, once in full for all nodes."""
        self._print(messages.round_failed(verdict, round_))
        self._board = self._board.failed(verdict.kind)
        self._journal.round_failed(verdict)
        try:
            self._run_dir.record(json.dumps(verdict.to_json()))
        except OSError as error:  # a full disk is no reason to end the job
            self._print(warning(f"verdict not recorded: {error}"))

    def preempted(self) -> None:
        """The job was told to leave, and has: what it goes on from when it is started again."""
        step, has_drained = self._left_at
        durable = [saved.step for tier, saved in self._board.saved.items() if tier != "memory"]
        self._print(messages.preempted(step, durable, has_drained=has_drained))

    def slots_left_out(self, slots: Slots) -> None:
        """A device is not used any more."""
        self._print(messages.slots_left_out(slots))

    def cold_start(self, reason: str) -> None:
        self._print(messages.cold_start(reason))

    def processes_stuck(self, left: Sequence[ProcessState], holders: Sequence[GpuHolder]) -> None:
        """Processes are left that nothing can end, and some of them may hold GPUs."""
        self._print(messages.processes_stuck(left, holders))

    def request_received(self, request: RequestReceived) -> None:
        """A user asks something of the job."""
        self._journal.request_received(request)

    # -- events, and saves above all

    def on_event(self, event: Event) -> None:
        """Report what the agent has received, as far as its phases do not show it."""
        if self._is_debugging and not isinstance(event, Tick):
            self._print(messages.debug_event(event))
        self._board = self._board.after(event, clock.now())
        self._journal.on_save(event)
        match event:
            case SavePersisted(tier=tier):
                self._failed_saves.pop(tier, None)
            case SaveFailed(again=False):
                self._save_failed(event)
            case MemberNews(text=text, is_bad=True):
                self._print(warning(text))
            case MemberNews(text=text, phase=phase):
                self._board = self._board.in_phase(phase or self._board.phase)
                self._print(detail(text))

    def _save_failed(self, event: SaveFailed) -> None:
        """The error is printed once, and counted where the next checkpoint fails of the same."""
        error = normalized(event.error)
        last, count = self._failed_saves.get(event.tier, ("", 0))
        before = count if error == last else 0
        self._failed_saves[event.tier] = (error, before + 1)
        self._print(messages.save_failed(event, before))

    def saver_refused(self, reason: str) -> None:
        self._print(messages.saver_refused(reason))

    def saver_lost(self, backlog: Backlog, ended: SaverEnded, *, is_closed: bool) -> None:
        self._print(messages.saver_lost(backlog, ended, self._run_dir.saver_log, is_closed=is_closed))

    def saver_halted(self, halt: str | None, pid: int | None) -> None:
        """Why the saver cannot go on; None if it can."""
        was, self._saver_halt = self._saver_halt, halt
        if halt and not was:
            self._journal.saver_halted(pid, halt)
            self._print(messages.saver_halted(halt, pid))
        elif was and not halt and pid is not None:
            self._print(messages.saver_halted(None, pid))

    def flushing(self, flush: Flush) -> None:
        """The workers are gone, and the saver makes durable what is left."""
        self._board = self._board.in_phase("persisting")
        if flush.backlog.pending:
            self._console.show(f"persisting {flush.backlog}")

    def flushed(self, flush: Flush, pid: int | None) -> str:
        """The wait for the saver is over. Returns what was printed."""
        message = messages.flushed(flush, pid, self._run_dir.saver_log)
        self._print(message)
        return message.lines[0] if message else ""
