"""The configuration of a job: merged from flags, environment, file and defaults; validated once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from launcher.command import Command, Kind, module_is_missing
from launcher.devices import count_gpus
from launcher.errors import UsageError
from launcher.options import OPTIONS, Setting, find, read

__all__ = ["Config", "Shown", "config_from_settings", "settings_from_environ", "settings_from_file"]

_STDOUT, _STDERR = 1, 2


@dataclass(frozen=True)
class Shown:
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
    """One job. Construction validates everything, and raises `UsageError` before anything starts.

    `run_dir`, `log_dir` and a local `ckpt` become absolute; None stands for the documented default.
    """

    command: Command
    nproc: int = 1
    max_restarts: int = 3
    grace: float = 15.0
    drain_timeout: float = 300.0
    run_dir: Path | None = None
    log_dir: Path | None = None
    ckpt: str | None = None
    preload: tuple[str, ...] = ()
    cold: bool = False
    run_id: str | None = None
    role: str = "default"
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    shown: Shown = Shown()

    def __post_init__(self) -> None:
        if self.nproc < 1:
            raise UsageError(f"nproc: expected at least 1 worker, found {self.nproc}")
        if self.max_restarts < 0:
            raise UsageError(f"max_restarts: expected 0 or more, found {self.max_restarts}")
        if self.grace < 0:
            raise UsageError(f"grace: expected 0 seconds or more, found {self.grace}")
        if self.drain_timeout < 0:
            raise UsageError(f"drain_timeout: expected 0 seconds or more, found {self.drain_timeout}")
        gpus = 0 if self.command.kind is Kind.PROGRAM else count_gpus()
        if 0 < gpus < self.nproc:
            raise UsageError(
                f"nproc: expected at most {gpus}, the GPUs that workers can see, found {self.nproc}: "
                f"ask for fewer, or set CUDA_VISIBLE_DEVICES= (empty) for workers without GPUs"
            )
        if self.preload and (self.cold or self.command.kind is Kind.PROGRAM):
            raise UsageError("preload needs warm Python workers: leave out --preload, or --cold and `--`")
        for name in self.preload:
            if module_is_missing(name, self.command.import_dir):
                raise UsageError(f"preload: no module named {name}: check the name or install it")

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
        option = find(str(key.value), source)
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
    words: Sequence[str], *sources: Iterable[Setting], is_program: bool = False
) -> Config:
    """The job that `sources` describe together, the first of them taking precedence.

    `words` are the script (or module, or program) and its arguments.

    All settings are read, also those that others beat, so that no mistake goes unnoticed.
    """
    values: dict[str, object] = {}
    names: dict[str, str] = {}
    for source in sources:
        given = {setting.option.key: (read(setting), setting.source) for setting in source}
        for key, (value, name) in given.items():
            values.setdefault(key, value)
            names.setdefault(key, name)
    command = Command(_kind(values, names, is_program), words[0], tuple(words[1:]))
    _resolve_rendezvous(values, names)
    _resolve_shown(values)
    for key in ("run_dir", "log_dir"):
        if key in values:
            values[key] = Path(str(values[key])).expanduser().absolute()
    known = {item.name for item in fields(Config)}
    chosen: dict[str, Any] = {key: value for key, value in values.items() if key in known}
    return Config(command=command, **chosen)


def _kind(values: Mapping[str, object], names: Mapping[str, str], is_program: bool) -> Kind:
    chosen = {
        names.get(key, "--"): kind
        for key, kind in (
            ("module", Kind.MODULE),
            ("run_path", Kind.SCRIPT),
            ("no_python", Kind.PROGRAM),
        )
        if values.get(key)
    }
    if is_program:
        chosen["--"] = Kind.PROGRAM
    if len(set(chosen.values())) > 1:
        raise UsageError(f"{' and '.join(chosen)} exclude each other: leave out one of them")
    return next(iter(chosen.values()), Kind.SCRIPT)


def _resolve_rendezvous(values: dict[str, object], names: dict[str, str]) -> None:
    """What torchrun's rendezvous options mean on one node: an address, a port, an id."""
    if "rdzv_id" in values:
        values["run_id"] = values["rdzv_id"]
    if "local_addr" in values:
        values.setdefault("master_addr", values["local_addr"])
    if "rdzv_endpoint" not in values:
        return
    endpoint = names["rdzv_endpoint"]
    if values.get("standalone"):
        raise UsageError(f"{endpoint}: {names['standalone']} picks the endpoint: leave out one of them")
    for key in ("master_addr", "master_port"):
        if key in names:
            raise UsageError(f"{endpoint}: {names[key]} says the same: leave out one of them")
    values["master_addr"], values["master_port"] = values["rdzv_endpoint"]  # type: ignore[misc]


def _resolve_shown(values: dict[str, object]) -> None:
    chosen: dict[str, Any] = {
        "redirects": values.get("redirects", {}),
        "tee": values.get("tee", {}),
        "ranks": values.get("local_ranks_filter"),
    }
    values["shown"] = Shown(**chosen)
