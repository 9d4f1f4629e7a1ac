"""Act on the requests of users: answer them, dump stacks for them, tell the other nodes."""

from __future__ import annotations

import time
from dataclasses import replace

from launcher.agent.control import Control
from launcher.agent.departure import Departure
from launcher.agent.monitor import Monitor
from launcher.agent.requests import reply_to
from launcher.agent.workers import Workers
from launcher.config.job import Config
from launcher.diagnosis.stack_dump import StackTaker
from launcher.events import RequestReceived, StacksTaken
from launcher.rendezvous.client import TeamClient
from launcher.reporting.messages import how_it_ends
from launcher.reporting.reporter import Reporter
from launcher.round.round import Round
from launcher.round.slots import Slots
from launcher.run_dir import RunDir

__all__ = ["RequestHandler"]


class RequestHandler:
    """Answers what `launch status`, `scale` and the others ask the running job; owns its dumps of stacks."""

    def __init__(
        self,
        config: Config,
        control: Control,
        monitor: Monitor,
        team_client: TeamClient,
        reporter: Reporter,
        run_dir: RunDir,
    ) -> None:
        self.stacks = StackTaker()
        self._config = config
        self._control = control
        self._monitor = monitor
        self._team_client = team_client
        self._reporter = reporter
        self._run_dir = run_dir
        self._stack_clients: list[int] = []  # that wait for the stacks

    def answer(
        self, asked: RequestReceived, round_: Round, workers: Workers, slots: Slots, departure: Departure
    ) -> None:
        """Answer a request and begin what it asks for."""
        if asked.verb == "status":
            self._control.answer(asked.client, self._reporter.status())
            return
        if asked.verb != "stacks":
            self._reporter.request_received(asked)
        left = departure.seconds_left(time.monotonic()) if departure.is_leaving else None
        reply = reply_to(
            asked,
            round_,
            slots,
            phase=self._reporter.phase,
            can_drain=workers.can_drain,
            ending=how_it_ends(left) if departure.is_second_signal(round_) else None,
            check_workers=lambda number: replace(self._config, nproc=number),
        )
        if reply.request is not None:
            self._team_client.broadcast(reply.request.to_json())
        self._monitor.push(*reply.signals)
        if reply.answer is None:
            self._stack_clients.append(asked.client)
            self.take_stacks(round_, workers)
        else:
            self._control.answer(asked.client, reply.answer)

    def take_stacks(self, round_: Round, workers: Workers) -> None:
        """Begin to dump the stacks of this node's workers; `StacksTaken` follows."""
        self.stacks.start(workers.pids, workers.steps, self._run_dir.stacks(round_.plan.number))

    def report_stacks(self, taken: StacksTaken, round_: Round, workers: Workers) -> None:
        """Answer those who have asked for the stacks; if it was the watchdog, tell the user."""
        clients, self._stack_clients = self._stack_clients, []
        for client in clients:
            self._control.answer(client, {"summary": list(taken.summary), "directory": taken.directory})
        if round_.is_hung or not clients:
            still = workers.still if workers.is_watched else workers.age
            self._reporter.stacks_taken(taken, still, is_in_verdict=round_.is_hung)
