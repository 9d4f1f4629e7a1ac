"""The configuration of a job: one frozen value, validated when it is made."""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.config.command import Command, Kind, module_is_missing
from launcher.config.parsers import RDZV_CONF
from launcher.config.secret import Secret, configured_secret
from launcher.errors import UsageError
from launcher.formatting import count
from launcher.system.devices import count_gpus

__all__ = ["Config", "ShownStreams"]

_STDOUT, _STDERR = 1, 2
_FILES_OF_WORKER, _OWN_FILES = 2, 64  # open at the same time: a worker's log files; all others
_LOG_LEVELS = ("debug", "info", "warning", "error")
_LEAST = {
    "nproc": 1,
    "min_nproc": 0,
    "max_restarts": 0,
    "crash_loop": 0,
    "grace": 0,
    "drain_timeout": 0,
    "hang_timeout": 0,
    "metrics_port": 0,
}


@dataclass(frozen=True)
class ShownStreams:
    """Which workers' streams appear on the launcher's own stdout and stderr.

    Args:
        redirects: torchrun's masks of streams (1 stdout, 2 stderr) that go to the log files only, by rank; key
            None: all ranks.
        tee: masks of streams that are shown even if `redirects` has them.
        ranks: the only ranks that are shown; None: all.
    """

    redirects: Mapping[int | None, int] = field(default_factory=dict)
    tee: Mapping[int | None, int] = field(default_factory=dict)
    ranks: frozenset[int] | None = None

    def shows(self, rank: int, *, stderr: bool) -> bool:
        """True if a rank's stderr, or else its stdout, is shown."""
        if self.ranks is not None and rank not in self.ranks:
            return False
        bit = _STDERR if stderr else _STDOUT
        redirected = self.redirects.get(rank, self.redirects.get(None, 0)) & bit
        teed = self.tee.get(rank, self.tee.get(None, 0)) & bit
        return not redirected or bool(teed)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One job, as one of its nodes runs it.

    Raises `UsageError` on construction, before anything is started, if the values cannot be used or do not fit
    together, or if this machine has too few GPUs or may open too few files.

    Args:
        command: what the workers run.
        nproc: the most workers that this node runs.
        min_nproc: the fewest workers with which it goes on; 0: `nproc`.
        nnodes: the fewest and the most nodes.
        max_restarts: restarts without progress in between, after which the job fails.
        crash_loop: the same failure at the same step this many times ends the job; 0: never.
        grace: seconds from SIGTERM to SIGKILL when workers are stopped; also the time in which a preempted job
            saves and ends.
        drain_timeout: seconds to wait, once the workers have ended, for saves to become durable; 0: no wait.
        hang_timeout: seconds without progress, after which the workers are restarted; 0: hangs are not detected;
            None: after 600 s their stacks are written to files, and nothing is killed.
        run_dir: the directory for logs, verdicts and each rank's own directory. A job that is started again in it
            resumes. None: `runs/NAME`, after the command, in the current directory.
        log_dir: where each round gets a directory of log files; None: `logs` in the run directory.
        ckpt: URL or path of the run's checkpoints; None: `checkpoints` in the run directory.
        preload: modules to import, besides torch, before workers are forked.
        cold: start each worker as a fresh interpreter instead of forking it.
        role: ROLE_NAME of the workers.
        rdzv_backend: how several nodes meet: "c10d", "static", "etcd-v2" or "etcd".
        rdzv_endpoint: where they meet: a host, IPv6 without brackets, and a port.
        rdzv_id: the job's name there, the same on all nodes; None: "none", as with torchrun.
        rdzv_conf: torch's keys for the backend, checked, but still text; and launch's own "secret", a file with
            the job's secret.
        rdzv_secret: the secret itself, by which the nodes authenticate each other; a file in `rdzv_conf` takes
            precedence. None: docs/security.md says when one is made.
        node_rank: this node's number from 0, for the static backend.
        local_addr: the address at which other nodes reach this one; None: that of the route to the endpoint.
        master_addr: MASTER_ADDR of a job of one node. With several, node 0 announces its own in each round.
        master_port: MASTER_PORT of a job of one node; 0: any free one.
        shown: which workers' streams appear on the launcher's own.
        quiet: print nothing but the workers' streams and errors.
        log_level: "debug", "info", "warning" or "error".
        metrics_port: where to serve Prometheus metrics, to all hosts that can reach it; 0: any free port; None:
            nowhere.
        gpus: GPUs of this node that workers can see; None: they are counted.
    """

    command: Command
    nproc: int = 1
    min_nproc: int = 0
    nnodes: tuple[int, int] = (1, 1)
    max_restarts: int = 3
    crash_loop: int = 3
    grace: float = 15.0
    drain_timeout: float = 300.0
    hang_timeout: float | None = None
    run_dir: Path | None = None
    log_dir: Path | None = None
    ckpt: str | None = None
    preload: tuple[str, ...] = ()
    cold: bool = False
    role: str = "default"
    rdzv_backend: str = "c10d"
    rdzv_endpoint: tuple[str, int] = ("", 0)
    rdzv_id: str | None = None
    rdzv_conf: Mapping[str, str] = field(default_factory=dict)
    rdzv_secret: str | None = field(default=None, repr=False)
    node_rank: int | None = None
    local_addr: str | None = None
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    shown: ShownStreams = ShownStreams()
    quiet: bool = False
    log_level: str = "info"
    metrics_port: int | None = None
    gpus: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}: expected {least} or more, found {value}")
        object.__setattr__(self, "min_nproc", self.min_nproc or self.nproc)
        object.__setattr__(self, "gpus", count_gpus() if self.gpus is None else self.gpus)
        self._check_workers()
        configured_secret(self.rdzv_conf, self.rdzv_secret)  # raises if it is unusable
        if not self.is_alone:
            self._check_nodes()
        if self.log_level not in _LOG_LEVELS:
            raise UsageError(f"log_level: expected {' or '.join(_LOG_LEVELS)}, found {self.log_level}")
        self._check_preload()

    def _check_workers(self) -> None:
        if self.min_nproc > self.nproc:
            raise UsageError(
                f"nproc: expected a minimum of at most {self.nproc}, the most workers that this node runs, "
                f"found {self.min_nproc}"
            )
        gpus = self.gpus or 0
        if self.command.kind is not Kind.PROGRAM and 0 < gpus < self.nproc:
            raise UsageError(
                f"nproc: expected at most {gpus}, the GPUs that workers can see, found {self.nproc}: "
                f"ask for fewer, or set CUDA_VISIBLE_DEVICES= (empty) for workers without GPUs"
            )
        self._check_files()

    def _check_files(self) -> None:
        """Raise `UsageError` if the hard limit of open files is too low for the workers' log files."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        needed = self.nproc * _FILES_OF_WORKER + _OWN_FILES
        if files == resource.RLIM_INFINITY or files >= needed:
            return
        most = (files - _OWN_FILES) // _FILES_OF_WORKER
        fewer = f", or ask for at most {most}" if most > 0 else ""
        need = f"{count(self.nproc, 'worker')} need{'s' if self.nproc == 1 else ''} {needed} open files"
        raise UsageError(
            f"nproc: {need}, and {files} are allowed here: raise the hard limit (`ulimit -Hn`){fewer}"
        )

    def _check_nodes(self) -> None:
        least, most = self.nnodes
        host, port = self.rdzv_endpoint
        if not 1 <= least <= most:
            raise UsageError(f"nnodes: expected MIN:MAX with 1 or more as MIN, found {least}:{most}")
        if self.rdzv_backend not in RDZV_CONF:
            raise UsageError(f"rdzv_backend: expected {' or '.join(RDZV_CONF)}, found {self.rdzv_backend}")
        if not host:
            raise UsageError(
                f"nnodes: {most} nodes need a place to meet: give --rdzv-endpoint HOST:PORT, the same on all"
            )
        if not 1 <= port <= 65535:
            raise UsageError(
                f"rdzv_endpoint: expected a port from 1 to 65535 that all nodes know, found {port}"
            )
        if self.rdzv_backend == "static":
            self._check_static()
        for key in self.rdzv_conf:
            if key not in RDZV_CONF[self.rdzv_backend]:
                keys = ", ".join(RDZV_CONF[self.rdzv_backend])
                raise UsageError(f"rdzv_conf: {self.rdzv_backend} knows no {key}: its keys are {keys}")

    def _check_static(self) -> None:
        least, most = self.nnodes
        if least != most:
            raise UsageError(
                f"nnodes: expected one number, as static nodes never change, found {least}:{most}: "
                f"give --rdzv-backend c10d and --rdzv-endpoint"
            )
        if self.node_rank is None or not 0 <= self.node_rank < most:
            found = "none" if self.node_rank is None else self.node_rank
            raise UsageError(
                f"node_rank: expected 0 to {most - 1}, another on each node, for static, found {found}"
            )

    def _check_preload(self) -> None:
        if self.preload and not self.is_warm:
            raise UsageError("preload needs warm Python workers: leave out --preload, or --cold and `--`")
        for name in self.preload:
            if module_is_missing(name, self.command.import_dir):
                raise UsageError(f"preload: no module named {name}: check the name or install it")

    @property
    def is_alone(self) -> bool:
        """True if the job never has another node: then there is no rendezvous."""
        return self.nnodes[1] == 1

    @property
    def secret(self) -> Secret | None:
        """The secret that the user has configured for the nodes of the job."""
        return configured_secret(self.rdzv_conf, self.rdzv_secret)

    @property
    def run_id(self) -> str:
        """The job's name: the same on all nodes."""
        return self.rdzv_id or (self.directory.name if self.is_alone else "none")

    @property
    def directory(self) -> Path:
        """The run directory, absolute."""
        return (self.run_dir or Path("runs", self.command.name)).absolute()

    @property
    def logs(self) -> Path:
        """The directory in which each round gets its directory of log files, absolute."""
        return (self.log_dir or self.directory / "logs").absolute()

    @property
    def checkpoints(self) -> str:
        """URL of the run's checkpoints; a local path is absolute."""
        if self.ckpt is None:
            return str(self.directory / "checkpoints")
        has_scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", self.ckpt)
        return self.ckpt if has_scheme else str(Path(self.ckpt).expanduser().absolute())

    @property
    def is_warm(self) -> bool:
        """True if workers are forked from a process that has imported torch."""
        return not self.cold and self.command.kind is not Kind.PROGRAM
