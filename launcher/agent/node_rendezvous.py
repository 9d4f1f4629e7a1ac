"""This node's part in a rendezvous: who it is, which workers it will run, where they meet."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from launcher.config.command import Kind
from launcher.config.job import Config
from launcher.events import Joined
from launcher.rendezvous.client import TeamClient
from launcher.rendezvous.master_port import reserve_master_port
from launcher.rendezvous.team import Ready
from launcher.round.restart import History
from launcher.round.round import Round
from launcher.run_dir import RunDir

__all__ = ["NodeRendezvous"]


class NodeRendezvous:
    """Joins teams, round after round; on node 0 it holds the port at which the workers meet."""

    def __init__(self, config: Config, team_client: TeamClient, run_dir: RunDir) -> None:
        self._config = config
        self._team_client = team_client
        self._run_dir = run_dir
        self._addr = config.master_addr  # of this node, as the others reach it
        self._port = ExitStack()  # held for the workers of the present round

    def join(self, history: History) -> None:
        """Join the next team. `Joined` or `MemberFailed` follows."""
        self._team_client.join(
            {
                "host": os.uname().nodename,
                "job": _describe_job(self._config),
                "args": list(self._config.command.args),
                "history": history.to_json(),
            }
        )

    def take_team(self, joined: Joined) -> History:
        """Note this node's address in the new team. Returns the history that the team goes on with."""
        if not self._config.is_alone:
            self._addr = joined.hellos[joined.rank]["addr"]
        return History.of_team([History.from_json(hello["history"]) for hello in joined.hellos])

    def say_ready(self, round_: Round, slots: tuple[int, ...]) -> None:
        """Tell all nodes which slots of this one get workers; node 0 opens and names the master port."""
        assert round_.team is not None
        port = 0
        if round_.team.rank == 0:
            wanted = self._config.master_port if self._config.is_alone else 0
            port = self._port.enter_context(reserve_master_port(self._addr, wanted)).port
        ready = Ready(slots, self._addr, port, self._run_dir.next_round())
        self._team_client.broadcast(ready.to_json())

    def close(self) -> None:
        """Release the port; another one may be opened after that."""
        self._port.close()


def _describe_job(config: Config) -> str:
    """A text by which this job differs from another one that happens to meet at the same endpoint."""
    least, most = config.nnodes
    words = [Path(config.command.target).name, *config.command.args[: config.command.kind is Kind.PROGRAM]]
    return f"{' '.join(words)} on {least}:{most} nodes"
