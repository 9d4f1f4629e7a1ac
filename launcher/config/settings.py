"""Reads the options of a job from command line, environment, file and scheduler, and makes its `Config`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from launcher.config.command import Command, Kind
from launcher.config.job import Config, ShownStreams
from launcher.config.nodes import NODE_KEYS, Given, resolve_nodes
from launcher.config.options import OPTIONS, Setting, find_option, parse_setting
from launcher.errors import UsageError
from launcher.system.devices import count_gpus

__all__ = ["config_from_settings", "settings_from_environ", "settings_from_file"]


def settings_from_environ(environ: Mapping[str, str] = os.environ) -> list[Setting]:
    """The settings that torchrun too reads from the environment: PET_NPROC_PER_NODE, PET_NNODES and so on."""
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
    """The text of a value; the items of a list are joined by commas."""
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
    gpus: int | None = None,
) -> Config:
    """Merge the settings of several sources into one job.

    The settings of every source are parsed, also those that another source overrides, so that no mistake is
    missed. Raises `UsageError`.

    Args:
        words: the script, module or program, and its arguments.
        sources: settings, those of the highest precedence first.
        is_program: true if the words came after `--`.
        secret: the job's secret, if the environment has one.
        gpus: GPUs that workers can see; None: they are counted.
    """
    gpus = count_gpus() if gpus is None else gpus
    given: dict[str, Given] = {}
    for rank, source in enumerate(sources):
        parsed = {
            setting.option.key: Given(parse_setting(setting, gpus), setting.source, rank)
            for setting in source
        }
        given = parsed | given
    command = Command(_kind(given, is_program), words[0], tuple(words[1:]))
    values: dict[str, Any] = {key: one.value for key, one in given.items() if key not in NODE_KEYS}
    values |= resolve_nodes(given) | {"shown": _shown(values)}
    if "nproc" in values:
        values["min_nproc"], values["nproc"] = values["nproc"]
    for key in ("run_dir", "log_dir"):
        if key in values:
            values[key] = Path(values[key]).expanduser().absolute()
    values |= {"rdzv_secret": secret, "gpus": gpus}
    known = {item.name for item in fields(Config)}
    config = Config(command=command, **{key: value for key, value in values.items() if key in known})
    _check_shown(config, given)
    return config


def _check_shown(config: Config, given: Mapping[str, Given]) -> None:
    """Raise `UsageError` if a job of one node has no such ranks as are to be shown."""
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
