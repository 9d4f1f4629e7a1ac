"""The configuration of a job: merged from flags, environment, file and defaults; validated once."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from launcher.config.command import Command, Kind, module_is_missing
from launcher.config.nodes import NODE_KEYS, Given, resolve_nodes
from launcher.config.options import OPTIONS, Setting, find_option, parse_setting
from launcher.config.parsers import RDZV_CONF
from launcher.config.secret import Secret, configured_secret
from launcher.errors import UsageError
from launcher.formatting import count
from launcher.system.devices import count_gpus

__all__ = ["Config", "ShownStreams", "config_from_settings", "settings_from_environ", "settings_from_file"]

_STDOUT, _STDERR = 1, 2
_FILES_OF_WORKER, _OWN_FILES = 2, 64  # open at the same time: its logs; all others
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
    """Which workers' streams appear on the launcher's own stdout and stderr. Masks as torchrun's."""

    redirects: Mapping[int | None, int] = field(default_factory=dict)
    tee: Mapping[int | None, int] = field(default_factory=dict)
    ranks: frozenset[int] | None = None

    def shows(self, rank: int, *, stderr: bool) -> bool:
        if self.ranks is not None and rank not in self.ranks:
            return False
        bit = _STDERR if stderr else _STDOUT
        redirected = self.redirects.get(rank, self.redirects.get(None, 0)) & bit
        teed = self.tee.get(rank, self.tee.get(None, 0)) & bit
        return not redirected or bool(teed)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One job, as one of its nodes sees it.

    Construction validates everything, and raises `UsageError` before anything starts. `run_dir`,
    `log_dir` and a local `ckpt` become absolute; None stands for the documented default.
    """

    command: Command
    nproc: int = 1
    """The most workers that this node runs."""
    min_nproc: int = 0
    """The fewest with which it goes on; 0 becomes `nproc`."""
    nnodes: tuple[int, int] = (1, 1)
    """The fewest and the most nodes."""
    max_restarts: int = 3
    """Restarts without progress in between."""
    crash_loop: int = 3
    """The same failure at the same step this many times ends the job; 0: never."""
    grace: float = 15.0
    drain_timeout: float = 300.0
    hang_timeout: float | None = None
    """Seconds without progress before a restart; 0: never look; None: write stacks down, kill nothing."""
    run_dir: Path | None = None
    log_dir: Path | None = None
    ckpt: str | None = None
    preload: tuple[str, ...] = ()
    cold: bool = False
    role: str = "default"
    rdzv_backend: str = "c10d"
    rdzv_endpoint: tuple[str, int] = ("", 0)
    """Where several nodes meet: a host (IPv6 without brackets) and a port."""
    rdzv_id: str | None = None
    rdzv_conf: Mapping[str, str] = field(default_factory=dict)
    """torch's keys for the backend; numbers and truth values are checked, and still text. Of its own `launch`
    has "secret": a file with the job's secret."""
    rdzv_secret: str | None = field(default=None, repr=False)
    """The job's secret itself, by which its nodes know each other; that in a file beats it. None: see
    docs/security.md."""
    node_rank: int | None = None
    """This node's number, for the static backend."""
    local_addr: str | None = None
    """The address at which other nodes reach this one."""
    master_addr: str = "127.0.0.1"
    """One node: where the workers meet. Of several, node 0 names its own in each round."""
    master_port: int = 0
    """The same, a port; 0: any free one."""
    shown: ShownStreams = ShownStreams()
    quiet: bool = False
    log_level: str = "info"
    metrics_port: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}: expected {least} or more, found {value}")
        object.__setattr__(self, "min_nproc", self.min_nproc or self.nproc)
        self._check_workers()
        configured_secret(self.rdzv_conf, self.rdzv_secret)  # is one, if any is given
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
        gpus = 0 if self.command.kind is Kind.PROGRAM else count_gpus()
        if 0 < gpus < self.nproc:
            raise UsageError(
                f"nproc: expected at most {gpus}, the GPUs that workers can see, found {self.nproc}: "
                f"ask for fewer, or set CUDA_VISIBLE_DEVICES= (empty) for workers without GPUs"
            )
        self._check_files()

    def _check_files(self) -> None:
        """Raise `UsageError` if not enough files may be open, even when the limit is raised."""
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
        """Whether this node is the whole job, now and later: then there is nobody to meet."""
        return self.nnodes[1] == 1

    @property
    def secret(self) -> Secret | None:
        """The secret that is given for the nodes of the job."""
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
        """Where each round makes its directory of log files, absolute."""
        return (self.log_dir or self.directory / "logs").absolute()

    @property
    def checkpoints(self) -> str:
        """URL of the run's checkpoints; local paths are absolute."""
        if self.ckpt is None:
            return str(self.directory / "checkpoints")
        has_scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", self.ckpt)
        return self.ckpt if has_scheme else str(Path(self.ckpt).expanduser().absolute())

    @property
    def is_warm(self) -> bool:
        """Whether workers are forked from a process that has imported torch."""
        return not self.cold and self.command.kind is not Kind.PROGRAM


def settings_from_environ(environ: Mapping[str, str] = os.environ) -> list[Setting]:
    """What torchrun would read from the environment: PET_NPROC_PER_NODE, PET_NNODES and so on."""
    settings = []
    for option in OPTIONS:
        for name in (option.name, *option.aliases) if option.torchrun else ():
            variable = f"PET_{name.replace('-', '_').upper()}"
            if variable in environ:
                settings.append(Setting(option, environ[variable], f"{variable} in the environment"))
    return settings


def settings_from_file(path: str) -> list[Setting]:
    """The settings in a YAML file: a mapping from option names to values.

    Raises `UsageError` naming file and line for anything else, unknown and repeated keys included.
    """
    import yaml  # only a job with a file needs it

    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--config {path} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"--config {path}: expected lines like `nproc: 8`, found something else")
    settings: dict[str, Setting] = {}
    for key, value in root.value:
        source = f"{path}:{key.start_mark.line + 1}"
        option = find_option(str(key.value), source)
        if option.name in settings:
            raise UsageError(f"{source}: {key.value} is given twice: keep one")
        if option.name in ("config", "help", "version"):
            raise UsageError(f"{source}: {key.value} belongs on the command line: leave it out here")
        settings[option.name] = Setting(option, _scalar(value, source, key.value), f"{source}: {key.value}")
    return list(settings.values())


def _scalar(node: Any, source: str, key: str) -> str:
    """The text of a value; a list stands for its items with commas between them."""
    if node.id == "sequence" and all(item.id == "scalar" for item in node.value):
        return ",".join(item.value for item in node.value)
    if node.id != "scalar":
        raise UsageError(f"{source}: {key}: expected one value or a list of them, found a {node.id}")
    return str(node.value)


def config_from_settings(
    words: Sequence[str],
    *sources: Iterable[Setting],
    is_program: bool = False,
    secret: str | None = None,
) -> Config:
    """The job that `sources` describe together, the first of them taking precedence.

    `words` are the script (or module, or program) and its arguments, `secret` the job's, if the environment
    has it.

    All settings are read, also those that others beat, so that no mistake goes unnoticed.
    """
    given: dict[str, Given] = {}
    for rank, source in enumerate(sources):
        said = {
            setting.option.key: Given(parse_setting(setting), setting.source, rank) for setting in source
        }
        given = said | given
    command = Command(_kind(given, is_program), words[0], tuple(words[1:]))
    values: dict[str, Any] = {key: one.value for key, one in given.items() if key not in NODE_KEYS}
    values |= resolve_nodes(given) | {"shown": _shown(values)}
    if "nproc" in values:
        values["min_nproc"], values["nproc"] = values["nproc"]
    for key in ("run_dir", "log_dir"):
        if key in values:
            values[key] = Path(values[key]).expanduser().absolute()
    values["rdzv_secret"] = secret
    known = {item.name for item in fields(Config)}
    config = Config(command=command, **{key: value for key, value in values.items() if key in known})
    _check_shown(config, given)
    return config


def _check_shown(config: Config, given: Mapping[str, Given]) -> None:
    """Raise `UsageError` if ranks are to be shown that a job on one node has not."""
    beyond = sorted(rank for rank in config.shown.ranks or () if rank >= config.nproc)
    if beyond and config.is_alone:
        raise UsageError(
            f"{given['local_ranks_filter'].source}: expected ranks from 0 to {config.nproc - 1}, as many as "
            f"--nproc says, found {beyond[0]}"
        )


def _kind(given: Mapping[str, Given], is_program: bool) -> Kind:
    kinds = {"module": Kind.MODULE, "run_path": Kind.SCRIPT, "no_python": Kind.PROGRAM}
    chosen = {given[key].source: kind for key, kind in kinds.items() if key in given and given[key].value}
    if is_program:
        chosen["--"] = Kind.PROGRAM
    if len(set(chosen.values())) > 1:
        raise UsageError(f"{' and '.join(chosen)} exclude each other: leave out one of them")
    return next(iter(chosen.values()), Kind.SCRIPT)


def _shown(values: Mapping[str, Any]) -> ShownStreams:
    return ShownStreams(
        redirects=values.get("redirects", {}),
        tee=values.get("tee", {}),
        ranks=values.get("local_ranks_filter"),
    )
