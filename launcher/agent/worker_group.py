"""Start, drain, stop and kill the workers of this node, round after round, through the zygote."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import replace

from launcher import clock
from launcher.agent.departure import Departure
from launcher.agent.node_report import make_node_report
from launcher.agent.watchdog import KILL_SECONDS
from launcher.agent.worker_env import worker_orders
from launcher.agent.workers import Workers
from launcher.config.job import Config
from launcher.diagnosis.reports import NodeReport
from launcher.errors import UsageError
from launcher.events import Event, SavedByWorkers, WorkerExited, WorkerStarted, ZygoteLost, ZygoteReady
from launcher.reporting.reporter import Reporter
from launcher.round.recovery import Recovery
from launcher.round.restart import History
from launcher.round.round import Phase, Round
from launcher.run_dir import RunDir
from launcher.system.gpus import find_gpu_holders
from launcher.system.left_behind import LeftBehind, find_left_behind
from launcher.system.oom import OomWatch
from launcher.system.process_state import ProcessState, read_remaining_state
from launcher.system.processes import Subreaper, descendant_pids
from launcher.zygote.handle import ZygoteHandle

__all__ = ["WorkerGroup"]

_HELPER_SECONDS = 0.3  # that helper processes of libraries need to notice the end of their rank


class WorkerGroup:
    """This node's workers and the zygote that forks them. A `monitor.Source` of the zygote's events.

    `workers` are those of the present round.
    """

    def __init__(
        self, config: Config, zygote: ZygoteHandle, reaper: Subreaper, run_dir: RunDir, reporter: Reporter
    ) -> None:
        self.workers = Workers()
        self.can_resume = False
        """True once any worker, of any round, has said that it saves and leaves on request."""
        self._config = config
        self._zygote = zygote
        self._reaper = reaper
        self._run_dir = run_dir
        self._reporter = reporter
        self._oom = OomWatch()
        self._recovery: Recovery | None = None
        self._unkillable: list[ProcessState] = []

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that become readable when `receive` has events."""
        return self._zygote.descriptors

    @property
    def lost_zygote(self) -> ZygoteLost | None:
        """The zygote's end, if it has ended."""
        return self._zygote.lost

    def receive(self) -> list[Event]:
        """The zygote's events since the last call; does not wait."""
        return self._zygote.receive()

    def take(self, event: Event) -> None:
        """Bring the workers' state up to date with any event of the job."""
        match event:
            case WorkerStarted(rank=rank, pid=pid):
                self.workers.mark_started(rank, pid)
                if self._recovery is not None and self.workers.have_all_started:
                    self._recovery = replace(self._recovery, forked=clock.now())
            case WorkerExited(rank=rank):
                self.workers.mark_dead(rank)
            case ZygoteReady(error=str(error)):
                self._start_cold(error)

    # -- a round

    def forget_round(self) -> None:
        """No workers, but what is known of their usual start."""
        self.workers = Workers(usual_start=self.workers.usual_start)

    def start(self, round_: Round, history: History, saver_address: str) -> None:
        """Order the start of the workers. `WorkerStarted` and `SpawnFailed` follow."""
        plan = round_.plan
        files = self._run_dir.begin_round(plan.number, plan.ranks)
        self.workers = Workers(files, self.workers.usual_start)
        self._oom.mark()
        self._reporter.round_started(round_, files, history)
        orders = worker_orders(
            self._config, plan, history, files, saver=saver_address, drain=self._run_dir.drain
        )
        self._zygote.spawn(orders)

    def read_progress(self) -> list[SavedByWorkers]:
        """Read how far the workers are. Returns what they have committed by themselves since the last call."""
        saved = self.workers.read_progress()
        self.can_resume = self.can_resume or self.workers.can_drain
        return saved

    def request_drain(self, tiers: str, departure: Departure, *, is_asked: bool) -> float | None:
        """Have the workers save at their next step boundary, and leave.

        Returns the seconds after which they are to be stopped; None: no limit.

        Args:
            tiers: Where they must save: "memory" or "durable".
            departure: How this node leaves the job, if it does.
            is_asked: A node or a user has asked for it, rather than a worker has left by itself.

        Raises:
            RunDirError: The request cannot be written.
        """
        self.workers.mark_draining()
        self._run_dir.request_drain("preemption" if tiers == "durable" else "restart", tiers)
        if departure.is_leaving:
            return departure.drain_seconds(time.monotonic())
        # If one has left by itself, the others may wait for it for ever.
        return None if is_asked or self.workers.can_drain else self._config.grace

    def stop(self, round_: Round, departure: Departure) -> float | None:
        """Signal all that is left of a round: SIGTERM, or SIGKILL in the phase KILLING.

        Returns the seconds that it has to disappear; None if the end of the zygote is all that is waited for.
        """
        grace = departure.stop_seconds(time.monotonic(), are_draining=self.workers.are_draining)
        self._reporter.stopping(round_, grace, self._find_left_behind(round_))
        if self._recovery is None and not (round_.is_asked_to_end or round_.has_drained):
            self._recovery = Recovery(clock.now())
        if not self._zygote.is_ready:
            self._zygote.kill()  # nothing is forked yet
            return None
        if round_.phase is Phase.STOPPING:
            self.workers.prepare_stop()
            self._zygote.signal(signal.SIGTERM)
            return grace
        self._zygote.signal(signal.SIGKILL)
        return KILL_SECONDS

    def report(self, round_: Round) -> NodeReport:
        """What all nodes need to know of the round, once nothing is left of it here."""
        begun = self._recovery or Recovery(clock.now())  # nothing was stopped, as when the zygote was lost
        self._recovery = replace(begun, stopped=clock.now(), forked=None)
        return make_node_report(round_, self.workers, self._oom)

    def take_recovery(self) -> Mapping[str, float] | None:
        """Seconds from the last failure to each part of the restart, once every rank has made a step again."""
        if self._recovery is None:
            return None
        timeline = self._recovery.timeline(self.workers.files, self.workers.progress)
        if timeline is not None:
            self._recovery = None
        return timeline

    def forget_recovery(self) -> None:
        """The round has not failed: the time to the next step is none that a failure costs."""
        self._recovery = None

    def report_unkillable(self) -> None:
        """Tell of the processes that SIGKILL has not ended. `close` will not wait for them."""
        left = map(read_remaining_state, descendant_pids([self._zygote.pid]))
        self._unkillable = [process for process in left if process is not None]
        pids = {process.pid for process in self._unkillable}
        self._reporter.processes_stuck(
            self._unkillable, [holder for holder in find_gpu_holders() if holder.pid in pids]
        )

    # -- the zygote

    def replace_lost_zygote(self) -> None:
        """Start another zygote if the present one has ended."""
        if self._zygote.lost is not None:
            self._zygote.close()
            self._zygote = ZygoteHandle(self._config, self._reaper)

    def close(self) -> None:
        """End the zygote and everything below it."""
        self._zygote.close(0.0 if self._unkillable else KILL_SECONDS)

    def _start_cold(self, error: str) -> None:
        """A preload that fails is the user's mistake; without torch, workers start cold."""
        if self._config.preload:
            raise UsageError(f"--preload {','.join(self._config.preload)} failed:\n{error}")
        self._reporter.cold_start(error.rstrip().rpartition("\n")[2])

    def _find_left_behind(self, round_: Round) -> list[LeftBehind]:
        """Processes of ranks that have finished, which are about to be signalled."""
        if not round_.has_finished:
            return []
        workers = {pid: rank for rank, pid in self.workers.pids.items()}
        patience = _HELPER_SECONDS if round_.phase is Phase.STOPPING else 0.0
        return find_left_behind(self._zygote.pid, workers, patience)
