"""What an agent holds for the whole job: the run directory, sockets and processes, opened and closed in order."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from launcher.agent.control import Control
from launcher.agent.control_protocol import RECORD
from launcher.agent.monitor import Monitor
from launcher.agent.node_rendezvous import NodeRendezvous
from launcher.agent.request_handler import RequestHandler
from launcher.agent.saver_handle import SaverHandle
from launcher.agent.worker_group import WorkerGroup
from launcher.config.job import Config
from launcher.config.secret import Secret, find_secret
from launcher.rendezvous.client import MemberHandle, RendezvousSettings, SingleNodeClient, TeamClient
from launcher.rendezvous.master_port import reserve_master_port
from launcher.reporting.reporter import Reporter
from launcher.run_dir import RunDir
from launcher.system.processes import Subreaper
from launcher.zygote.handle import ZygoteHandle

__all__ = ["Resources"]


class Resources:
    """Opened by the constructor, which closes all of it, the zygote included, if anything fails.

    Enter it as a context: signals and events are handled from then on, and all is closed at the end. No
    process that it started is left then, except a saver that still persists, the rendezvous member while other
    nodes depend on it, and processes that SIGKILL does not end.

    Raises:
        LaunchError: The run directory, the master port, the secret or the rendezvous cannot be used.
    """

    def __init__(self, config: Config, zygote: ZygoteHandle, reaper: Subreaper) -> None:
        with ExitStack() as undo:
            undo.callback(zygote.close)
            if config.is_alone:
                with reserve_master_port(config.master_addr, config.master_port):
                    pass  # a wrong address is found before anything is changed
            self.run_dir = RunDir(config.directory, config.logs, is_shared=not config.is_alone)
            undo.callback(self.run_dir.close)
            self.reporter = Reporter(config, self.run_dir)
            undo.callback(self.reporter.close)
            self.control = Control(self.run_dir.own / RECORD)
            undo.callback(self.control.close)
            self.secret = _find_secret(config, self.run_dir)
            self.team_client = _open_team_client(config, self.secret, self.run_dir, reaper)
            undo.pop_all()
        self.monitor = Monitor()
        self.saver = SaverHandle(self.run_dir.saver_log, reaper)
        self.workers = WorkerGroup(config, zygote, reaper, self.run_dir, self.reporter)
        self.rendezvous = NodeRendezvous(config, self.team_client, self.run_dir)
        self.requests = RequestHandler(
            config, self.control, self.monitor, self.team_client, self.reporter, self.run_dir
        )

    def __enter__(self) -> Resources:
        self.monitor.__enter__()
        self.monitor.watch(self.workers, self.saver, self.team_client, self.control, self.requests.stacks)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        with ExitStack() as closing:  # from the last to the first, whatever fails
            closing.callback(self.run_dir.close)
            closing.callback(self.reporter.close)
            closing.push(self.monitor)
            closing.callback(self.rendezvous.close)
            closing.callback(self.requests.stacks.close)
            closing.callback(self.control.close)
            closing.callback(self.team_client.close)
            closing.callback(self.saver.close)
            closing.callback(self.workers.close)


def _find_secret(config: Config, run_dir: RunDir) -> Secret | None:
    """The secret by which the nodes of the job know each other; a job of one node needs none."""
    return None if config.is_alone else find_secret(config.secret, config.rdzv_endpoint[0], run_dir.path)


def _open_team_client(
    config: Config, secret: Secret | None, run_dir: RunDir, reaper: Subreaper
) -> TeamClient:
    if config.is_alone:
        return SingleNodeClient()
    min_nodes, max_nodes = config.nnodes
    settings = RendezvousSettings(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.rdzv_id or "none",
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        node_rank=config.node_rank,
        local_addr=config.local_addr,
        conf=config.rdzv_conf,
        secret=secret.text if secret else None,
        secret_source=secret.source if secret else "",
    )
    return MemberHandle(settings, run_dir.member_log, reaper)
