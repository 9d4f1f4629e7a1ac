"""The agent: starts the workers of a job, watches them, and starts them again when one fails."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import TracebackType

from launcher.backlog import Backlog, Drain
from launcher.config import Config
from launcher.console import Console, Sink
from launcher.errors import InternalError, UsageError
from launcher.events import (
    Event,
    SaveFailed,
    SaverEnded,
    SaverWanted,
    ZygoteLost,
    ZygoteReady,
)
from launcher.monitor import Monitor
from launcher.processes import Subreaper
from launcher.rendezvous import Meeting, meet
from launcher.restart import Decision, Finish, History, Phase, Restart, Round, decide
from launcher.run_dir import RankFiles, RunDir
from launcher.saver import Saver
from launcher.verdict import find_culprit, gather, judge
from launcher.worker import worker_orders
from launcher.zygote import Zygote

__all__ = ["Agent"]

_KILL_PATIENCE = 10.0  # seconds that dead processes get to disappear (uninterruptible sleep)
_NO_MORE_SAVERS = "no saver is started for this job any more"
_BOLD, _DIM, _ALARM, _WARN = 1, 2, 31, 33  # ANSI styles


class Agent:
    """Runs one job on this node. Enter it as a context, then call `run`, once.

    On leaving the context no process that it started exists any more, but for a saver that still
    persists when it is not waited for any longer.
    """

    def __init__(self, config: Config, zygote: Zygote, reaper: Subreaper) -> None:
        self.config = config
        self._zygote = zygote
        self._reaper = reaper
        try:
            with meet(config.master_addr, config.master_port):
                pass  # what is wrong with them is found before anything is changed
            self._run_dir = RunDir(config.directory, config.logs)
        except BaseException:
            zygote.close()
            raise
        self._monitor = Monitor()
        self._console = Console(Sink(1), Sink(2))
        self._files: list[RankFiles] = []
        self._saver = Saver(self._run_dir.saver_log, reaper)
        self._backlog: Backlog | None = None  # of the saver that runs

    def __enter__(self) -> Agent:
        self._monitor.__enter__()
        self._monitor.watch(self._zygote, self._saver)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        self._zygote.close()
        self._saver.close()
        self._monitor.__exit__(exc_type, exc, exc_traceback)
        self._console.close()
        self._run_dir.close()

    def run(self) -> int:
        """Run the job to its end, and return the exit code of `launch`."""
        history = History(self.config.max_restarts)
        while True:
            with meet(self.config.master_addr, self.config.master_port) as meeting:
                round_ = self._start_round(meeting, history)
                for event in self._monitor.events():
                    before, round_ = round_, round_.after(event)
                    self._attend(event)
                    if round_.phase is Phase.OVER:
                        break
                    if round_.phase is not before.phase:
                        self._stop_workers(round_)
            decision = self._conclude(round_, history)
            if not isinstance(decision, Restart):
                return self._drain(decision.exit_code)
            if isinstance(round_.trouble, ZygoteLost):
                self._replace_zygote()
            history = history.after_restart()

    def _start_round(self, meeting: Meeting, history: History) -> Round:
        number, self._files = self._run_dir.begin_round(self.config.nproc)
        self._console.follow(self._files, self.config.shown)
        self._zygote.spawn(
            worker_orders(self.config, meeting, number, history, self._files, self._saver.address)
        )
        workers = f"{self.config.nproc} worker{'s' if self.config.nproc > 1 else ''}"
        logs = _short(self._files[0].out.parent)
        self._console.say(f"round {number}: {workers}, output in {logs}", style=_DIM)
        return Round(number, self.config.nproc, time.monotonic())

    def _stop_workers(self, round_: Round) -> None:
        """Signal all that is left of a round, and set the time that it has to disappear."""
        if round_.stop_signal is not None and round_.phase is Phase.STOPPING:
            name = signal.Signals(round_.stop_signal).name
            patience = f"workers have {self.config.grace:g} s to end, or until another {name}"
            self._console.say(f"{name}: stopping; {patience}", style=_BOLD)
        elif round_.phase is Phase.KILLING:
            left = round_.ranks - len(round_.exits)
            self._console.say(f"killing what has not ended, {left} of the ranks", style=_WARN)
        if not self._zygote.is_ready:
            self._zygote.kill()  # nothing is forked yet
        elif round_.phase is Phase.STOPPING:
            if round_.stop_signal is None:
                self._console.mute_victims([exit_.rank for exit_ in round_.exits])
            self._zygote.signal(signal.SIGTERM)
            self._monitor.set_deadline(self.config.grace)
        else:
            self._zygote.signal(signal.SIGKILL)
            self._monitor.set_deadline(_KILL_PATIENCE)

    def _attend(self, event: Event) -> None:
        """Do what an event asks for, and tell of it, where that does not change the round."""
        if self._backlog is not None:
            self._backlog = self._backlog.after(event)
        match event:
            case ZygoteReady():
                self._check_zygote(event)
            case SaverWanted():
                self._start_saver()
            case SaveFailed():
                self._tell_failed_save(event)
            case SaverEnded():
                self._bury_saver(event)

    def _check_zygote(self, ready: ZygoteReady) -> None:
        """A preload that fails is the user's mistake; without torch, workers start cold."""
        if ready.error is None:
            return
        if self.config.preload:
            raise UsageError(f"--preload {','.join(self.config.preload)} failed:\n{ready.error}")
        reason = ready.error.rstrip().rpartition("\n")[2]
        self._console.say(f"workers start as fresh interpreters, as in --cold: {reason}", style=_WARN)

    def _conclude(self, round_: Round, history: History) -> Decision:
        """Decide what comes after a round that is over, and tell about it."""
        self._monitor.set_deadline(None)
        self._console.unfollow()
        failed = [exit_.rank for exit_ in round_.exits if exit_.code != 0]
        evidence = {rank: gather(self._files[rank]) for rank in failed}
        culprit = find_culprit(round_, evidence)
        decision = decide(round_, culprit.code if culprit else None, history)
        if round_.stop_signal is not None:
            name = signal.Signals(round_.stop_signal).name
            what = "nothing" if self._backlog is None else "no worker"
            self._console.say(f"stopped by {name}; {what} is left running", style=_BOLD)
        elif isinstance(decision, Finish):
            if history.restarts:
                restarts = f"{history.restarts} restart{'s' if history.restarts > 1 else ''}"
                self._console.say(f"finished after {restarts}", style=_BOLD)
        else:
            verdict = judge(
                round_,
                culprit,
                self._files,
                evidence,
                decision,
                now=time.monotonic(),
                wall_time=time.time(),
            )
            self._console.say(*verdict.render(), style=_ALARM)
            try:
                self._run_dir.record(verdict.to_json())
            except OSError as error:  # a full disk is no reason to end the job
                self._console.say(f"verdict not recorded: {error}", style=_WARN)
        return decision

    def _replace_zygote(self) -> None:
        self._zygote.close()
        self._zygote = Zygote(self.config, self._reaper)
        self._monitor.watch(self._zygote, self._saver)

    def _start_saver(self) -> None:
        try:
            self._saver.start()
            self._backlog = Backlog()
        except InternalError as error:
            self._console.say(f"{error}; {_NO_MORE_SAVERS}", style=_ALARM)

    def _bury_saver(self, ended: SaverEnded) -> None:
        """Tell what is lost. The workers go on, and the next to connect has another saver started."""
        backlog, self._backlog = self._backlog or Backlog(), None
        text = backlog.obituary(ended, str(_short(self._saver.log)))
        if self._saver.is_closed:
            text += f"; it keeps ending: {_NO_MORE_SAVERS}"
        self._console.say(text, style=_WARN)

    def _tell_failed_save(self, failed: SaveFailed) -> None:
        text = f"step {failed.step} did not become durable in {failed.url}: {failed.error}"
        self._console.say(text, style=_ALARM)

    def _drain(self, exit_code: int) -> int:
        """Wait until the saver has made all that it holds durable; the workers are gone.

        Returns the exit code of `launch` after a job that ended with `exit_code`.
        """
        if self._backlog is None:
            return exit_code
        drain = Drain(self._backlog, self.config.drain_timeout)
        self._saver.drain()
        self._monitor.set_deadline(drain.timeout)
        for event in self._monitor.events():
            drain = drain.after(event)
            if isinstance(event, SaveFailed):
                self._tell_failed_save(event)
            if drain.ending is not None:
                break
            if drain.backlog.pending:
                self._console.show(f"persisting {drain.backlog}")
        told = drain.render(self._saver.pid, str(_short(self._saver.log)))
        if told:
            self._console.say(told, style=_BOLD if drain.succeeded else _ALARM)
        return drain.exit_code(exit_code)


def _short(path: Path) -> Path:
    """`path` as the user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
